from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from configs import base
from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.infer import engine as engine_module
from lightning_jax.infer.buckets import length_bucket
from lightning_jax.infer.decode_state import DecodeState
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from tests.targets import TPU, products
from tests.tiny import mesh_config

VOCAB, VALID, CHUNK, LENGTH, NEW = 48, 40, 4, 24, 10
GREEDY, WARM = Sampling(temperature=0.0), Sampling(temperature=1.0, top_p=0.9)
# One token, a whole chunk, and three chunks, longer than the window.
PROMPTS = ([5], [7, 1, 30, 2], list(range(11)))


def _config(**moe) -> ModelConfig:
    fields = base.get_config().model.to_dict()
    fields |= dict(vocab_size=VOCAB, model_dim=32, unit="LlG", mlp_dim=48)
    fields["attention"] |= dict(num_heads=4, num_kv_heads=2, head_dim=8, window=6)
    # A kernel that takes no cache: the engine must not ask for it.
    fields["attention"]["implementation"] = "xla_banded"
    fields["moe"] |= dict(num_experts=8, expert_dim=16, max_experts=4, top_p=0.5) | moe
    fields["moe"]["implementation"] = "onehot"
    return build(ModelConfig, fields)


CONFIG = _config()


@functools.cache
def _params(seed: int = 0, config: ModelConfig = CONFIG):
    rng = np.random.default_rng(seed)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jax.numpy.asarray(noise * 0.4 if leaf.ndim > 1 else 1 + 0.3 * noise)

    return jax.tree.map(draw, lm.abstract_params(config))


def _engine(seed: int = 0, *, top_p: float = 0.5, config: ModelConfig = CONFIG, **options):
    router = dataclasses.replace(lm.init_router(CONFIG), top_p=jax.numpy.float32(top_p))
    options = dict(max_length=LENGTH, prefill_chunk=CHUNK, valid_vocab=VALID) | options
    return Engine(config, _params(seed), router, **options)


def _generate(engine, prompts=PROMPTS, sampling=GREEDY, *, seed=0, new=NEW, stop_ids=()):
    key = jax.random.key(seed)
    return engine.generate(prompts, sampling, max_new_tokens=new, key=key, stop_ids=stop_ids)


@functools.partial(jax.jit, static_argnames=("base",))
def _next_of(params, tokens_BT, length_B, base):
    """Without a cache: the most probable next token of each row, and the experts used."""
    valid_BT = np.arange(LENGTH)[None] < length_B[:, None]
    output = lm.LightningLM(CONFIG).apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=valid_BT.astype(np.int32),
        router=dataclasses.replace(lm.init_router(CONFIG), top_p=jax.numpy.float32(0.5)),
        rope_base_global=base,
    )
    last_BV = output.logits()[np.arange(len(PROMPTS)), length_B - 1]
    used = output.stats.assigned_count_E.sum() / output.stats.tokens.sum()
    return last_BV[:, :VALID].argmax(axis=-1), used


def _without_cache(base: float):
    rows = [list(prompt) for prompt in PROMPTS]
    for _ in range(NEW):
        length_B = np.array([len(row) for row in rows])
        tokens_BT = np.zeros((len(rows), LENGTH), np.int32)
        for row, ids in enumerate(rows):
            tokens_BT[row, : len(ids)] = ids
        next_B, used = _next_of(_params(), tokens_BT, length_B, base)
        for ids, token in zip(rows, np.asarray(next_B).tolist(), strict=True):
            ids.append(token)
    made = [row[len(prompt) :] for row, prompt in zip(rows, PROMPTS, strict=True)]
    return made, float(used)


