"""The MoE layer: p per token, token axes, weights inside a stack, and eight devices like one."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import sharding
from lightning_jax.layers.common import Stacked
from lightning_jax.layers.moe import MoE
from tests.tiny import mesh_config, tiny_model

B, T, D = 8, 6, 16
ROUTED = {"gate_EDF", "up_EDF", "down_EFD", "gate_bias_EF", "up_bias_EF", "down_bias_ED"}
MESH = mesh_config(data=2, fsdp=4)


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


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_eight_devices_give_what_one_gives():
    module = layer()
    values, arguments = params(module), (*inputs(), jnp.linspace(0.1, 1.0, B * T).reshape(B, T))
    want, stacked_want = (run(module, values, *arguments) for run in (apply_and_grads, apply))
    mesh = sharding.make_mesh(MESH)
    with jax.set_mesh(mesh):
        x_BTD, mask_BT, bias_E, top_p_BT = arguments
        rows = jax.device_put((x_BTD, mask_BT, top_p_BT), sharding.batch_sharding(mesh))
        on_mesh = (*rows[:2], bias_E, rows[2])
        assert_close(jax.device_get(apply_and_grads(module, values, *on_mesh)), want)
        got = apply(module, stacked(values, jnp.int32(1)), *on_mesh)
        assert got[0].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
    assert_close(jax.device_get(got), stacked_want)


def test_router_logits_are_products_of_float32():
    module, (x_BTD, *rest) = layer(), inputs()
    forward = jax.make_jaxpr(lambda p, x: module.apply({"params": p}, x, *rest, 0.5))
    program = str(forward(params(module), x_BTD.astype(jnp.bfloat16)))
    # One product names the precision of its two operands.
    assert program.count("Precision.HIGHEST") == 2
