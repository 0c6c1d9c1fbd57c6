"""The train step is a function of the global batch: splits, remat and scan change nothing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
from lightning_jax.ops import balance
from lightning_jax.train import step
from lightning_jax.train.optimizer import make_optimizer
from lightning_jax.train.plan import Plan
from tests.targets import TPU, products
from tests.tiny import random_batch, tiny_config

VOCAB = 64
HEAVY = dict(
    model__vocab_size=VOCAB,
    model__moe__switch_weight=0.1,
    model__moe__group_weight=0.1,
    model__moe__partition_weight=0.1,
    model__moe__true_group_weight=0.1,
    model__moe__z_weight=0.1,
    model__moe__entropy_weight=0.1,
)


def setup(**changes):
    config = build(RunConfig, tiny_config(**{**HEAVY, **changes}))
    params = lm.init_params(config.model, jax.random.key(1))
    # Peaked routers, so that experts are used unevenly.
    params = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 8 if "router" in jax.tree_util.keystr(path) else p, params
    )
    batch = jax.tree.map(jnp.asarray, random_batch(8, 24, VOCAB))
    return config, params, lm.init_router(config.model), batch


def value_and_grad(config, params, router, batch, accumulate):
    compute = functools.partial(step.loss_and_grad, config, accumulate=accumulate)
    return jax.jit(compute)(params, router, batch, Plan.of(config).knobs(0))


def assert_same(one, other, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), one, other
    )


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_changes_no_value_and_no_gradient(accumulate):
    config, params, router, batch = setup()
    whole = value_and_grad(config, params, router, batch, 1)
    assert_same(value_and_grad(config, params, router, batch, accumulate), whole)


@pytest.mark.slow
def test_balance_losses_act_and_need_the_counts_of_the_whole_batch():
    config, params, router, batch = setup()
    whole = value_and_grad(config, params, router, batch, 1)
    # The test above has teeth: with each micro-batch's own counts the gradient is another one.
    parts = [jax.tree.map(lambda a, i=i: a[i::2], batch) for i in range(2)]
    own = [
        jax.jit(
            jax.grad(
                lambda p, b: step.forward_loss(
                    config,
                    p,
                    router,
                    b,
                    Plan.of(config).knobs(0),
                    total_weight=batch.loss_mask.sum(),
                    counts=None,
                )[0]
            )
        )(params, part)
        for part in parts
    ]
    summed = jax.tree.map(jnp.add, *own)
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), summed, whole[2])
    assert max(jax.tree.leaves(difference)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(model__remat="full"), dict(model__remat="dots_saveable")])
def test_remat_changes_nothing(change):
    _, params, router, batch = setup()
    expected = value_and_grad(setup()[0], params, router, batch, 1)
    assert_same(value_and_grad(setup(**change)[0], params, router, batch, 1), expected)


@pytest.mark.slow
def test_zero_weights_are_no_balance_loss_and_nonzero_ones_move_the_router():
    zero = {key: 0.0 for key in HEAVY if key.endswith("_weight")}
    config, params, router, batch = setup(**zero, optimizer__z_loss_weight=0.0)
    value, sums, plain = value_and_grad(config, params, router, batch, 1)
    np.testing.assert_allclose(value, sums["nll"], rtol=1e-6)
    _, _, balanced = value_and_grad(setup()[0], params, router, batch, 1)
    routers = [
        path
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain)
        if "router" in jax.tree_util.keystr(path)
    ]
    assert len(routers) == 2
    for path in routers:
        get = lambda tree: dict(jax.tree_util.tree_leaves_with_path(tree))[path]  # noqa: B023, E731
        assert float(jnp.abs(get(plain) - get(balanced)).max()) > 1e-4


EVERY_OPTION = dict(
    model__prefix="G",
    model__attention__head_dim=128,
    model__attention__window=128,
    model__attention__output_gate=True,
    model__attention__qkv_bias=True,
    model__attention__sinks=True,
    model__moe__router_bias=True,
    model__moe__expert_bias=True,
)


# Case D11
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "implementation", ["reference", pytest.param("pallas_tpu", marks=pytest.mark.slow)]
)
def test_float32_products_of_a_step_are_not_rounded_on_a_tpu(dtype, implementation):
    changes = {"model__attention__implementation": implementation, **EVERY_OPTION}
    config = build(RunConfig, tiny_config(**HEAVY, **changes, model__compute_dtype=dtype))
    optimizer = make_optimizer(config.optimizer, lm.logical_axes(config.model))
    train = functools.partial(step.train_step, config, optimizer, accumulate=1)
    batch = jax.tree.map(jnp.asarray, random_batch(2, 256, VOCAB))
    with jax.sharding.use_abstract_mesh(TPU):
        state = jax.eval_shape(lambda: step.init_state(config, optimizer, config.seed))
        program = jax.make_jaxpr(train)(state, batch, Plan.of(config).knobs(0))
    found = list(products(program.jaxpr))
    rounded = [str(name) for name, dtypes, exact in found if dtypes == {"float32"} and not exact]
    assert not rounded
    # Router and head gate are float32 whatever the model computes in: forward and two gradients.
    exact = sum(exact for *_, exact in found)
    assert exact >= 3 * (2 + 3) and (exact == len(found)) == (dtype == "float32")


# Case A8
@pytest.mark.parametrize("target", [2.0, 0.0])
def test_the_routers_p_goes_on_from_where_it_is(target):
    """The config's top_p is that of a new router; one that came from elsewhere has its own."""
    config = build(RunConfig, tiny_config(model__moe__target_experts=target))
    moe = config.model.moe
    router = dataclasses.replace(lm.init_router(config.model), top_p=jnp.float32(0.25))
    counts = jnp.full((1, 2, moe.num_experts), 100.0)
    stats = dataclasses.replace(no_stats(), assigned_count_E=counts, tokens=jnp.full((1, 2), 400.0))
    # At the target nothing moves p, and off it a step moves it from there.
    after, error = step._update_router(moe, router, jnp.float32(0), stats)
    np.testing.assert_allclose(after.top_p, 0.25, rtol=1e-6)
    off = dataclasses.replace(stats, tokens=jnp.full((1, 2), 800.0))
    after, error = step._update_router(moe, router, jnp.float32(0), off)
    if target:
        assert 0.25 < float(after.top_p) < 0.35 and float(error) == pytest.approx(math.log(2))
    else:
        assert float(after.top_p) == 0.25 and float(error) == 0