@pytest.mark.slow
@pytest.mark.parametrize("rope_base", [CONFIG.attention.rope_base_global, 3.0])
def test_greedy_equals_a_forward_without_cache(rope_base):
    expected, used = _without_cache(rope_base)
    attention = dataclasses.replace(CONFIG.attention, rope_base_global=rope_base)
    engine = _engine(config=dataclasses.replace(CONFIG, attention=attention))
    assert engine.experts_per_token is None
    assert _generate(engine) == expected
    assert len({tuple(row) for row in expected}) == len(PROMPTS)
    # Every token but the last of each row went through the model exactly once in both.
    assert engine.experts_per_token == pytest.approx(used, rel=1e-6)


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_others():
    rows = _generate(_engine())
    others = ([9] * 14, PROMPTS[1], [3])
    assert _generate(_engine(), others)[1] == rows[1]
    warm = _generate(_engine(), sampling=WARM)
    assert _generate(_engine(), others, WARM)[1] == warm[1]


@pytest.mark.slow
def test_the_key_decides():
    first = _generate(_engine(), sampling=WARM)
    assert _generate(_engine(), sampling=WARM) == first
    assert _generate(_engine(), sampling=WARM, seed=1) != first
    assert all(0 <= token < VALID for row in first for token in row)


def test_a_row_ends_with_its_eos():
    rows = _generate(_engine())
    eos_id = rows[0][3]
    cut = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]
    assert _generate(_engine(), stop_ids=[eos_id]) == cut
    stream = _engine().stream(
        PROMPTS, GREEDY, max_new_tokens=NEW, key=jax.random.key(0), stop_ids=[eos_id]
    )
    table = np.stack(list(stream), axis=1)
    for row, ids in zip(table, cut, strict=True):
        np.testing.assert_array_equal(row, ids + [-1] * (table.shape[1] - len(ids)))


def test_the_stream_ends_when_all_rows_have_ended():
    prompts = [PROMPTS[2]] * 3
    first = _generate(_engine(), prompts)[0]
    stream = _engine().stream(
        prompts, GREEDY, max_new_tokens=NEW, key=jax.random.key(0), stop_ids=[first[1]]
    )
    made = list(stream)
    assert len(made) == first.index(first[1]) + 1
    assert all(token_B.dtype == np.int32 for token_B in made)


def test_experts_per_token_are_measured():
    engine = _engine(top_p=1.0)
    _generate(engine)
    assert engine.experts_per_token == 4.0
    engine = _engine(top_p=1e-6)
    _generate(engine)
    assert engine.experts_per_token == 1.0


@pytest.mark.slow
def test_a_dense_model_has_no_experts_to_count():
    config = _config(num_experts=0)
    params = _params(0, config)
    engine = Engine(config, params, lm.init_router(config), max_length=8)
    assert len(_generate(engine, [[1, 2]], new=3)[0]) == 3
    assert engine.experts_per_token is None


def test_a_second_engine_compiles_nothing():
    functions = (engine_module.prefill_step, engine_module.decode_step, engine_module._advance)
    _generate(_engine())
    compiled = [function._cache_size() for function in functions]
    # Other weights, lengths, a batch of the same bucket, other settings and room in the cache.
    _generate(_engine(1), [[1], [2, 3], list(range(14)), [4]], stop_ids=[3])
    _generate(_engine(max_length=LENGTH - 3), [[5]] * 3, sampling=WARM, new=2, seed=7)
    assert [function._cache_size() for function in functions] == compiled


# Case F14
@pytest.mark.slow
def test_settings_and_lengths_compile_by_bucket():
    functions = (engine_module.prefill_step, engine_module.decode_step, engine_module._advance)
    _generate(_engine(), [[1]], new=2, stop_ids=[1, 2])
    compiled = [function._cache_size() for function in functions]
    caches = engine_module._make_cache.cache_info().currsize
    for index in range(20):
        engine = _engine(top_p=0.4 + index / 100)
        settings = Sampling(temperature=0.5 + index / 10, top_k=index, top_p=1 - index / 40)
        _generate(engine, [[1]], settings, new=2, seed=index, stop_ids=[index, index + 1])
    assert [function._cache_size() for function in functions] == compiled
    lengths = range(20, 44, 2)
    for length in lengths:
        _generate(_engine(max_length=length), [[1]], new=2, stop_ids=[1, 2])
    buckets = len({length_bucket(length) for length in lengths})
    assert (buckets, len(lengths)) == (2, 12)
    prefill, decode, advance = (function._cache_size() for function in functions)
    assert (prefill - compiled[0], decode - compiled[1]) == (buckets - 1, buckets - 1)
    assert advance == compiled[2]
    assert engine_module._make_cache.cache_info().currsize == caches + buckets - 1


