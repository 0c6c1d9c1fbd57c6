import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import narrow_scan

STEPS, B, D = 5, 3, 8


def step(constants, x_BD, given):
    """Keeps bfloat16 activations and weights; uses constants, and scales that are float32."""
    mask_BD, weight_DD, scale_D = *constants, *given
    hidden_BD = jnp.tanh(x_BD @ weight_DD.astype(x_BD.dtype)) * mask_BD.astype(x_BD.dtype)
    x_BD = (x_BD + hidden_BD * scale_D[None].astype(x_BD.dtype)).astype(x_BD.dtype)
    return x_BD, {"sum": hidden_BD.astype(jnp.float32).sum(), "none": None}


def arguments(dtype):
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(STEPS, D, D)) * 0.3, jnp.float32)
    scales = jnp.asarray(rng.normal(size=(STEPS, D)), jnp.float32)
    mask_BD = jnp.asarray(rng.random((B, D)) < 0.8)
    return (mask_BD,), jnp.asarray(rng.normal(size=(B, D)), dtype), (weights, scales)


def plain(step, constants, carry, xs):
    return jax.lax.scan(lambda carry, x: step(constants, carry, x), carry, xs)


def objective(scan, constants, x_BD, xs):
    x_BD, outputs = scan(step, constants, x_BD, xs)
    return (x_BD.astype(jnp.float32) ** 2).sum() + (outputs["sum"] * jnp.arange(STEPS)).sum()


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_a_plain_scan(dtype, remat):
    constants, x_BD, xs = arguments(dtype)

    def of(scan):
        inner = (lambda s, *rest: scan(jax.checkpoint(s), *rest)) if remat else scan
        both = jax.value_and_grad(objective, argnums=(2, 3))
        return jax.jit(lambda *a: both(inner, *a))(constants, x_BD, xs)

    jax.tree.map(np.testing.assert_array_equal, of(narrow_scan.scan), of(plain))


def test_no_stack_of_bfloat16_is_widened():
    constants, x_BD, xs = arguments("bfloat16")
    gradient = jax.grad(lambda *a: objective(narrow_scan.scan, *a), argnums=(1, 2))
    text = jax.jit(gradient).lower(constants, x_BD, xs).compile().as_text()
    assert f"u16[{STEPS},{B},{D}]" in text and f"f32[{STEPS},{B},{D}]" not in text
