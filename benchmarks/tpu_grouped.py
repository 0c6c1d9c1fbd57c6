"""Cases of suite `kernels_tpu` for grouped matmuls, with arithmetic in place of their look-ups.

The kernels read their grid from the group sizes, in scalar memory, which the static profiler takes
for zeros. So groups are equal here and everything about a step follows from its number; the vector
code is untouched. Either all groups end on tiles ("aligned"), or every group begins and ends inside
a tile ("straddling"), as real ones do. JAX's `megablox` with the same change, and the kernel that
XLA makes of `lax.ragged_dot`, abort the profiler.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from benchmarks.tpu_static import Case
from lightning_jax.ops.kernels import grouped
from lightning_jax.ops.kernels.tpu import grouped as kernels
from lightning_jax.ops.kernels.tpu.grouped import Kernels, Tiles, Visits

S, E, D, F = 8192, 16, 512, 384
GROUP = S // E
# Rows of a tile, rows of its part.
TILES = ((512, 256), (256, 128))
# Rows by which straddling groups start before a tile.
SHIFT = 64
# The passes of an experts' MLP, in products of [S, D] x [D, F]; "one" is none, to compare "gated",
# two products and the unit, with.
PRODUCTS = {
    "one": 1,
    "gated": 2,
    "down": 1,
    "gated_kept": 2,
    "unit_gradient": 1,
    "rows_gradient": 2,
    "into_gradient": 2,
    "down_gradient": 1,
}


def cases() -> dict[str, Callable[[], Case]]:
    """The cases measured on every chip, by name."""
    found = {}
    for kernel in PRODUCTS:
        for tile, part in TILES:
            for layout, shift in (("aligned", 0), ("straddling", SHIFT)):
                name = f"grouped_{kernel}_{tile}_{part}_{layout}"
                found[name] = functools.partial(_case, kernel, Tiles(tile, part), shift)
    return found


def _case(kernel: str, tiles: Tiles, shift: int) -> Case:
    outer = kernel in ("into_gradient", "down_gradient")
    _replace_look_ups(tiles.rows, shift, outer)
    size_E, unit = jnp.full((E,), GROUP, jnp.int32), jnp.int32(0)
    ours = Kernels(tiles=tiles)
    rows, hidden = (jax.ShapeDtypeStruct((S, n), jnp.bfloat16) for n in (D, F))
    into, down = (jax.ShapeDtypeStruct((1, E, *n), jnp.bfloat16) for n in ((D, F), (F, D)))

    def dot(product, left, weights, extras=()):
        def function(left, weights, extras):
            return ours.dot(product, left, weights, size_E, unit, (), extras)

        return function, (left, weights, extras)

    def outer_of(left, right):
        return lambda left, right: ours.outer(left, right, size_E, jnp.float32), (left, right)

    product = grouped.products(clamp=None)
    function, arguments = {
        "one": lambda: dot(product.down, (rows,), (into,)),
        "gated": lambda: dot(product.into, (rows,), (into, into)),
        "down": lambda: dot(product.down, (hidden,), (down,)),
        "gated_kept": lambda: dot(product.into_kept, (rows,), (into, into)),
        "unit_gradient": lambda: dot(product.unit_gradient, (rows,), (down,), (hidden, hidden)),
        "rows_gradient": lambda: dot(product.rows_gradient, (hidden, hidden), (into, into)),
        "into_gradient": lambda: outer_of(rows, (hidden, hidden)),
        "down_gradient": lambda: outer_of(hidden, (rows,)),
    }[kernel]()
    flops = 2.0 * S * D * F * PRODUCTS[kernel]
    flat, tree = jax.tree.flatten(arguments)
    shapes = flat + jax.tree.leaves(jax.eval_shape(function, *arguments))
    traffic = float(sum(x.size * x.dtype.itemsize for x in shapes))
    return Case(lambda *x: function(*jax.tree.unflatten(tree, x)), tuple(flat), flops, traffic)


def _replace_look_ups(tile: int, shift: int, outer: bool) -> None:
    """Has the kernels compute their steps: groups of `GROUP` rows, all but the first shifted."""
    before = int(shift > 0)
    steps = GROUP // tile + before

    def look_up(visits, field, step):
        # The profiler does not know divisions.
        expert = ((step + before) * -(-(1 << 16) // steps)) >> 16
        at = step + before - expert * steps
        first = (at == 0) | (step == 0) if outer else (at > 0) | (before == 0)
        return {
            "expert": expert,
            "tile": expert * (GROUP // tile) + at - before,
            "low": jnp.where(at == 0, tile - shift, 0) if shift else jnp.minimum(step, 0),
            "high": jnp.where(at == steps - 1, tile - shift, tile),
            "first": jnp.where(first, 1, 0),
            "last": jnp.where(at == steps - 1, 1, 0),
        }[field]

    def list_visits(*_, **__):
        return Visits(*[jnp.zeros(1, jnp.int32)] * len(Visits._fields)), E * steps - before

    # The process measures this one case.
    kernels.look_up, kernels.list_visits = look_up, list_visits
