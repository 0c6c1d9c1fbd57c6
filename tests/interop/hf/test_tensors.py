"""The same model under the names and in the layouts that other libraries write."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from lightning_jax.config.errors import UserError
from lightning_jax.interop import hf
from tests.interop.hf.test_models import (
    DOTS1,
    LAYOUTS,
    LIGHTNING,
    LLAMA,
    assert_same_bits,
    edit_config,
    edit_tensors,
    make,
    with_bias,
)

MIXTRAL = dict(
    unit="L",
    num_units=2,
    attention__qk_norm="none",
    moe__renormalize_gates=True,
    moe__num_shared_experts=0,
    moe__eval_routing="top_k",
    tie_embeddings=False,
)
QWEN3_MOE = MIXTRAL | dict(unit="GG", unit_mlp="DE", attention__qk_norm="head")
OLMOE = MIXTRAL | dict(unit="G", attention__qk_norm="projection", moe__renormalize_gates=False)


def stack_experts(tensors):
    """Rewrites a tensor for each expert as the reference library keeps them: [E, 2F, D], [E, D, F].

    Gate comes before up.
    """
    found = {}
    for name in [name for name in tensors if ".experts." in name]:
        base, expert, short = name.removesuffix(".weight").rsplit(".", 2)
        short = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(short, short)
        found.setdefault(base, {}).setdefault(short, []).append((int(expert), tensors.pop(name)))
    for base, parts in found.items():
        gate, up, down = (
            np.stack([value for _, value in sorted(parts[name], key=lambda pair: pair[0])])
            for name in ("gate_proj", "up_proj", "down_proj")
        )
        tensors[f"{base}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        tensors[f"{base}.down_proj"] = down


def rename(*pairs):
    def change(tensors):
        for name in list(tensors):
            new = name
            for old, replacement in pairs:
                new = re.sub(old, replacement, new)
            tensors[new] = tensors.pop(name)

    return change


def drop_last(tensors):
    del tensors[max(name for name in tensors if name.endswith("down_proj"))]


EXPERTS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "olmoe": OLMOE, "dots1": DOTS1}
BASE_MODEL = rename(("^model\\.", ""))
NEWER = rename((r"\.block_sparse_moe\.", ".mlp."))


# Case E1
@pytest.mark.parametrize("model_type", EXPERTS)
def test_experts_stacked_in_one_tensor_are_read(model_type, tmp_path, caplog):
    config, params, router = make(**EXPERTS[model_type])
    router = with_bias(router) if model_type == "dots1" else router
    assert hf.save(tmp_path / "a", config, params, router, model_type=model_type) == model_type
    edit_tensors(tmp_path / "a", stack_experts)
    names = [name for name in load_file(tmp_path / "a" / "model.safetensors") if "expert" in name]
    assert not any(re.search(r"experts\.\d", name) for name in names)
    caplog.set_level("INFO")
    loaded = hf.load(tmp_path / "a")
    assert_same_bits(loaded.params, params)
    np.testing.assert_array_equal(loaded.router.bias_URE, router.bias_URE)
    assert "experts of a layer are in one tensor" in caplog.text
    edit_tensors(tmp_path / "a", NEWER)
    assert_same_bits(hf.load(tmp_path / "a").params, params)
    edit_tensors(tmp_path / "a", drop_last)
    with pytest.raises(UserError, match=r"lacks model.layers.\d.*experts.down_proj"):
        hf.load(tmp_path / "a")


def test_one_layer_stacked_and_one_not(tmp_path):
    config, params, _ = make(**MIXTRAL)
    hf.save(tmp_path, config, params, model_type="mixtral")

    def stack_first(tensors):
        first = {name: tensors.pop(name) for name in list(tensors) if "layers.0.block" in name}
        stack_experts(first)
        tensors.update(first)

    edit_tensors(tmp_path, stack_first)
    assert_same_bits(hf.load(tmp_path).params, params)


@pytest.mark.parametrize(
    ("model_type", "change"),
    [
        ("llama", BASE_MODEL),
        ("gpt_oss", BASE_MODEL),
        ("dots1", BASE_MODEL),
        ("mixtral", BASE_MODEL),
        ("mixtral", NEWER),
        ("mixtral", rename(("^model\\.", ""), (r"\.block_sparse_moe\.", ".mlp."))),
    ],
)
def test_names_that_the_reference_library_reads_too(model_type, change, tmp_path):
    config, params, _ = make(**(LAYOUTS | EXPERTS)[model_type])
    hf.save(tmp_path, config, params, model_type=model_type)
    edit_tensors(tmp_path, change)
    assert_same_bits(hf.load(tmp_path).params, params)


def test_our_own_layout_has_one_spelling(tmp_path):
    config, params, _ = make(**LIGHTNING)
    hf.save(tmp_path, config, params)
    edit_tensors(tmp_path, BASE_MODEL)
    with pytest.raises(UserError, match="lacks model.embed_tokens.weight"):
        hf.load(tmp_path)


# Cases E3, E4: a config that is not that of the weights beside it.
@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama"])
def test_any_value_of_any_key_beside_weights_is_a_model_or_a_line(model_type, tmp_path):
    config, params, _ = make(**(LAYOUTS | EXPERTS)[model_type])
    hf.save(tmp_path, config, params, model_type=model_type)
    content = (tmp_path / "config.json").read_text()
    for key in json.loads(content):
        for value in (None, -1, 1, 3, 2**31 - 1, 2**31, 1e300, "", "llama", [], {}, "drop"):
            edit_config(tmp_path, **{key: value})
            try:
                hf.load(tmp_path)
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            (tmp_path / "config.json").write_text(content)


# Case E2
def test_a_tied_head_alone_is_the_embedding(tmp_path):
    config, params, _ = make(**LLAMA)
    hf.save(tmp_path, config, params)
    edit_tensors(tmp_path, rename(("model.embed_tokens", "lm_head")))
    assert_same_bits(hf.load(tmp_path).params, params)
    edit_tensors(tmp_path, BASE_MODEL)
    assert_same_bits(hf.load(tmp_path).params, params)
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(UserError, match="lacks model.embed_tokens.weight"):
        hf.load(tmp_path)
    edit_config(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path, lambda t: t.pop("lm_head.weight"))
    with pytest.raises(UserError, match="lacks model.embed_tokens.weight"):
        hf.load(tmp_path)