def test_each_row_has_its_own_settings():
    greedy, warm = _generate(_engine()), _generate(_engine(), sampling=WARM)
    mixed = _generate(_engine(), sampling=[GREEDY, WARM, GREEDY])
    assert mixed == [greedy[0], warm[1], greedy[2]]
    with pytest.raises(UserError, match="^sampling = "):
        _generate(_engine(), sampling=[GREEDY])


def test_any_stop_id_ends_a_row():
    rows = _generate(_engine())
    ends = [rows[0][2], rows[1][4], VOCAB]
    cut = [next((i for i, token in enumerate(row) if token in ends), NEW - 1) for row in rows]
    expected = [row[: end + 1] for row, end in zip(rows, cut, strict=True)]
    assert _generate(_engine(), stop_ids=ends) == expected


@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize(
    ("dtype", "shards"),
    [
        ("float32", 1),
        pytest.param("bfloat16", 1, marks=pytest.mark.slow),
        pytest.param("float32", 2, marks=pytest.mark.slow),
    ],
)
def test_a_decode_step_holds_no_copy_of_a_cache_or_of_all_experts(dtype, shards):
    config = dataclasses.replace(CONFIG, num_units=3, compute_dtype=dtype)
    moe = dataclasses.replace(config.moe, num_experts=64, implementation="")
    attention = dataclasses.replace(config.attention, implementation="")
    config = dataclasses.replace(config, moe=moe, attention=attention)
    params = jax.eval_shape(lambda: lm.init_params(config, jax.random.key(0)))
    params = jax.eval_shape(lambda p: lm.inference_params(config, p), params)
    router = jax.eval_shape(lambda: lm.init_router(config))
    weights = engine_module.Weights(params, router, jax.ShapeDtypeStruct((), "float32"))
    cache = lm.abstract_cache(config, shards, 4096)
    state = DecodeState.start(
        [[1]] * shards,
        [GREEDY] * shards,
        max_new_tokens=1,
        key=jax.random.key(0),
        stop_ids=(),
        routing_top_p=1,
        rows=shards,
    )
    with jax.set_mesh(sharding.make_mesh(mesh_config(data=shards), jax.devices()[:shards])):
        compiled = engine_module.decode_step.lower(
            config, weights, cache, state, valid_vocab=VALID
        ).compile()
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))  # noqa: E731
    experts = size(params["units"]["0_L"]["moe"]["gate_EDF"]) / config.num_units
    temporary = compiled.memory_analysis().temp_size_in_bytes
    one_cache = size(cache.units["2_G"]) / config.num_units / shards
    assert temporary < min(one_cache / 2, 4 * experts)


def test_a_row_may_fill_the_cache():
    prompts = [list(range(LENGTH - 1)), [1], [2]]
    assert [len(row) for row in _generate(_engine(), prompts, new=1)] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_generation_under_a_mesh():
    mesh = sharding.make_mesh(mesh_config(fsdp=2, expert=2), jax.devices()[:4])
    rows = [PROMPTS[1], PROMPTS[2], PROMPTS[0], PROMPTS[1]]
    expected = _generate(_engine(), rows)
    placement = sharding.tree_shardings(lm.logical_axes(CONFIG), mesh)
    with jax.set_mesh(mesh):
        router = jax.device_put(lm.init_router(CONFIG), sharding.replicated(mesh))
        params = jax.device_put(_params(), placement)
        engine = Engine(
            CONFIG, params, router, max_length=LENGTH, prefill_chunk=CHUNK, valid_vocab=VALID
        )
        assert _generate(engine, rows) == expected
        compiled = engine_module.decode_step._cache_size()
        assert _generate(engine, rows) == expected
        assert engine_module.decode_step._cache_size() == compiled