def no_stats():
    return balance.RoutingStats(**{f.name: None for f in dataclasses.fields(balance.RoutingStats)})


def make_step(config):
    optimizer = make_optimizer(config.optimizer, lm.logical_axes(config.model))
    state = step.init_state(config, optimizer, config.seed)
    stage = dataclasses.replace(
        config.stages[0], batch_size=8, seq_len=24, warmup_tokens=0, learning_rate=0.01
    )
    knobs = Plan.of(dataclasses.replace(config, stages=(stage,))).knobs(0)
    run = jax.jit(functools.partial(step.train_step, config, optimizer, accumulate=1))
    return state, functools.partial(run, knobs=knobs)


@pytest.mark.slow
def test_a_step_lowers_the_loss_and_moves_bias_and_controller_once():
    config, _, _, batch = setup(
        model__moe__switch_weight=0.0,
        model__moe__group_weight=0.0,
        model__moe__partition_weight=0.0,
        model__moe__true_group_weight=0.0,
        model__moe__z_weight=0.0,
        model__moe__entropy_weight=0.0,
        optimizer__ema_decay=0.5,
    )
    state, run = make_step(config)
    losses = []
    for _ in range(20):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.5 * losses[0]
    assert int(state.step) == 20 and int(state.bad_steps) == 0
    bias_URE = np.asarray(state.router.bias_URE)
    np.testing.assert_allclose(bias_URE.mean(axis=-1), 0, atol=1e-6)
    assert 0 < np.abs(bias_URE).max() <= 20 * 2 * config.model.moe.bias_update_rate
    assert float(state.router.top_p) != config.model.moe.top_p
    moved = jax.tree.map(lambda e, p: float(jnp.abs(e - p).max()), state.ema, state.params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_nothing(on_nan):
    config, _, _, batch = setup(optimizer__on_nan=on_nan)
    state, run = make_step(config)
    state, _ = run(state, batch)
    bad = batch._replace(loss_mask=batch.loss_mask * jnp.nan)
    after, metrics = run(state, bad)
    assert int(metrics["bad_steps"]) == 1 and int(after.step) == 2
    for before, now in zip(
        jax.tree.leaves((state.params, state.optimizer, state.router)),
        jax.tree.leaves((after.params, after.optimizer, after.router)),
        strict=True,
    ):
        np.testing.assert_array_equal(before, now)
    later, _ = run(after, batch)
    changed = max(
        float(jnp.abs(a - b).max())
        for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(later.params), strict=True)
    )
    assert (changed == 0) == (on_nan == "stop")


@pytest.mark.slow
def test_balance_value_of_uniform_routing_is_its_weight():
    config, params, router, batch = setup(
        model__moe__train_routing="dense", model__moe__target_experts=0.0
    )
    flat = jax.tree_util.tree_map_with_path(
        lambda path, p: p * 0 if "router" in jax.tree_util.keystr(path) else p, params
    )
    model = lm.LightningLM(config.model, train=True)
    out = jax.jit(lambda p: model.apply({"params": p}, batch.tokens, router=router))(flat)
    losses = jax.vmap(jax.vmap(balance.balance_losses))(out.stats)
    np.testing.assert_allclose(losses["true_group"], 1, rtol=1e-5)
