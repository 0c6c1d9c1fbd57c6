"""The experts' MLP on rows sorted by expert, over the grouped matmul kernels of one device.

Both devices have the same two kernels: `dot` multiplies each expert's rows by its weights, and
`outer` an expert's rows by one another, for weight gradients. They work on the real group sizes: an
expert costs what its rows cost, and no product is made for another expert's rows. What follows a
product row by row (bias, gated unit and its gradient, a sum of two products) happens in the kernel,
so a pair of projections reads its rows once and float32 projections are never written.

The backward pass keeps the projections in the dtype of the rows. Weights are cast as they are read.

Letters: E experts, S rows, D model, F hidden; U units of stacked weights, K columns that a product
contracts, N columns of its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lightning_jax.ops.activation import gated_unit


class Product(NamedTuple):
    """What `Kernels.dot` computes.

    finish(products, extras) -> outputs, elementwise on float32 tiles: `products` are rows x weights
    + bias, one for each of the weights; `extras` tiles of further arrays [S, N].

    Attributes:
      transposed: the weights are [U, E, N, K] and contracted over their last axis.
      finish: as above; equal calls must compare equal.
      outputs: how many arrays it returns.
      fill: zeros in rows past the last group, which are else unspecified.
    """

    transposed: bool
    finish: Callable[..., tuple[jax.Array, ...]]
    outputs: int
    fill: bool


class Products(NamedTuple):
    """The calls of `Kernels.dot` that an MLP makes, in the order of a pass and its gradient."""

    into: Product
    into_kept: Product
    down: Product
    unit_gradient: Product
    rows_gradient: Product


def products(clamp: float | None) -> Products:
    """The calls of an MLP with a gated unit of that clamp."""
    return Products(
        into=Product(False, _Unit(clamp, keep=False), 1, fill=False),
        into_kept=Product(False, _Unit(clamp, keep=True), 3, fill=False),
        down=Product(False, _total, 1, fill=True),
        unit_gradient=Product(True, _UnitGradient(clamp), 3, fill=False),
        rows_gradient=Product(True, _total, 1, fill=True),
    )


class Kernels(Protocol):
    """Grouped matmuls of one device; hashable. Rows of no expert are never part of a product."""

    def dot(
        self,
        product: Product,
        rows: tuple[jax.Array, ...],
        weights: tuple[jax.Array, ...],
        size_E: jax.Array,
        unit: jax.Array,
        biases: tuple[jax.Array, ...],
        extras: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, ...]:
        """Outputs [S, N] in the dtype of the rows, one of rows [S, K] for all weights or for each.

        Weights are [U, E, K, N], biases [U, E, N] or none; `unit` picks of the first axis.
        """
        ...

    def outer(
        self,
        left_SK: jax.Array,
        right: tuple[jax.Array, ...],
        size_E: jax.Array,
        dtype: jnp.dtype,
    ) -> tuple[jax.Array, ...]:
        """For each right_SN the sum over each expert's rows of left x right: [E, K, N].

        Exactly 0 for an expert without rows.
        """
        ...


def grouped_mlp(
    kernels: Kernels,
    rows_SD: jax.Array,
    size_E: jax.Array,
    weights: tuple[jax.Array, ...],
    biases: tuple[jax.Array, ...],
    clamp: float | None,
    unit: jax.Array | None,
) -> jax.Array:
    """down(gated_unit(x gate, x up)) of each expert's rows; arguments of `ops.experts.grouped_mlp`.

    Rows past the last group are zeros in the result and get zeros as gradients, whatever they hold.
    Equal inputs give equal bits.
    """
    if unit is None:
        weights, biases = jax.tree.map(lambda a: a[None], (tuple(weights), tuple(biases)))
        unit = jnp.int32(0)
    return _mlp(kernels, clamp, rows_SD, size_E, unit, tuple(weights), tuple(biases))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mlp(kernels, clamp, rows_SD, size_E, unit, weights, biases):
    return _run(kernels, clamp, rows_SD, size_E, unit, weights, biases, keep=False)[0]


def _run(kernels, clamp, rows_SD, size_E, unit, weights, biases, *, keep):
    """Returns the result and, with `keep`, the two projections."""
    product = products(clamp)
    into = product.into_kept if keep else product.into
    hidden_SF, *kept = kernels.dot(into, (rows_SD,), weights[:2], size_E, unit, biases[:2], ())
    (y_SD,) = kernels.dot(product.down, (hidden_SF,), weights[2:], size_E, unit, biases[2:], ())
    return y_SD, kept


def _forward(kernels, clamp, *arguments):
    y_SD, kept = _run(kernels, clamp, *arguments, keep=True)
    return y_SD, (*arguments, kept)


def _backward(kernels, clamp, residuals, dy_SD):
    rows_SD, size_E, unit, weights, biases, kept = residuals
    product = products(clamp)
    dgate_SF, dup_SF, hidden_SF = kernels.dot(
        product.unit_gradient, (dy_SD,), weights[2:], size_E, unit, (), tuple(kept)
    )
    (drows_SD,) = kernels.dot(
        product.rows_gradient, (dgate_SF, dup_SF), weights[:2], size_E, unit, (), ()
    )
    dweights = (
        *kernels.outer(rows_SD, (dgate_SF, dup_SF), size_E, weights[0].dtype),
        *kernels.outer(hidden_SF, (dy_SD,), size_E, weights[2].dtype),
    )
    dbiases = [
        _sum_of_rows(d, size_E).astype(bias.dtype)
        for d, bias in zip((dgate_SF, dup_SF, dy_SD), biases, strict=False)
    ]

    def stacked(gradient, like):
        if like.shape[0] == 1:
            return gradient[None]
        return jnp.zeros(like.shape, like.dtype).at[unit].set(gradient)

    dweights = tuple(map(stacked, dweights, weights))
    return drows_SD, None, None, dweights, tuple(map(stacked, dbiases, biases))


_mlp.defvjp(_forward, _backward)


def _sum_of_rows(rows_SX: jax.Array, size_E: jax.Array) -> jax.Array:
    """The float32 sum of each expert's rows: a product, since a scatter-add has no fixed order."""
    end_E1 = jnp.cumsum(size_E)[:, None]
    row_1S = jnp.arange(rows_SX.shape[0])[None]
    mine_ES = (row_1S < end_E1) & (row_1S >= end_E1 - size_E[:, None])
    rows_SX = jnp.where((row_1S < end_E1[-1:]).T, rows_SX.astype(jnp.float32), 0)
    return jnp.dot(mine_ES.astype(jnp.float32), rows_SX, precision=jax.lax.Precision.HIGHEST)


class _Unit(NamedTuple):
    """The gated unit of two projections, and with `keep` also these."""

    clamp: float | None
    keep: bool

    def __call__(self, products, extras):
        hidden = gated_unit(*products, clamp=self.clamp)
        return (hidden, *products) if self.keep else (hidden,)


class _UnitGradient(NamedTuple):
    """From the gradient of the gated unit, and its inputs, to theirs; and the unit once more."""

    clamp: float | None

    def __call__(self, products, extras):
        hidden, pull = jax.vjp(functools.partial(gated_unit, clamp=self.clamp), *extras)
        return *pull(*products), hidden


def _total(products, extras) -> tuple[Any]:
    return (sum(products[1:], products[0]),)