def _some_steps(engine):
    """Logits after the prompts, and the caches after three more tokens."""
    state = DecodeState.start(
        PROMPTS[1:],
        [GREEDY] * 2,
        max_new_tokens=NEW,
        key=jax.random.key(0),
        stop_ids=(),
        routing_top_p=1,
        rows=2,
    )
    cache, logits_BV = engine._prefill(PROMPTS[1:], state)
    found = jax.device_get(logits_BV)
    state, *_ = engine_module._advance(state, logits_BV, valid_vocab=VALID)
    for _ in range(3):
        arguments = engine.config, engine._weights, cache, state
        cache, state, *_ = engine_module.decode_step(*arguments, valid_vocab=VALID)
    text = engine_module.decode_step.lower(*arguments[:2], cache, state, valid_vocab=VALID)
    return found, jax.device_get(cache), text.compile().as_text()


def _served(config, **axes):
    """Compares a mesh that serves with one device; returns the text of its decode step."""
    attention = dataclasses.replace(config.attention, implementation="")
    config = dataclasses.replace(config, attention=attention)
    params, router = _params(0, config), lm.init_router(config)
    options = dict(max_length=LENGTH, prefill_chunk=CHUNK, valid_vocab=VALID)
    prompts = [*PROMPTS, PROMPTS[1]]
    alone = Engine(config, params, router, **options)
    expected = *_some_steps(alone)[:2], _generate(alone, prompts)
    expected += (_generate(alone, prompts, WARM),)
    mesh = sharding.make_mesh(mesh_config(**axes), jax.devices()[:4])
    placement = sharding.tree_shardings(lm.logical_axes(config), mesh, stored=False)
    with jax.set_mesh(mesh):
        router = jax.device_put(router, sharding.replicated(mesh))
        engine = Engine(config, jax.device_put(params, placement), router, **options)
        *found, text = _some_steps(engine)
        found += _generate(engine, prompts), _generate(engine, prompts, WARM)
    assert found[2:] == list(expected[2:])
    for got, want in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(expected[:2]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    return text


def _gathered(text):
    lines = [line for line in text.splitlines() if " all-gather(" in line]
    return {re.search(r"\[([\d,]*)\]", line)[1] for line in lines if "/attention/" not in line}


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_serving_splits_heads_mlp_and_vocabulary_and_gathers_no_parameter():
    text = _served(_config(num_experts=0), data=2, tensor=2)
    assert _gathered(text) == {f"1,1,{VOCAB}", "2"}  # the logits of a device's row; all tokens


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_serving_reads_split_experts_in_place_and_gathers_tokens_alone():
    config = _config(num_experts=48)
    moe = dataclasses.replace(config.moe, implementation="")
    config = dataclasses.replace(config, moe=moe, num_units=3)
    text = _served(config, expert=2, tensor=2)
    D, F, C = config.model_dim, config.moe.expert_dim // 2, config.moe.max_experts
    # Besides: the rows of both devices, their choices and gates.
    assert _gathered(text) == {f"1,1,{VOCAB}", "2", f"2,{D}", f"2,{C}"}
    experts = config.moe.num_experts // 2
    dims = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))
    assert f"{config.num_units},{experts},{D},{F}" in dims
    # No unit's experts, taken out of the stack.
    assert not {f"{one}{experts},{a},{b}" for one in ("", "1,") for a, b in [(D, F), (F, D)]} & dims


