"""A differentiable scan whose bfloat16 residuals are kept as their bits.

XLA's CPU back end widens a `dynamic_update_slice` of bfloat16: to stack the residuals of one step
for the backward pass it converts the *whole* stack to float32 and back, at every step (see
`ops.kernels.cpu.narrow`). `jax.lax.scan` gives no control over residuals, so here they are taken
out of each step's `jax.vjp`, and those of bfloat16 are stacked as uint16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from lightning_jax.ops.kernels.cpu import narrow

Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def scan(step: Step, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """Like `lax.scan(lambda carry, x: step(constants, carry, x), carry, xs)`.

    Reverse-mode differentiable in `carry` and `xs`; `constants` get no gradient. All outputs of a
    step must be floating point numbers.
    """
    # The structure of a step's pullback, recorded when the forward pass is traced.
    seen: dict[str, Any] = {}

    @jax.custom_vjp
    def run(constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
        return lax.scan(lambda carry, x: step(constants, carry, x), carry, xs)

    def forward(constants: Any, carry: Any, xs: Any) -> Any:
        def one(carry: Any, x: Any) -> Any:
            outputs, pullback = jax.vjp(lambda carry, x: step(constants, carry, x), carry, x)
            leaves, seen["tree"] = jax.tree.flatten(pullback)
            # Constants and xs exist anyway, so only the carry and intermediate values are stacked.
            given = {id(leaf): index for index, leaf in enumerate(jax.tree.leaves((constants, x)))}
            seen["given"] = [given.get(id(leaf)) for leaf in leaves]
            seen["dtypes"] = [leaf.dtype for leaf in leaves]
            kept = [
                narrow.to_bits(leaf)
                for leaf, index in zip(leaves, seen["given"], strict=True)
                if index is None
            ]
            carry, y = outputs
            return carry, (y, kept)

        carry, (ys, kept) = lax.scan(one, carry, xs)
        return (carry, ys), (constants, xs, kept)

    def backward(residuals: Any, cotangents: Any) -> Any:
        constants, xs, kept = residuals
        dcarry, dys = cotangents

        def one(dcarry: Any, given: Any) -> Any:
            x, kept, dy = given
            inputs, kept = jax.tree.leaves((constants, x)), iter(kept)
            leaves = [
                narrow.from_bits(next(kept), dtype) if index is None else inputs[index]
                for index, dtype in zip(seen["given"], seen["dtypes"], strict=True)
            ]
            pullback = jax.tree.unflatten(seen["tree"], leaves)
            return pullback((dcarry, dy))

        dcarry, dxs = lax.scan(one, dcarry, (xs, kept, dys), reverse=True)
        return None, dcarry, dxs

    run.defvjp(forward, backward)
    return run(constants, carry, xs)
