"""Dropless expert MLPs in blocks of rows: the CPU form, in plain XLA.

The filled slots, sorted by expert, are walked one expert at a time and, inside an expert, one
block of rows at a time; both loops run a dynamic number of times, so an empty expert, an empty
slot or a padded token costs nothing, and cost does not grow with E. A block gathers its rows,
runs SwiGLU on its expert's weights and stores its output in sorted order. The backward pass
recomputes the hidden values block by block (2 of its 8 matmuls) rather than storing them.

XLA CPU turns `jax.lax.ragged_dot` into E masked dense matmuls, which this replaces.

With bfloat16 weights on CPU, XLA's while-loop-invariant-code-motion hoists the float32 upcast of
the whole expert stack out of the loop, on every call. Compile such programs with
`{"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}`, or keep float32 weights there.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from lightning_jax.ops.activation import gated_unit
from lightning_jax.ops.routing import ordered_sum, sort_slots


def block_sizes(slots: int, experts: int) -> tuple[int, ...]:
    """Rows per block, larger first: an expert's rows go by whole large blocks, then small ones.

    Large blocks make good matmuls (256 rows keep a block's rows and one expert's weights in
    cache) but waste half a block per expert; small ones finish a group with little waste. Few
    tokens (decoding) take one size, the mean rows per expert, so that a matmul is not mostly
    padding.
    """
    mean = slots / experts
    if mean < 64:
        return (min(32, _power_of_two_from(mean)),)
    return (256, 64) if mean >= 256 else (128, 32)


def _power_of_two_from(value: float) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, math.ceil(value) - 1).bit_length()


def blocked_experts(
    x_MD: jax.Array,
    expert_index_MC: jax.Array,
    gate_MC: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    biases: tuple[jax.Array, ...] = (),
    clamp: float | None = None,
) -> jax.Array:
    """y_MD = sum over c of gate_MC * down(unit(x gate, x up)), experts as `expert_index_MC`.

    Args:
      x_MD: float rows; matmuls take its dtype and accumulate in at least float32.
      expert_index_MC: int32, E in empty slots.
      gate_MC: float32; differentiable.
      weights: gate_EDF, up_EDF, down_EFD, cast to the dtype of x as they are read.
      biases: gate_EF, up_EF, down_ED of the three projections, or none.
      clamp: of `ops.activation.gated_unit`, the unit.

    Returns:
      y_MD in the dtype of x. Gradients reach x, gate_MC, the weights and the biases.
    """
    sizes = block_sizes(expert_index_MC.size, weights[0].shape[0])
    return _blocked(sizes, clamp, x_MD, expert_index_MC, gate_MC, weights, biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(sizes, clamp, x_MD, expert_index_MC, gate_MC, weights, biases):
    return _forward(sizes, clamp, x_MD, expert_index_MC, gate_MC, weights, biases)[0]


def _forward(sizes, clamp, x_MD, expert_index_MC, gate_MC, weights, biases):
    order = sort_slots(expert_index_MC, weights[0].shape[0])
    token_S = order.token_S

    def expert(e, end, rows_RD):
        weights_e = _of_expert(weights, e, x_MD.dtype)
        biases_e = _of_expert(biases, e, jnp.float32)

        def block(start, size, rows_RD):
            token_R = _take_block(token_S, start, size, end)
            hidden = _projected(x_MD[token_R], weights_e, biases_e)
            act_RF = gated_unit(*hidden, clamp=clamp)
            y_RD = _dot(act_RF.astype(x_MD.dtype), weights_e[2])
            if biases_e:
                y_RD += biases_e[2][None]
            return _put(rows_RD, y_RD, start)

        return _for_each_block(sizes, end - order.size_E[e], end, block, rows_RD)

    rows_RD = _for_each_expert(order, expert, _row_buffer(order, sizes, x_MD))
    filled_MC = expert_index_MC < weights[0].shape[0]
    y_MD = ordered_sum(rows_RD, order.position_MC, jnp.where(filled_MC, gate_MC, 0.0))
    residuals = (x_MD, order, filled_MC, gate_MC, weights, biases)
    return y_MD.astype(x_MD.dtype), residuals


def _backward(sizes, clamp, residuals, dy_MD):
    x_MD, order, filled_MC, gate_MC, weights, biases = residuals
    dtype = x_MD.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    token_S = order.token_S
    gate_S = gate_MC.reshape(-1)[order.slot_S]
    parameters = (weights, biases)

    def expert(e, end, carry):
        weights_e = _of_expert(weights, e, dtype)
        biases_e = _of_expert(biases, e, jnp.float32)

        def block(start, size, carry):
            sums, dx_RD, dgate_R = carry
            token_R = _take_block(token_S, start, size, end)
            # Rows past the group's end repeat its last one: a zero gate keeps them out.
            valid_R = start + jnp.arange(size) < end
            gate_R = jnp.where(valid_R, _take_block(gate_S, start, size, end), 0.0)
            rows = (x_MD[token_R], gate_R, dy_MD[token_R])
            gradients, *drows = _block_gradients(*rows, weights_e, biases_e, clamp)
            sums = jax.tree.map(jnp.add, sums, gradients)
            return sums, _put(dx_RD, drows[0], start), _put(dgate_R, drows[1], start)

        # One expert's weight gradients stay in cache; the full ones are written once each.
        full, dx_RD, dgate_R = carry
        sums = jax.tree.map(lambda p: jnp.zeros(p.shape[1:], wide), parameters)
        start = end - order.size_E[e]
        sums, *rows = _for_each_block(sizes, start, end, block, (sums, dx_RD, dgate_R))
        return jax.tree.map(lambda all_E, one: _put(all_E, one[None], e), full, sums), *rows

    dx_RD = _row_buffer(order, sizes, x_MD)
    zeros = (jax.tree.map(jnp.zeros_like, parameters), dx_RD, jnp.zeros(dx_RD.shape[0], wide))
    gradients, dx_RD, dgate_R = _for_each_expert(order, expert, zeros)
    dx_MD = ordered_sum(dx_RD, order.position_MC, filled_MC)
    dgate_MC = jnp.where(filled_MC, dgate_R[order.position_MC], 0.0).astype(gate_MC.dtype)
    return dx_MD.astype(dtype), None, dgate_MC, *gradients


_blocked.defvjp(_forward, _backward)


def _of_expert(parameters, e, dtype):
    return tuple(parameter[e].astype(dtype) for parameter in parameters)


def _projected(x_RD, weights, biases):
    """Gate and up projections of a block of rows, in at least float32."""
    gate_RF, up_RF = _dot(x_RD, weights[0]), _dot(x_RD, weights[1])
    if biases:
        gate_RF, up_RF = gate_RF + biases[0][None], up_RF + biases[1][None]
    return gate_RF, up_RF


def _block_gradients(x_RD, gate_R, dy_RD, weights, biases, clamp):
    """Gradients of gate_R * expert(x_RD): for (weights, biases), x and gate."""
    dtype = x_RD.dtype
    gate_DF, up_DF, down_FD = weights
    unit = functools.partial(gated_unit, clamp=clamp)
    act_RF, unit_gradient = jax.vjp(unit, *_projected(x_RD, weights, biases))
    dact_RF = _dot(dy_RD, down_FD.T)
    # <dy, act down> = <dy down', act>: the gate's gradient needs no second down matmul.
    dgate_R = jnp.sum(dact_RF * act_RF, axis=-1)
    wide_RF = unit_gradient(dact_RF * gate_R[:, None])
    dhidden_RF, dup_RF = (d_RF.astype(dtype) for d_RF in wide_RF)
    dweights = (
        _dot(x_RD.T, dhidden_RF),
        _dot(x_RD.T, dup_RF),
        _dot((act_RF * gate_R[:, None]).astype(dtype).T, dy_RD),
    )
    dbiases = ()
    if biases:
        dy_RD = dy_RD.astype(wide_RF[0].dtype)
        dbiases = (*(d_RF.sum(0) for d_RF in wide_RF), gate_R @ dy_RD)
        dgate_R += dy_RD @ biases[2]
    dx_RD = _dot(dhidden_RF, gate_DF.T) + _dot(dup_RF, up_DF.T)
    return (dweights, dbiases), dx_RD, dgate_R


def _for_each_expert(order, body, carry):
    """carry = body(e, end, carry) over the experts that have rows, in order of their rows."""
    used_E = order.size_E > 0
    experts_E = jnp.argsort(~used_E, stable=True)

    def step(i, carry):
        e = experts_E[i]
        return body(e, order.end_E[e], carry)

    return jax.lax.fori_loop(0, jnp.sum(used_E), step, carry)


def _for_each_block(sizes, start, end, body, carry):
    """carry = body(row, size, carry) over the rows [start, end), only the last block partial."""
    state = (start, carry)
    for size in sizes:
        needed = 1 if size == sizes[-1] else size
        state = jax.lax.while_loop(
            lambda state, needed=needed: end - state[0] >= needed,
            lambda state, size=size: (state[0] + size, body(state[0], size, state[1])),
            state,
        )
    return state[1]


def _row_buffer(order, sizes, x_MD):
    # Blocks run in row order, so what a partial one writes past its group is then overwritten by
    # the next group; only the last group needs room to spill into.
    return jnp.zeros((order.slot_S.shape[0] + sizes[0], x_MD.shape[1]), x_MD.dtype)


def _take_block(values_S, start, size, end):
    """values_S[start : start + size], the last valid one repeated from `end` on."""
    return values_S[jnp.minimum(start + jnp.arange(size), end - 1)]


def _put(buffer, rows, start):
    return jax.lax.dynamic_update_slice_in_dim(buffer, rows.astype(buffer.dtype), start, axis=0)


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
