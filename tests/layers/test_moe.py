"""The MoE layer: p per token, token axes, weights inside a stack, and eight devices like one."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.layers.common import Stacked
from lightning_jax.layers.moe import MoE
from tests.targets import TPU
from tests.tiny import mesh_config, tiny_model

B, T, D = 8, 6, 16
ROUTED = {"gate_EDF", "up_EDF", "down_EFD", "gate_bias_EF", "up_bias_EF", "down_bias_ED"}
P_OF_TOKENS = jnp.linspace(0.1, 1.0, B * T).reshape(B, T)
# A mesh, and changes of the layer that only matter there.
MESHES = {
    "fsdp": (dict(data=2, fsdp=4), {}),
    "all_to_all": (dict(data=2, expert=4), dict(transport="all_to_all", exchange_rows=0.5)),
    "all_gather": (dict(expert=8), dict(transport="all_gather")),
    "tensor": (dict(data=2, expert=2, tensor=2), dict(transport="all_to_all")),
    "tensor alone": (dict(data=4, tensor=2), {}),
}


TPUS = AbstractMesh((4,), ("expert",), abstract_device=TPU.abstract_device)


@functools.cache
def layer(**changes):
    changes = dict(expert_bias=True, router_bias=True, num_shared_experts=1) | changes
    config = dataclasses.replace(tiny_model().moe, top_p=0.5, target_experts=0.0, **changes)
    return MoE(config, num_layers=2, train=True)


def inputs(seed=0):
    rng = np.random.default_rng(seed)
    x_BTD = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    mask_BT = jnp.asarray(rng.random((B, T)) < 0.8)
    return x_BTD, mask_BT, 0.1 * jnp.arange(layer().config.num_experts, dtype=jnp.float32)


def params(module, seed=0):
    """Random values for every parameter, biases too."""
    x_BTD, mask_BT, _ = inputs()
    bias_E = jnp.zeros(module.config.num_experts)
    variables = jax.eval_shape(module.init, jax.random.key(0), x_BTD, mask_BT, bias_E, 0.5)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.3, jnp.float32),
        nn.meta.unbox(variables["params"]),
    )


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, x_BTD, mask_BT, bias_E, top_p):
    return module.apply({"params": params}, x_BTD, mask_BT, bias_E, top_p)


@functools.partial(jax.jit, static_argnums=0)
def apply_and_grads(module, params, x_BTD, *rest):
    def loss(params, x_BTD):
        out_BTD, stats = module.apply({"params": params}, x_BTD, *rest)
        return jnp.sum(jnp.sin(out_BTD)) + stats.z_sum + stats.entropy_sum, (out_BTD, stats)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x_BTD)


def assert_close(got, want, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want
    )


@pytest.mark.slow
def test_p_of_each_token_is_its_own():
    module, arguments = layer(), inputs()
    values = params(module)
    top_p_BT = jnp.where(jnp.arange(B)[:, None] % 2 == 0, 0.2, 0.9) * jnp.ones((1, T))
    out_BTD, stats = apply(module, values, *arguments, top_p_BT)
    few, many = (apply(module, values, *arguments, jnp.float32(p)) for p in (0.2, 0.9))
    np.testing.assert_allclose(out_BTD[::2], few[0][::2], atol=1e-5)
    np.testing.assert_allclose(out_BTD[1::2], many[0][1::2], atol=1e-5)
    used = [float(s.assigned_count_E.sum()) for s in (few[1], stats, many[1])]
    assert used[0] < used[1] < used[2]
    assert_close(apply(module, values, *arguments, jnp.full((B, T), 0.9)), many)


def test_token_axes_need_not_be_flattened():
    module, (x_BTD, mask_BT, bias_E) = layer(), inputs()
    values = params(module)
    top_p_BT = jnp.linspace(0.1, 1.0, B * T).reshape(B, T)
    grads, (out_BTD, stats) = apply_and_grads(module, values, x_BTD, mask_BT, bias_E, top_p_BT)
    flat = [a.reshape(1, B * T, *a.shape[2:]) for a in (x_BTD, mask_BT, top_p_BT)]
    flat_grads, (flat_out, flat_stats) = apply_and_grads(module, values, *flat[:2], bias_E, flat[2])
    assert_close(flat_out.reshape(out_BTD.shape), out_BTD)
    assert_close(flat_stats, stats)
    assert_close(flat_grads[0], grads[0])
    assert_close(flat_grads[1].reshape(out_BTD.shape), grads[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_experts=1, max_experts=1, top_k=1, num_groups=1, num_partitions=1),
        dict(max_experts=1, top_k=1),
        dict(max_experts=8),
        dict(train_routing="dense"),
    ],
    ids=["one_expert", "one_choice", "all_choices", "dense"],
)
def test_padding_gets_the_shared_expert_alone(changes):
    module, (x_BTD, mask_BT, _) = layer(**changes), inputs()
    values, bias_E = params(module), jnp.zeros(module.config.num_experts)
    without = jax.tree.map(jnp.zeros_like, {k: v for k, v in values.items() if k in ROUTED})
    shared_BTD, _ = apply(module, {**values, **without}, x_BTD, mask_BT, bias_E, 0.7)
    for real_BT in (mask_BT, jnp.zeros_like(mask_BT)):
        grads, (out_BTD, stats) = apply_and_grads(module, values, x_BTD, real_BT, bias_E, 0.7)
        assert stats.tokens == real_BT.sum()
        np.testing.assert_array_equal(out_BTD[~real_BT], shared_BTD[~real_BT])
        for name in ROUTED | {"router_DE"}:
            assert bool(jnp.all(jnp.isfinite(grads[0][name])))
            if not real_BT.any():
                np.testing.assert_array_equal(grads[0][name], 0.0)
    assert np.abs(shared_BTD).max() > 0


def stacked(values, unit):
    """The same parameters, those of experts as the last but one of three units of a stack."""
    return {
        name: Stacked(jnp.stack([jnp.full_like(a, jnp.nan), a, 3 * a]), unit)
        if name in ROUTED
        else a
        for name, a in values.items()
    }


@pytest.mark.parametrize("implementation", ["blocked", "ragged_dot"])
@pytest.mark.parametrize("biases", [True, False])
def test_stacked_experts_give_what_their_unit_gives(implementation, biases):
    module = layer(implementation=implementation, expert_bias=biases)
    values, arguments = params(module), (*inputs(), jnp.float32(0.7))
    want = apply(module, values, *arguments)
    assert_close(apply(module, stacked(values, jnp.int32(1)), *arguments), want, 1e-6)


@functools.cache
def one_device(**changes):
    """Gradients and output of training; output with stacked weights."""
    module = layer(**changes)
    values = params(module)
    return [run(module, values, *inputs(), P_OF_TOKENS) for run in (apply_and_grads, apply)]


def on_mesh(sizes, **changes):
    """The same on eight devices."""
    module, (x_BTD, mask_BT, bias_E) = layer(**changes), inputs()
    values, mesh = params(module), sharding.make_mesh(mesh_config(**sizes))
    with jax.set_mesh(mesh):
        x_BTD, mask_BT, top_p_BT = jax.device_put(
            (x_BTD, mask_BT, P_OF_TOKENS), sharding.batch_sharding(mesh)
        )
        arguments = x_BTD, mask_BT, bias_E, top_p_BT
        got = apply_and_grads(module, values, *arguments)
        assert got[1][0].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
        in_stack = apply(module, stacked(values, jnp.int32(1)), *arguments)
        return jax.device_get((got, in_stack))


def split_exchange(output):
    """(output without the statistics of the exchange, these)."""
    out_BTD, stats = output
    return (out_BTD, dataclasses.replace(stats, exchange=None)), stats.exchange


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_what_one_gives(name):
    sizes, changes = MESHES[name]
    want, got = one_device(), on_mesh(sizes, **changes)
    for (grads, output), (want_grads, want_output) in [
        (got[0], want[0]),
        ((None, got[1]), (None, want[1])),
    ]:
        assert_close(grads, want_grads)
        output, exchange = split_exchange(output)
        want_output, alone = split_exchange(want_output)
        assert_close(output, want_output)
        assert exchange.sent_P.shape == (sizes.get("expert", 1),) and alone.rounds == 0
        assert exchange.sent_P.sum() == alone.sent_P.sum() == output[1].assigned_count_E.sum()
        assert exchange.sent_P.sum() + exchange.empty == B * T * layer().config.max_experts
        exchanges = 8 // sizes.get("tensor", 1) if "expert" in sizes else 0
        assert exchange.passes == exchanges <= exchange.rounds


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("name", ["fsdp", "all_to_all", "all_gather"])
def test_a_capacity_drops_the_same_tokens_on_every_mesh(name):
    sizes, changes = MESHES[name]
    [(want_grads, want), _] = one_device(capacity_factor=0.5)
    [(grads, got), _] = on_mesh(sizes, capacity_factor=0.5, **changes)
    assert_close(grads, want_grads)
    (got, exchange), (want, alone) = split_exchange(got), split_exchange(want)
    assert_close(got, want)
    assert exchange.dropped == alone.dropped > 0
    # A row has 6 tokens of 4 slots, for 8 experts: at most 2 for each expert.
    demand = want[1].assigned_count_E.sum()
    assert exchange.sent_P.sum() + exchange.dropped == demand
    assert exchange.sent_P.sum() + exchange.empty + exchange.dropped == B * T * 4
    assert exchange.sent_P.max() <= 2 * B * 8 / len(exchange.sent_P)


@pytest.mark.slow
def test_evaluation_drops_nothing():
    free, limited = layer(), layer(capacity_factor=0.01)
    values, arguments = params(free), (*inputs(), P_OF_TOKENS)
    want = apply(free.clone(train=False), values, *arguments)
    assert_close(apply(limited.clone(train=False), values, *arguments), want, 0)
    assert apply(limited, values, *arguments)[1].exchange.dropped > 0


@pytest.mark.slow
def test_a_token_keeps_to_its_groups():
    """Both of a token's choices are in one of four groups of two experts."""
    changes = dict(num_groups=4, num_partitions=1, max_experts=2, eval_routing="top_p")
    module = layer(max_groups=1, **changes)
    _, stats = apply(module, params(module), *inputs(), 1.0)
    assert stats.assigned_count_E.sum() == 2 * stats.tokens == 2 * stats.group_member_count_J.sum()
    _, free = apply(layer(**changes), params(module), *inputs(), 1.0)
    assert free.group_member_count_J.sum() > stats.tokens


def test_units_with_a_ragged_exchange_can_be_declared():
    model = tiny_model(unit="L", num_units=2, moe__transport="ragged_all_to_all")
    with jax.sharding.use_abstract_mesh(TPUS):
        found = lm.abstract_params(model)
    like = lm.abstract_params(tiny_model(unit="L", num_units=2))
    assert jax.tree.map(lambda a: a.shape, found) == jax.tree.map(lambda a: a.shape, like)


def test_router_logits_are_products_of_float32():
    module, (x_BTD, *rest) = layer(), inputs()
    forward = jax.make_jaxpr(lambda p, x: module.apply({"params": p}, x, *rest, 0.5))
    program = str(forward(params(module), x_BTD.astype(jnp.bfloat16)))
    # One product names the precision of its two operands.
    assert program.count("Precision.HIGHEST") == 2
