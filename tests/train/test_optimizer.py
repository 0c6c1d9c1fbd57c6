"""The update rule: what is decayed, AdamW against optax.adamw, Muon matrix by matrix, clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from lightning_jax import model as lm
from lightning_jax.config import OptimizerConfig
from lightning_jax.train.optimizer import (
    decay_mask,
    make_optimizer,
    muon_dimensions,
    role,
    update_ema,
)
from tests.tiny import tiny_model

AXES = {
    "embed": ("vocab", "embed"),
    "norm": ("embed",),
    "unit": {
        "norm": ("layers", "embed"),
        "sinks": ("layers", "heads"),
        "query": ("layers", "embed", "heads", "head"),
        "out": ("layers", "heads", "head", "embed"),
        "router": ("layers", "embed", "router"),
        "up": ("layers", "expert", "embed", "mlp"),
    },
}
SIZES = {
    "vocab": 11,
    "embed": 6,
    "layers": 2,
    "heads": 2,
    "head": 4,
    "router": 3,
    "expert": 3,
    "mlp": 5,
}
ADAMW = OptimizerConfig(
    name="adamw",
    beta1=0.9,
    beta2=0.95,
    epsilon=1e-8,
    weight_decay=0.1,
    clip_norm=1e9,
    ema_decay=0.0,
    z_loss_weight=0.0,
    on_nan="stop",
)


def config(**changes):
    return OptimizerConfig(**{**vars(ADAMW), **changes})


def is_entry(leaf):
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda names: rng.normal(size=[SIZES[name] for name in names]).astype(np.float32),
        AXES,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def run(optimizer, params, grads, rates):
    """Applies one step of each learning rate in `rates`, each with its own gradient."""
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(optimizer.update)
    for grad, rate in zip(grads, rates, strict=True):
        direction, state = update(grad, state, params)
        params = jax.tree.map(lambda p, u, r=rate: p - r * np.asarray(u), params, direction)
    return params


def assert_close(actual, expected, rtol=1e-5):
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=rtol, atol=1e-6), actual, expected
    )


def test_decay_mask_counts_axes_without_layers():
    assert decay_mask(AXES) == {
        "embed": True,
        "norm": False,
        "unit": {
            "norm": False,
            "sinks": False,
            "query": True,
            "out": True,
            "router": True,
            "up": True,
        },
    }


def test_adamw_equals_optax_across_a_change_of_rate():
    params, grads = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    rates = jnp.array([0.01, 0.03, 0.002])
    reference = optax.adamw(
        lambda count: rates[count],
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        mask=decay_mask(AXES),
    )
    update = jax.jit(reference.update)
    state, expected = jax.jit(reference.init)(params), params
    for grad in grads:
        updates, state = update(grad, state, expected)
        expected = jax.tree.map(np.add, expected, updates)
    assert_close(run(make_optimizer(ADAMW, AXES), params, grads, np.asarray(rates)), expected)


def test_clip_bounds_the_global_norm():
    params, grad = random_tree(0), random_tree(1)
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(grad)))
    for size in (0.5, 100.0):
        scaled = jax.tree.map(lambda g, s=size: g * s / norm, grad)
        # A large epsilon makes Adam's direction depend on the size of the gradient.
        ours = make_optimizer(config(clip_norm=1.0, epsilon=0.3, weight_decay=0.0), AXES)
        expected = jax.tree.map(lambda g, s=size: g * min(1.0, 1.0 / s), scaled)
        expected = jax.tree.map(lambda p, g: p - g / (np.abs(g) + 0.3), params, expected)
        assert_close(run(ours, params, [scaled], [1.0]), expected)


def test_muon_of_a_stack_is_muon_of_each_matrix_and_the_rest_is_adamw():
    params, grads, rates = random_tree(0), [random_tree(seed) for seed in (1, 2)], (0.01, 0.02)
    stacked = run(make_optimizer(config(name="muon"), AXES), params, grads, rates)
    adamw = run(make_optimizer(ADAMW, AXES), params, grads, rates)
    matrices = {"query": ((1,), (6, 8)), "out": ((0,), (8, 6)), "up": ((1, 2), (6, 5))}

    def single(tree):
        return {
            name: tree["unit"][name][index].reshape(shape)
            for name, (index, shape) in matrices.items()
        }

    axes = {"query": ("embed", "mlp"), "out": ("mlp", "embed"), "up": ("embed", "mlp")}
    optimizer = make_optimizer(config(name="muon"), axes)
    expected = run(optimizer, single(params), [single(grad) for grad in grads], rates)
    assert_close(single(stacked), expected, rtol=1e-4)
    for tree in (stacked, adamw):
        for name in matrices:
            del tree["unit"][name]
    assert_close(stacked, adamw)


def test_muon_direction_is_nearly_orthogonal_with_the_rms_of_adamw():
    grad = {"w": random_tree(1)["unit"]["up"]}
    optimizer = make_optimizer(config(name="muon", weight_decay=0.0), {"w": AXES["unit"]["up"]})
    moved = run(optimizer, {"w": np.zeros_like(grad["w"])}, [grad], [1.0])["w"]
    direction = -moved / (0.2 * SIZES["embed"] ** 0.5)
    singular = np.linalg.svd(direction, compute_uv=False)
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert np.sum(direction * grad["w"]) > 0


# Case D9
def test_the_role_of_every_parameter_of_a_model_with_all_options():
    attention = dict(qkv_bias=True, out_bias=True, output_gate=True, sinks=True)
    options = {f"attention__{name}": value for name, value in attention.items()}
    options |= dict(moe__router_bias=True, moe__expert_bias=True, moe__num_shared_experts=1)
    options |= dict(unit="LGg", unit_mlp="EDE", prefix="G", tie_embeddings=False)
    roles = {}
    for norm in ("head", "projection"):
        axes = lm.logical_axes(tiny_model(**options, attention__qk_norm=norm))
        leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda a: isinstance(a, tuple))
        for path, names in leaves:
            *_, module, name = (key.key for key in path)
            roles.setdefault(role(names), set()).add(f"{module}/{name}")
        muon = muon_dimensions(axes)
        assert jax.tree.structure(decay_mask(axes)).num_leaves == len(leaves)
        assert sum(entry is not None for entry in jax.tree.leaves(muon, is_leaf=is_entry)) > 20
    norms = ("attention_norm", "mlp_norm", "query_norm", "key_norm", "final_norm")
    biases = ("query_bias_NH", "key_bias_KH", "value_bias_KH", "out_bias_D", "sinks_N")
    mlp = ("gate_DF", "up_DF", "down_FD")
    assert roles == {
        "table": {"embed/table_VD", "head/kernel_DV", "moe/router_DE"},
        "vector": {f"{name}/scale" for name in norms}
        | {f"attention/{name}" for name in biases}
        | {
            f"moe/{name}"
            for name in ("router_bias_E", "gate_bias_EF", "up_bias_EF", "down_bias_ED")
        },
        "matrix": {f"attention/{name}" for name in ("query_DNH", "key_DKH", "value_DKH", "out_NHD")}
        | {"attention/gate_DN", "moe/gate_EDF", "moe/up_EDF", "moe/down_EFD"}
        | {f"{module}/{name}" for module in ("mlp", "shared") for name in mlp},
    }


# Case D9
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_biases_are_updated_by_adam_and_not_decayed(name):
    axes = {
        "query": ("layers", "embed", "heads", "head"),
        "query_bias": ("layers", "heads", "head"),
        "up_bias": ("layers", "expert", "mlp"),
        "down_bias": ("layers", "expert", "embed"),
    }
    ones = jax.tree.map(
        lambda names: np.ones([SIZES[name] for name in names], np.float32),
        axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )
    still = jax.tree.map(np.zeros_like, ones)
    moved = run(make_optimizer(config(name=name, weight_decay=0.5), axes), ones, [still], [1.0])
    np.testing.assert_allclose(moved.pop("query"), 0.5)
    for leaf in moved.values():
        np.testing.assert_allclose(leaf, 1.0)


def test_muon_refuses_axes_that_hide_the_sides_of_a_matrix():
    with pytest.raises(ValueError, match=r"axes \('mlp', 'heads'\): a matrix needs 'embed'"):
        muon_dimensions({"w": ("mlp", "heads")})


def test_ema_is_the_weighted_sum():
    ema, params = random_tree(0), random_tree(1)
    for updates, share in ((0, 0.9), (8, 0.5), (26, 0.25), (27, 0.25), (10**6, 0.25)):
        expected = jax.tree.map(lambda e, p, s=share: (1 - s) * e + s * p, ema, params)
        assert_close(update_ema(ema, params, 0.75, jnp.int32(updates)), expected)


# Case D7
@pytest.mark.parametrize("steps", [30, 300, 30_000])
def test_the_average_forgets_the_start_of_short_and_long_runs(steps):
    def step(carry, updates):
        start, age = carry
        # What is left of the initial parameters, and the mean number of updates since the others.
        return (
            update_ema(start, 0.0, 0.999, updates),
            update_ema(age, 0.0, 0.999, updates) + 1,
        ), None

    (start, age), _ = jax.lax.scan(step, (jnp.float32(1), jnp.float32(0)), jnp.arange(steps))
    assert float(start) < 1e-5
    assert float(age) == pytest.approx(min(steps / 10, 1000), rel=0.35)
