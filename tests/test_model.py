"""The whole model: causality, document isolation, scan, sharing, options, predecessors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config.errors import UserError
from lightning_jax.layers.block import Unit
from tests.tiny import random_batch, tiny_model

PATTERNS = ["G", "L", "LLLG", "Gg", "LlG", "LLLGLLLg"]


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params, batch, **kwargs):
    output = lm.LightningLM(config, train=True).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids, **kwargs
    )
    return output._replace(head_DV=output.logits())  # Logits are what the tests look at.


def make(seed=0, **changes):
    config = tiny_model(**changes)
    params = jax.jit(lambda key: lm.init_params(config, key))(jax.random.key(seed))
    return config, params


@pytest.mark.parametrize("unit", ["LGg", pytest.param("LLLGLLLg", marks=pytest.mark.slow)])
def test_no_gradient_from_the_future_or_another_document(unit):
    """d hidden[t] / d embedding[s] is exactly zero unless s is visible through some layer."""
    config, params = make(unit=unit, tie_embeddings=False)
    time, tokens_BT = 24, jnp.arange(24)[None, :]
    segment_ids_BT = jnp.asarray([[1] * 9 + [2] * 12 + [0] * 3])
    positions_BT = jnp.asarray([[*range(9), *range(12), 0, 0, 0]])

    def hidden(table_VD):
        replaced = {**params, "embed": {"table_VD": table_VD}}
        output = lm.LightningLM(config).apply(
            {"params": replaced}, tokens_BT, positions_BT, segment_ids_BT
        )
        return output.hidden_BTD[0].sum(axis=-1)

    # Every token id is used once, so a row of the table is a position.
    jacobian = jax.jit(jax.jacrev(hidden))(params["embed"]["table_VD"])
    influence_TS = np.abs(jacobian[:, :time]).sum(axis=-1)
    query, key = np.arange(time)[:, None], np.arange(time)[None, :]
    segment = np.asarray(segment_ids_BT[0])
    allowed = (query >= key) & (segment[:, None] == segment[None, :])
    allowed = np.where(segment[:, None] == 0, query == key, allowed)
    assert (influence_TS[~allowed] == 0).all()
    within = allowed & (segment[:, None] > 0)
    assert (influence_TS[within] > 0).all()


def test_window_bounds_the_reach_of_local_layers():
    config, params = make(unit="L", num_units=1, tie_embeddings=False)
    window = config.attention.window
    tokens_BT = jnp.arange(3 * window)[None, :]

    def last(table_VD):
        replaced = {**params, "embed": {"table_VD": table_VD}}
        return lm.LightningLM(config).apply({"params": replaced}, tokens_BT).hidden_BTD[0, -1].sum()

    gradient = jax.jit(jax.grad(last))(params["embed"]["table_VD"])
    influence_T = np.abs(gradient[: 3 * window]).sum(axis=-1)
    assert (influence_T[:-window] == 0).all() and (influence_T[-window:] > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_equals_unrolled_and_a_plain_loop(remat):
    config, params = make(unit="LGg", num_units=3, remat=remat)
    batch = random_batch(2, 20, 64)

    def loss(config, params):
        output = apply(config, params, batch)
        return (output.hidden_BTD**2).sum() + output.stats.prob_sum_E.std(), output.hidden_BTD

    scanned = jax.jit(jax.value_and_grad(lambda p: loss(config, p), has_aux=True))(params)
    unrolled_config = dataclasses.replace(config, scan=False)
    unrolled = jax.jit(jax.value_and_grad(lambda p: loss(unrolled_config, p), has_aux=True))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), scanned, unrolled
    )

    single = dataclasses.replace(config, num_units=1)
    x_BTD = params["embed"]["table_VD"][batch.tokens]
    router = lm.init_router(config)
    base, start_B = config.attention.rope_base_global, jnp.zeros(2, jnp.int32)
    kinds = lm.kind_contexts(config, start_B, batch.positions, batch.segment_ids, base, None)
    context = lm.Context(kinds, batch.segment_ids != 0, router.top_p)
    # Layers scale their output at initialisation only, so a unit of one equals one of three.
    unit = Unit(single, config.unit_layers, True)
    run = jax.jit(lambda p, x, b: unit.apply({"params": p}, x, b, {}, context, jnp.int32(0))[0])
    for index in range(3):
        mine = jax.tree.map(lambda a, i=index: a[i], params["units"])
        x_BTD = run(mine, x_BTD, router.bias_URE[index])
    x_BTD = x_BTD * jax.lax.rsqrt((x_BTD**2).mean(-1, keepdims=True) + config.norm_eps)
    np.testing.assert_allclose(x_BTD, scanned[0][1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("unit", PATTERNS)
def test_borrowers_own_nothing(unit):
    config = tiny_model(unit=unit, num_units=1)
    params = lm.abstract_params(config)
    for spec in config.unit_layers:
        names = set(params["units"][spec.key]["attention"])
        own = {"key_DKH", "value_DKH", "key_norm"}
        assert names & own == (own if spec.owns_kv else set())


@pytest.mark.parametrize("unit", ["Gg", pytest.param("LLLGLLLg", marks=pytest.mark.slow)])
def test_borrowers_teach_their_owner(unit):
    config, params = make(unit=unit, num_units=1)
    batch, borrower = random_batch(2, 20, 64), config.unit_layers[-1]

    def through_borrower_alone(params):
        # Silence the owner's own attention output: what reaches its keys comes by the borrower.
        owner = params["units"][borrower.owner]["attention"]
        owner = {**owner, "out_NHD": jax.lax.stop_gradient(owner["out_NHD"] * 0)}
        layer = {**params["units"][borrower.owner], "attention": owner}
        units = {**params["units"], borrower.owner: layer}
        return (apply(config, {**params, "units": units}, batch).hidden_BTD ** 2).sum()

    grad = jax.jit(jax.grad(through_borrower_alone))(params)["units"][borrower.owner]["attention"]
    assert np.abs(grad["key_DKH"]).max() > 0 and np.abs(grad["value_DKH"]).max() > 0


@pytest.mark.slow
def test_p_of_one_equals_dense_routing():
    config, params = make()
    experts = config.moe.num_experts
    batch = random_batch(2, 20, 64)
    router = dataclasses.replace(lm.init_router(config), top_p=jnp.float32(1.0))
    outputs = []
    for change in (dict(train_routing="top_p", max_experts=experts), dict(train_routing="dense")):
        moe = dataclasses.replace(config.moe, target_experts=0.0, **change)
        changed = dataclasses.replace(config, moe=moe)
        outputs.append(apply(changed, params, batch, router=router))
    np.testing.assert_allclose(outputs[0].hidden_BTD, outputs[1].hidden_BTD, atol=1e-5)
    per_token = outputs[0].stats.assigned_count_E.sum(-1) / outputs[0].stats.tokens
    np.testing.assert_allclose(per_token, experts)


def test_statistics_count_real_tokens_only():
    config, params = make(unit="LG", num_units=2)
    batch = random_batch(3, 24, 64)
    stats = apply(config, params, batch).stats
    real = (batch.segment_ids > 0).sum()
    assert stats.tokens.shape == (2, 2)
    np.testing.assert_array_equal(stats.tokens, real)
    np.testing.assert_array_equal(stats.experts_histogram.sum(-1), real)
    np.testing.assert_allclose(stats.prob_sum_E.sum(-1), real, rtol=1e-5)


def _same_shape(known, leaf):
    if known is not None and known.shape == leaf.shape:
        return known
    # Not all equal: a softmax would not see that in a bias of its logits.
    return 1 + jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) / leaf.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(attention__sinks=True),
        dict(attention__output_gate=True),
        dict(attention__global_rope=False),
        dict(attention__qk_norm="none"),
        dict(attention__qk_norm="projection"),
        dict(attention__qkv_bias=True),
        dict(attention__out_bias=True),
        dict(attention__rope_scaling__kind="linear", attention__rope_scaling__factor=4.0),
        dict(attention__rope_scaling__kind="llama3", attention__rope_scaling__factor=4.0),
        dict(attention__rope_scaling__kind="yarn", attention__rope_scaling__factor=4.0),
        dict(unit_mlp="DE"),
        dict(moe__router_score="sigmoid"),
        dict(moe__router_bias=True),
        dict(moe__expert_bias=True),
        dict(moe__clamp=0.1),
        dict(moe__num_shared_experts=0),
        dict(moe__routed_scale=2.5),
        dict(moe__renormalize_gates=True),
        dict(attention__window=3),
        dict(attention__rope_base_local=100.0),
        dict(norm_eps=0.1),
    ],
)
def test_every_option_changes_the_output(changes):
    """An option that nothing reads would leave the output as it is."""
    params, plain_BTD = _without_options()
    config = tiny_model(unit="LG", num_units=1, **changes)
    # Parameters that both have are the same; new ones are set to something that acts.
    known = dict(jax.tree_util.tree_leaves_with_path(params))
    changed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _same_shape(known.get(path), leaf), lm.abstract_params(config)
    )
    assert float(jnp.abs(plain_BTD - _hidden(config, changed)).max()) > 1e-3


@functools.cache
def _without_options():
    config, params = make(unit="LG", num_units=1)
    return params, _hidden(config, params)


def _hidden(config, params):
    batch = random_batch(2, 24, 64)
    return jax.jit(lambda params: apply(config, params, batch).hidden_BTD)(params)


@pytest.mark.slow
def test_rope_base_of_global_layers_is_an_argument():
    config, params = make(unit="LG", num_units=1)
    batch = random_batch(2, 24, 64)
    base = config.attention.rope_base_global
    one, same, other = (
        apply(config, params, batch, rope_base_global=value).hidden_BTD
        for value in (None, base, 50 * base)
    )
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 1e-3


@pytest.mark.slow
def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    config, params = make(unit="LG", num_units=1)
    batch = random_batch(2, 24, 64)
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    output = apply(half, params, batch)
    assert output.hidden_BTD.dtype == jnp.bfloat16 and output.head_DV.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(lm.abstract_params(half))} == {
        jnp.dtype("float32")
    }
    error = jnp.abs(output.hidden_BTD - apply(config, params, batch).hidden_BTD)
    assert float(error.mean()) < 0.05


def test_logical_axes_name_every_axis_once():
    config, params = make(unit="LGg", prefix="G")
    axes = lm.logical_axes(config)
    jax.tree.map(
        lambda names, leaf: np.testing.assert_equal(len(names), leaf.ndim),
        axes,
        params,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    assert axes["units"]["0_L"]["moe"]["gate_EDF"] == ("layers", "expert", "embed", "mlp")
    assert axes["prefix"]["0_G"]["mlp"]["down_FD"] == ("mlp", "embed")


# Case D1
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, lambda a: jnp.asarray(a, "bfloat16")])
@pytest.mark.parametrize("on_host", [True, False])
def test_a_value_that_is_not_finite_is_found_by_the_name_of_its_array(
    value, kind, on_host, monkeypatch
):
    monkeypatch.setattr(lm, "_on_host", lambda leaf: on_host)
    lm.require_finite({}, "file")
    good = {"a": {"b": kind(np.ones((2, 3), np.float32))}, "c": [kind(np.zeros(0, np.float32))]}
    lm.require_finite(good, "file")
    bad = np.ones((4, 5), np.float32)
    bad[3, 4] = value
    with pytest.raises(UserError, match="^file: c/1 has values that are not finite$"):
        lm.require_finite({**good, "c": [*good["c"], kind(bad)]}, "file")
