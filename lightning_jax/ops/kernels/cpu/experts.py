"""Dropless expert MLPs in blocks of rows: the CPU form, in plain XLA.

The filled slots, sorted by expert, are walked one expert at a time and, inside an expert, one
block of rows at a time; both loops run a dynamic number of times, so an empty expert, an empty
slot or a padded token costs nothing, and cost does not grow with E. A block gathers its rows,
runs the gated unit on its expert's weights and adds its output to those of its tokens. Blocks run
sequentially, so each token sums its experts in a fixed order (deterministic). Accumulating per
token fits in cache; one buffer row per slot would not.

Rows that are sorted already are tokens with one slot each, and take the same path.

For the backward pass it keeps the projections, in sorted order: on a CPU writing them costs a fifth
of computing them again (2 of 8 products).

XLA CPU turns `jax.lax.ragged_dot` into E masked dense matmuls, which this replaces.

With bfloat16 weights on CPU, XLA hoists the conversion of all experts' weights out of the loop, on
every call, unless compiled with `lightning_jax.runtime.compiler.options`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from lightning_jax.ops.activation import gated_unit
from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.routing import Choices, SlotOrder, sort_slots

# A large block filled to at least this share is faster than small ones with the same rows.
_WORTH = 0.625


def block_sizes(slots: int, experts: int) -> tuple[int, ...]:
    """Rows per block, larger first: an expert's rows take large blocks while these are well filled.

    Large blocks make good matmuls (256 rows keep a block's rows and one expert's weights in
    cache) but waste half a block per expert; small ones finish a group with little waste. Few
    tokens (decoding) take one size, the mean rows per expert, so that a matmul is not mostly
    padding.
    """
    mean = slots / experts
    if mean < 64:
        return (min(32, _power_of_two_from(mean)),)
    return (256, 64, 16) if mean >= 256 else (128, 32)


def _power_of_two_from(value: float) -> int:
    """The least power of two that is at least `value`."""
    return 1 << max(0, math.ceil(value) - 1).bit_length()


def blocked_experts(
    x_MD: jax.Array,
    choices: Choices,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    biases: tuple[jax.Array, ...] = (),
    *,
    clamp: float | None = None,
    unit: jax.Array | None = None,
) -> jax.Array:
    """y_MD = sum over c of gate_MC * down(gated_unit(x gate, x up)), experts as `choices` says.

    Args:
      x_MD: float rows; matmuls take its dtype and accumulate in at least float32.
      choices: the experts and gates of each row.
      weights: gate_EDF, up_EDF, down_EFD, cast to the dtype of x as they are read.
      biases: gate_EF, up_EF, down_ED of the three projections, or none.
      clamp: of `ops.activation.gated_unit`.
      unit: int32 scalar: weights and biases lead with a further axis, of which this entry is read,
        expert by expert.

    Returns:
      y_MD in the dtype of x. Gradients reach x, the gates, the weights and the biases.
    """
    order = sort_slots(choices.expert_index_MC, choices.num_experts)
    return _run_blocked(x_MD, choices.gate_MC, order, weights, biases, clamp, unit)


def blocked_grouped_mlp(
    rows_SD: jax.Array,
    size_E: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    biases: tuple[jax.Array, ...] = (),
    *,
    clamp: float | None = None,
    unit: jax.Array | None = None,
) -> jax.Array:
    """down(gated_unit(x gate, x up)) of rows sorted by expert, of which `size_E` belong to each.

    Rows past the last group are not read, and are zeros in the result. The other arguments and
    gradients are those of `blocked_experts`.
    """
    slot_S = jnp.arange(rows_SD.shape[0], dtype=jnp.int32)
    order = SlotOrder(slot_S, slot_S[:, None], size_E, jnp.cumsum(size_E))
    ones_S1 = jnp.ones((rows_SD.shape[0], 1), jnp.float32)
    return _run_blocked(rows_SD, ones_S1, order, weights, biases, clamp, unit)


def _run_blocked(x_MD, gate_MC, order, weights, biases, clamp, unit):
    E = order.size_E.shape[0]
    first = jnp.int32(0)
    if unit is not None:
        # The experts of all units in one row: (unit, expert) is then one index.
        weights, biases = jax.tree.map(
            lambda a: a.reshape(-1, *a.shape[2:]), (tuple(weights), tuple(biases))
        )
        first = unit * E
    sizes = block_sizes(order.slot_S.shape[0], E)
    return _blocked(sizes, clamp, x_MD, gate_MC, order, first, weights, biases)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(sizes, clamp, x_MD, gate_MC, order, first, weights, biases):
    """The sum over each row's slots; expert e's weights are `weights[first + e]`."""
    return _run(sizes, clamp, x_MD, gate_MC, order, first, weights, biases, keep=False)[0]


# R is the rows of a block; of what is kept, all sorted rows. J is 2 F: gate and up projections side
# by side, one product instead of two. In the forward pass two are as fast, and laying the weights
# side by side would not pay for few rows.


def _forward(sizes, clamp, *arguments):
    y_MD, hidden_RJ = _run(sizes, clamp, *arguments, keep=True)
    return y_MD, (*arguments, hidden_RJ)


def _run(sizes, clamp, x_MD, gate_MC, order, first, weights, biases, *, keep):
    """Returns the output and, with `keep`, the projections of each sorted row."""
    token_S, gate_S, dtype = order.token_S, gate_MC.reshape(-1)[order.slot_S], x_MD.dtype
    x_bits_MD = narrow.to_bits(x_MD)

    def expert(e, end, carry):
        *into_DF, down_FD = _weights_of(weights, first + e, dtype)
        biases_e = _biases_of(biases, first + e)

        def block(start, size, carry):
            y_MD, *kept = carry
            token_R, gate_R = _take_block(token_S, gate_S, start, size, end)
            x_RD = _rows(x_bits_MD, token_R, dtype)
            hidden_RF = [narrow.dot(x_RD, w_DF) for w_DF in into_DF]
            if biases_e:
                hidden_RF = [
                    h_RF + b_F[None] for h_RF, b_F in zip(hidden_RF, biases_e, strict=False)
                ]
            gated_RF = gate_R[:, None] * gated_unit(*hidden_RF, clamp=clamp)
            y_RD = narrow.dot(narrow.operand(gated_RF, dtype), down_FD)
            if biases_e:
                y_RD += gate_R[:, None] * biases_e[2][None]
            y_MD = _add_rows(y_MD, token_R, y_RD)
            if keep:
                kept = [narrow.put(kept[0], jnp.concatenate(hidden_RF, axis=1), start, dtype)]
            return (y_MD, *kept)

        return _for_each_block(sizes, end - order.size_E[e], end, block, carry)

    # Blocks run in row order, so the next group overwrites what a partial block writes past its
    # own; only the last group needs room to spill into.
    rows = token_S.shape[0] + sizes[0]
    kept = [narrow.to_bits(jnp.zeros((rows, 2 * weights[0].shape[2]), dtype))] if keep else []
    zeros_MD = jnp.zeros(x_MD.shape, jnp.promote_types(dtype, jnp.float32))
    y_MD, *kept = _for_each_expert(order, expert, (zeros_MD, *kept))
    return y_MD.astype(dtype), kept[0] if keep else None


def _backward(sizes, clamp, residuals, dy_MD):
    x_MD, gate_MC, order, first, weights, biases, hidden_bits_RJ = residuals
    dtype = x_MD.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    token_S = order.token_S
    gate_S = gate_MC.reshape(-1)[order.slot_S]
    x_bits_MD, dy_bits_MD = narrow.to_bits(x_MD), narrow.to_bits(dy_MD)
    gradients_of = functools.partial(_block_gradients, dtype=dtype, clamp=clamp)

    def expert(e, end, carry):
        held = first + e
        *into_DF, down_FD = _weights_of(weights, held, dtype)
        biases_e = _biases_of(biases, held)
        into_DJ = jnp.concatenate(into_DF, axis=1)
        into_JD, down_DF = narrow.transposed(into_DJ), narrow.transposed(down_FD)

        def block(start, size, carry):
            sums, dx_MD, dgate_S = carry
            token_R, gate_R = _take_block(token_S, gate_S, start, size, end)
            x_RD, dy_RD = (_rows(bits, token_R, dtype) for bits in (x_bits_MD, dy_bits_MD))
            hidden_RJ = jax.lax.dynamic_slice_in_dim(hidden_bits_RJ, start, size, axis=0)
            hidden_RJ = narrow.from_bits(hidden_RJ, dtype).astype(wide)
            rows = (x_RD, gate_R, dy_RD, hidden_RJ)
            gradients, dx_RD, dgate_R = gradients_of(*rows, into_JD, down_DF, biases_e)
            sums = jax.tree.map(jnp.add, sums, gradients)
            dgate_S = narrow.put(dgate_S, dgate_R, start, wide)
            return sums, _add_rows(dx_MD, token_R, dx_RD), dgate_S

        # One expert's weight gradients stay in cache; the full ones are written once each.
        full, *tokens = carry
        shapes = into_DJ.shape, down_FD.shape, *(bias.shape for bias in biases_e)
        sums = tuple(jnp.zeros(shape, wide) for shape in shapes)
        start = end - order.size_E[e]
        sums, *tokens = _for_each_block(sizes, start, end, block, (sums, *tokens))
        sums = (*jnp.split(sums[0], 2, axis=1), *sums[1:])
        parts = zip(full, sums, (*weights, *biases), strict=True)
        return tuple(narrow.put(buf, one[None], held, p.dtype) for buf, one, p in parts), *tokens

    zeros = tuple(jnp.zeros_like(narrow.to_bits(p)) for p in (*weights, *biases))
    carry = (zeros, jnp.zeros(x_MD.shape, wide), jnp.zeros(hidden_bits_RJ.shape[0], wide))
    bits, dx_MD, dgate_S = _for_each_expert(order, expert, carry)
    dgate_MC = jnp.where(order.filled_MC, dgate_S[order.position_MC], 0.0).astype(gate_MC.dtype)
    gradients = tuple(
        narrow.from_bits(a, p.dtype) for a, p in zip(bits, (*weights, *biases), strict=True)
    )
    return dx_MD.astype(dtype), dgate_MC, None, None, gradients[:3], gradients[3:]


_blocked.defvjp(_forward, _backward)


def _weights_of(weights, e, dtype):
    """gate_DF, up_DF and down_FD of one expert, as operands of its products."""
    return tuple(
        narrow.operand(narrow.from_bits(narrow.to_bits(w)[e], w.dtype), dtype) for w in weights
    )


def _biases_of(biases, e):
    return tuple(bias[e].astype(jnp.float32) for bias in biases)


def _rows(bits_MD, token_R, dtype):
    rows_RD = bits_MD.at[token_R].get(mode="promise_in_bounds")
    return narrow.operand(narrow.from_bits(rows_RD, dtype), dtype)


def _block_gradients(x_RD, gate_R, dy_RD, hidden_RJ, into_JD, down_DF, biases, *, dtype, clamp):
    """Gradients of gate_R * expert(x_RD): of (into, down, *biases), of x and of gate."""
    unit = functools.partial(gated_unit, clamp=clamp)
    act_RF, unit_gradient = jax.vjp(unit, *jnp.split(hidden_RJ, 2, axis=1))
    dact_RF = narrow.dot(dy_RD, down_DF)
    # <dy, act down> = <dy down', act>: the gate's gradient needs no second down matmul.
    dgate_R = jnp.sum(dact_RF * act_RF, axis=-1)
    wide_RF = unit_gradient(dact_RF * gate_R[:, None])
    dhidden_RJ = narrow.operand(jnp.concatenate(wide_RF, axis=1), dtype)
    gated_RF = narrow.operand(act_RF * gate_R[:, None], dtype)
    dbiases = ()
    if biases:
        wide_dy_RD = dy_RD.astype(wide_RF[0].dtype)
        dbiases = (*(d_RF.sum(0) for d_RF in wide_RF), gate_R @ wide_dy_RD)
        dgate_R += wide_dy_RD @ biases[2]
    gradients = (
        narrow.dot(narrow.transposed(x_RD), dhidden_RJ),
        narrow.dot(narrow.transposed(gated_RF), dy_RD),
        *dbiases,
    )
    return gradients, narrow.dot(dhidden_RJ, into_JD), dgate_R


def _for_each_expert(order, body, carry):
    """carry = body(e, end, carry) over the experts that have rows, in order of their rows."""
    used_E = order.size_E > 0
    experts_E = jnp.argsort(~used_E, stable=True)

    def step(i, carry):
        e = experts_E[i]
        return body(e, order.end_E[e], carry)

    return jax.lax.fori_loop(0, jnp.sum(used_E), step, carry)


def _for_each_block(sizes, start, end, body, carry):
    """carry = body(row, size, carry) over blocks that cover the rows [start, end)."""
    state = (start, carry)
    for size in sizes:
        needed = 1 if size == sizes[-1] else math.ceil(_WORTH * size)
        state = jax.lax.while_loop(
            lambda state, needed=needed: end - state[0] >= needed,
            lambda state, size=size: (state[0] + size, body(state[0], size, state[1])),
            state,
        )
    return state[1]


def _take_block(token_S, gate_S, start, size, end):
    """Token and gate of the sorted slots from `start` on.

    From `end` on, the last slot is repeated with a gate of 0, which keeps it out of all sums.
    """
    row_R = start + jnp.arange(size)
    last_R = jnp.minimum(row_R, end - 1)
    token_R, gate_R = (a.at[last_R].get(mode="promise_in_bounds") for a in (token_S, gate_S))
    return token_R, jnp.where(row_R < end, gate_R, 0.0)


def _add_rows(sum_MD, token_R, rows_RD):
    return sum_MD.at[token_R].add(rows_RD, mode="promise_in_bounds")
