"""Cases of grouped matmuls, common to the kernels of all devices, and how they are checked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax.ops.experts import grouped_mlp as experts_mlp
from tests.ops.expert_oracle import COTANGENT as DY
from tests.ops.expert_oracle import M, oracle, tokens, weights
from tests.ops.expert_oracle import expert_biases as biases_of

E = 8
# Tiles of the tests have 16 rows, S is 37: groups that cross tiles, end on them, or are empty.
SIZES = {
    "random": (5, 0, 9, 1, 0, 12, 3, 0),
    "ends on tiles": (16, 0, 16, 0, 0, 0, 0, 5),
    "one over": (15, 2, 14, 1, 0, 0, 5, 0),
    "all in one": (0, 0, 0, M, 0, 0, 0, 0),
    "first and last": (30, 0, 0, 0, 0, 0, 0, 1),
    "no row": (0,) * E,
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def output_and_grads(grouped_mlp, clamp, size_E, dy_SD, rows_SD, w, biases):
    """(y, (drows, dweights, dbiases)); one compilation serves all sizes of a kernel."""

    def function(rows_SD, w, biases):
        return grouped_mlp(rows_SD, size_E, w, biases, clamp=clamp)

    y_SD, pull = jax.vjp(function, rows_SD, w, biases)
    return y_SD, pull(dy_SD)


def _onehot(rows, size_E, w, biases=(), **options):
    return experts_mlp(rows, size_E, *w, biases=biases, implementation="onehot", **options)


def check(grouped_mlp, name, dtype):
    """Against float64, one expert at a time; what lies past the last group is NaN."""
    size = np.asarray(SIZES[name], np.int32)
    filled = size.sum()
    index = np.full((M, 1), E)
    index[:filled, 0] = np.repeat(np.arange(E), size)
    x, dy, *w = (
        np.asarray(jnp.asarray(a, dtype), np.float64) for a in (tokens(M), DY, *weights(E))
    )
    x[filled:] = dy[filled:] = np.nan
    narrow = [jnp.asarray(a, dtype) for a in (dy, x)]
    got_y, (got_dx, got_dw, _) = output_and_grads(
        grouped_mlp, None, size, *narrow, tuple(jnp.asarray(a, jnp.float32) for a in w), ()
    )
    assert got_y.dtype == got_dx.dtype == dtype and got_dw[0].dtype == jnp.float32
    y, dx, _, *dw = oracle(x, index, (index < E).astype(float), *w)
    tolerance = 2e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip((got_y, got_dx, *got_dw), (y, dx, *dw), strict=True):
        scale = max(np.abs(b).max(), 1e-3)
        np.testing.assert_allclose(np.asarray(a, np.float64) / scale, b / scale, atol=tolerance)
    for tail in (got_y, got_dx):
        np.testing.assert_array_equal(np.asarray(tail[filled:], np.float32), 0.0)
    for gradient in got_dw:
        np.testing.assert_array_equal(gradient[size == 0], 0.0)


def check_biases(grouped_mlp, name, clamp):
    """Values and gradients, biases too, against every expert on every row."""
    size = np.asarray(SIZES[name], np.int32)
    rows, dy = tokens(M, np.float32), DY.astype(np.float32)
    rows[size.sum() :] = dy[size.sum() :] = np.nan
    arguments = (size, dy, rows, weights(E, np.float32), biases_of(E))
    got = output_and_grads(grouped_mlp, clamp, *arguments)
    want = output_and_grads(_onehot, clamp, *arguments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(np.abs(b).max(), 1e-3))


def check_wide(grouped_mlp):
    """More columns than a block and no multiple of one, contracted in several steps."""
    S, D_wide, F_wide = 40, 150, 300
    rng = np.random.default_rng(0)
    shapes = (
        (S, D_wide),
        (S, D_wide),
        (E, D_wide, F_wide),
        (E, D_wide, F_wide),
        (E, F_wide, D_wide),
    )
    dy, rows, *w = (rng.standard_normal(shape).astype(np.float32) * 0.1 for shape in shapes)
    size = np.asarray(SIZES["one over"], np.int32)
    got = output_and_grads(grouped_mlp, None, size, dy, rows, tuple(w), ())
    want = output_and_grads(_onehot, None, size, dy, rows, tuple(w), ())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


def check_unit(grouped_mlp):
    """One unit of stacked weights equals those weights; the others' gradients are 0."""
    size = np.asarray(SIZES["random"], np.int32)
    stack = [np.stack([w, 2 * w, -w]) for w in weights(E, np.float32)]
    rows, dy = tokens(M, np.float32), DY.astype(np.float32)

    @jax.jit
    def run(unit, *w):
        y, pull = jax.vjp(lambda rows, w: grouped_mlp(rows, size, w, unit=unit), rows, w)
        return y, *pull(dy)

    y, dx, dw = run(jnp.int32(2), *stack)
    want_y, want_dx, want_dw = run(None, *(w[2] for w in stack))
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(dx, want_dx)
    for a, b in zip(dw, want_dw, strict=True):
        np.testing.assert_array_equal(a[2], b)
        np.testing.assert_array_equal(a[:2], 0.0)
