"""Reading and writing model folders: exact round trips, meshes, and one line for what is wrong."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config.errors import UserError
from lightning_jax.interop import hf
from lightning_jax.interop.hf.tensors import file_tensors
from tests.tiny import mesh_config, tiny_model

LLAMA = dict(unit="G", num_units=3, moe__num_experts=0, attention__qk_norm="none")
DOTS1 = dict(
    prefix="L",
    unit="LG",
    num_units=2,
    moe__router_score="sigmoid",
    moe__renormalize_gates=True,
    moe__routed_scale=2.5,
    moe__eval_routing="top_k",
    tie_embeddings=False,
)
GPT_OSS = dict(
    unit="LG",
    num_units=2,
    attention__qk_norm="none",
    attention__qkv_bias=True,
    attention__out_bias=True,
    attention__sinks=True,
    attention__rope_scaling__kind="yarn",
    attention__rope_scaling__factor=4.0,
    moe__num_shared_experts=0,
    moe__router_bias=True,
    moe__expert_bias=True,
    moe__clamp=7.0,
    moe__renormalize_gates=True,
    moe__eval_routing="top_k",
    tie_embeddings=False,
)
LIGHTNING = dict(prefix="G", unit="LLGgLg", num_units=2, unit_mlp="EDEEED")
LAYOUTS = {"llama": LLAMA, "dots1": DOTS1, "gpt_oss": GPT_OSS, "lightning": LIGHTNING}


def make(**changes):
    config = tiny_model(64, **changes)
    # Drawn by numpy: compiling a generator for every shape would take longer than the tests.
    draw = np.random.default_rng(0).normal
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * draw(size=leaf.shape) + (leaf.ndim < 3), leaf.dtype),
        lm.abstract_params(config),
    )
    return config, params, lm.init_router(config)


def with_bias(router):
    bias = jax.random.normal(jax.random.key(7), router.bias_URE.shape)
    return lm.Router(bias, jnp.float32(0.3137))


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_round_trip_keeps_every_bit(model_type, dtype, tmp_path):
    config, params, router = make(**LAYOUTS[model_type])
    router = with_bias(router) if model_type in ("dots1", "lightning") else router
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    assert hf.save(tmp_path / "a", config, params, router) == model_type
    loaded = hf.load(tmp_path / "a", dtype=dtype)
    assert_same_bits(loaded.params, params)
    np.testing.assert_array_equal(loaded.router.bias_URE, router.bias_URE)
    if model_type == "lightning":
        assert loaded.router.top_p == router.top_p
        assert loaded.config.layers == config.layers and loaded.config.moe == config.moe
    hf.save(tmp_path / "b", *loaded)
    again = hf.load(tmp_path / "b", dtype=dtype)
    assert_same_bits(again.params, loaded.params)
    assert again.config == loaded.config
    assert [p.name for p in sorted((tmp_path / "b").iterdir())] == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_many_files(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params, max_shard_bytes=8_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert_same_bits(hf.load(tmp_path).params, params)


@pytest.mark.slow
def test_lands_on_the_mesh_by_logical_axes(tmp_path):
    config, params, _ = make(**DOTS1)
    hf.save(tmp_path, config, params)
    mesh = sharding.make_mesh(mesh_config(data=2, fsdp=4))
    loaded = hf.load(tmp_path, mesh=mesh)
    wanted = sharding.tree_shardings(lm.logical_axes(loaded.config), mesh)
    for leaf, where in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    assert_same_bits(loaded.params, params)


def test_every_tensor_holds_its_own_slice(tmp_path):
    """Each entry of every parameter is in exactly one tensor."""
    config, params, _ = make(**LIGHTNING)
    counts = {}
    for tensor in file_tensors(config, "lightning"):
        for part in tensor.parts:
            size = int(np.prod(part.shape))
            counts[part.path] = counts.get(part.path, 0) + size
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    sizes = {jax.tree_util.keystr(k, simple=True, separator="/"): v.size for k, v in leaves}
    counts.pop("router/bias_URE")
    assert counts == sizes


def edit_config(folder, **changes):
    path = folder / "config.json"
    described = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in described.items() if v != "drop"}))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def point_to_nothing(folder):
    names = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.layers.1.input_layernorm.weight"
DAMAGE = {
    "truncated": (truncate, "not a whole safetensors file"),
    "no shard": (point_to_nothing, "model-00001-of-00002.safetensors: no such file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "bad config": (lambda f: (f / "config.json").write_text("{"), "not JSON"),
    "missing": (lambda f: edit_tensors(f, lambda t: t.pop(NORM)), f"lacks {NORM}"),
    "extra": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.bonus": np.zeros(3)})),
        "has, beyond what config.json says, model.bonus",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({NORM: np.zeros(7, np.float32)})),
        r"has shape \[7\], config.json says \[32\]",
    ),
    "layers": (lambda f: edit_config(f, num_hidden_layers=4), "lacks model.layers.3"),
    "type": (lambda f: edit_config(f, model_type="lama"), 'did you mean "llama"'),
    "no type": (lambda f: edit_config(f, model_type="drop"), "config.json: lacks model_type"),
    "no key": (lambda f: edit_config(f, hidden_size="drop"), "config.json: lacks hidden_size"),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "longrope", "factor": 2.0}),
        "rope_type = 'longrope': must be one of default, linear, llama3, yarn",
    ),
    "older rope": (
        lambda f: edit_config(f, rope_parameters=None, rope_scaling={"type": "dynamic"}),
        "rope_type = 'dynamic'",
    ),
    "rope key": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear", "factor": 2, "x": 1}),
        "unknown key 'x'",
    ),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), "only 'silu' is supported"),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "mxfp4"}),
        "quantization_config = 'mxfp4'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(damage, tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    change, message = DAMAGE[damage]
    change(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        hf.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((0, 0, 1), r"kv_source\[2\] = 1: must be 2 \(its own\) or the last owner"),
        ((0, 0), "must have 3 entries"),
        ((1, 1, 1), r"kv_source\[0\] = 1"),
    ],
)
def test_a_kv_source_that_letters_cannot_say(source, message, tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    with pytest.raises(UserError, match=message):
        hf.load(tmp_path, kv_source=source)


def test_a_kv_source_needs_fewer_tensors(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    with pytest.raises(UserError, match=r"has, beyond .* model.layers.1.self_attn.k_proj.weight"):
        hf.load(tmp_path, kv_source=(0, 0, 2))


@pytest.mark.parametrize(
    ("changes", "model_type", "message"),
    [
        ({"attention__sinks": True}, "llama", "model.attention.sinks = True: the llama layout"),
        ({"unit": "Gg"}, "llama", "model.layers"),
        ({"attention__output_gate": True}, "mistral", "layout has no place for it"),
        ({"norm_eps": 1e-3}, "lama", 'did you mean "llama"'),
        ({"attention__head_dim": 16}, "olmoe", "head_dim = 16: must be model_dim / num_heads = 8"),
        (
            dict(moe__num_experts=8, attention__qk_norm="head")
            | dict(DOTS1, unit="G", moe__eval_routing="top_p"),
            "dots1",
            "model.moe.eval_routing = 'top_p'",
        ),
    ],
)
def test_a_layout_refuses_what_it_cannot_say(changes, model_type, message, tmp_path):
    config, params, router = make(**{**LLAMA, **changes})
    with pytest.raises(UserError, match=message):
        hf.save(tmp_path / "x", config, params, router, model_type=model_type)
    assert not (tmp_path / "x").exists()


def test_a_bias_is_not_dropped_in_silence(tmp_path):
    config, params, router = make(**GPT_OSS)
    with pytest.raises(UserError, match="no place for a selection bias"):
        hf.save(tmp_path, config, params, with_bias(router), model_type="gpt_oss")


def test_older_spellings_are_read(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    edit_config(tmp_path, rope_parameters="drop", rope_theta=10_000.0, head_dim="drop")
    assert hf.load(tmp_path).config.attention.rope_base_global == 10_000.0
    edit_config(tmp_path, rope_scaling={"type": "linear", "factor": 4.0})
    assert hf.load(tmp_path).config.attention.rope_scaling.kind == "linear"
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    edit_tensors(tmp_path, lambda tensors: tensors.update(extra))
    hf.load(tmp_path)


def test_a_repeated_tied_head_must_be_the_embedding(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": embedding}))
    assert_same_bits(hf.load(tmp_path).params, params)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": embedding + 1}))
    with pytest.raises(UserError, match="differs from the embedding"):
        hf.load(tmp_path)


def test_files_say_that_they_hold_torch_layouts(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_folder_that_cannot_be_written(tmp_path):
    config, params, _ = make(**LLAMA)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        hf.save(tmp_path / "file", config, params)


# Case A13
def test_a_refused_save_leaves_no_trace(tmp_path):
    config, params, router = make(**LLAMA)
    broken = jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan), params)
    with pytest.raises(UserError, match="b: .*/.* has values that are not finite"):
        hf.save(tmp_path / "a" / "b", config, broken, router)
    with pytest.raises(UserError, match="no place for a selection bias"):
        hf.save(
            tmp_path / "a" / "b",
            *make(**GPT_OSS)[:2],
            with_bias(make(**GPT_OSS)[2]),
            model_type="gpt_oss",
        )
    assert not list(tmp_path.iterdir())
    assert hf.save(tmp_path / "a" / "b", config, params, router) == "llama"
    before = (tmp_path / "a" / "b" / "model.safetensors").stat()
    with pytest.raises(UserError, match="is not empty"):
        hf.save(tmp_path / "a" / "b", config, params, router)
    assert (tmp_path / "a" / "b" / "model.safetensors").stat() == before
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_a_save_that_the_disk_ends_leaves_no_trace(tmp_path, monkeypatch):
    config, params, _ = make(**LLAMA)
    real, calls = os.replace, []

    def fail_at(number):
        def replace(*args):
            calls.append(args)
            if len(calls) == number:
                raise OSError(28, "No space left on device")
            return real(*args)

        return replace

    for number in (1, 3, 6):
        calls.clear()
        monkeypatch.setattr(os, "replace", fail_at(number))
        with pytest.raises(UserError, match="No space left on device"):
            hf.save(tmp_path / "a", config, params, max_shard_bytes=8_000)
        assert not list(tmp_path.iterdir())


# Case D1
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_that_is_not_finite_is_named(value, tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(tensors, tmp_path / "model.safetensors")
    match = "model.layers.1.mlp.up_proj.weight has values that are not finite"
    with pytest.raises(UserError, match=match):
        hf.load(tmp_path)
    params["embed"]["table_VD"] = params["embed"]["table_VD"].at[3].set(value)
    with pytest.raises(UserError, match="embed/table_VD has values that are not finite"):
        hf.save(tmp_path / "other", config, params)
    assert not (tmp_path / "other").exists()