def test_an_engine_on_a_mesh_that_does_not_fit_is_refused():
    mesh = sharding.make_mesh(mesh_config(tensor=4), jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="num_kv_heads = 2: .* mesh.tensor = 4"):
        _engine()


@pytest.mark.parametrize(
    "prompts, new, field",
    [
        ([], 1, "prompts"),
        ([[1], []], 1, r"prompts\[1\]"),
        ([[1, VOCAB]], 1, r"prompts\[0\]"),
        ([[-1]], 1, r"prompts\[0\]"),
        ([[1]], 0, "max_new_tokens"),
        ([[1] * (LENGTH - 3)], 4, "max_new_tokens"),
    ],
)
def test_bad_requests_are_refused_by_the_call(prompts, new, field):
    with pytest.raises(UserError, match=f"^{field} = "):
        _engine().stream(prompts, GREEDY, max_new_tokens=new, key=jax.random.key(0))


@pytest.mark.parametrize(
    "options, field",
    [
        ({"max_length": 1}, "max_length"),
        ({"valid_vocab": VOCAB + 1}, "valid_vocab"),
        ({"valid_vocab": 0}, "valid_vocab"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
    ],
)
def test_bad_engines_are_refused(options, field):
    with pytest.raises(UserError, match=f"^{field} = "):
        _engine(**options)


def test_an_unresolved_vocabulary_is_refused():
    config = dataclasses.replace(CONFIG, vocab_size=0)
    with pytest.raises(UserError, match="^model.vocab_size = 0"):
        Engine(config, {}, lm.init_router(CONFIG), max_length=8)


def _broken(value):
    """The parameters with one wrong number."""
    params = jax.tree.map(np.array, _params())
    params["units"]["0_L"]["attention"]["query_DNH"][0, 3, 1, 2] = value
    return params


# Case D1
@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named_and_no_token_comes(value, sampling):
    options = dict(max_length=LENGTH, prefill_chunk=CHUNK, valid_vocab=VALID)
    engine = Engine(CONFIG, _broken(value), lm.init_router(CONFIG), **options)
    match = "generation: params/units/0_L/attention/query_DNH has values that are not finite"
    with pytest.raises(UserError, match=match):
        _generate(engine, sampling=sampling)


# Case D1
def test_finite_weights_whose_logits_overflow_are_no_token_either():
    params = jax.tree.map(lambda leaf: leaf, _params())
    params["final_norm"] = {"scale": params["final_norm"]["scale"] * 1e38}
    options = dict(max_length=LENGTH, prefill_chunk=CHUNK, valid_vocab=VALID)
    engine = Engine(CONFIG, params, lm.init_router(CONFIG), **options)
    with pytest.raises(UserError, match="logits of prompt 0 are not finite, though all weights"):
        _generate(engine)


# Case D11
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_float32_products_of_a_decode_step_are_not_rounded_on_a_tpu(dtype):
    attention = dataclasses.replace(CONFIG.attention, implementation="", output_gate=True)
    moe = dataclasses.replace(CONFIG.moe, implementation="")
    config = dataclasses.replace(CONFIG, compute_dtype=dtype, attention=attention, moe=moe)
    used = lm.abstract_params(config)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), used)

    def decode(params, cache, tokens_BT, start_B):
        model = lm.LightningLM(config)
        out = model.apply({"params": params}, tokens_BT, cache=cache, start_B=start_B)
        return out.logits(), out.cache

    ids = np.zeros((2, 1), np.int32)
    with jax.sharding.use_abstract_mesh(TPU):
        cache = lm.abstract_cache(config, 2, 256)
        program = jax.make_jaxpr(decode)(params, cache, ids, ids[:, 0])
    found = list(products(program.jaxpr))
    rounded = [str(name) for name, dtypes, exact in found if dtypes == {"float32"} and not exact]
    assert not rounded and len(found) > 20
    assert all(exact for *_, exact in found) == (dtype == "float32")
