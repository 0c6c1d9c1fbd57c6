"""Dropless mixture-of-experts MLP: y = sum over a token's slots of gate * expert MLP.

Letters: M tokens, E experts, C choices (slots) per token, S = M*C slots, D model, F hidden.
"""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp

from lightning_jax.ops.activation import gated_unit
from lightning_jax.ops.kernels.cpu.experts import blocked_experts
from lightning_jax.ops.routing import Routing, SlotOrder, ordered_sum, sort_slots
from lightning_jax.runtime import target

IMPLEMENTATIONS = ("onehot", "blocked", "ragged_dot")


def routed_experts(
    x_MD: jax.Array,
    routing: Routing,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    biases: tuple[jax.Array, ...] = (),
    clamp: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y_MD = sum over slots of gate_MC * down(unit(x gate, x up)), in the dtype of x.

    The unit is `ops.activation.gated_unit`: SwiGLU, or its clamped form.

    No token is dropped. Deterministic: results come back by a gather and a sum in slot order.
    Empty slots add nothing and carry no gradient. Gradients reach x, `routing.gate_MC` (and
    through it the router), the three weights and the biases.

    Args:
      x_MD: tokens. Matmuls take its dtype and accumulate in float32.
      routing: from `ops.routing.route`.
      gate_EDF, up_EDF, down_EFD: expert weights, bfloat16 or float32.
      biases: gate_EF, up_EF, down_ED of the three projections; empty for none.
      clamp: of the gated unit; None for SwiGLU.
      implementation:
        "onehot": every expert on every token, in float32; the oracle, E/C times the work.
        "blocked": sorted blocks of rows in plain XLA; cost follows the filled slots.
        "ragged_dot": `jax.lax.ragged_dot` over the real group sizes. On CPU it expands to E
          dense matmuls.
        None: "blocked" on CPU, else "ragged_dot".

    Raises:
      ValueError: unknown implementation or shapes that do not fit.
    """
    _check(x_MD, routing, gate_EDF, up_EDF, down_EFD, biases)
    if implementation is None:
        implementation = _choose(target.current().platform)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")
    weights = (gate_EDF, up_EDF, down_EFD)
    with jax.named_scope(f"experts_{implementation}"):
        if implementation == "onehot":
            return _onehot(x_MD, routing, weights, biases, clamp)
        if implementation == "ragged_dot":
            return _ragged(x_MD, routing, weights, biases, clamp)
        return blocked_experts(
            x_MD, routing.expert_index_MC, routing.gate_MC, weights, biases, clamp
        )


@functools.cache
def _choose(backend: str) -> str:
    implementation = "blocked" if backend == "cpu" else "ragged_dot"
    logging.getLogger(__name__).info("routed_experts on %s: %s", backend, implementation)
    return implementation


def _check(x_MD, routing, gate_EDF, up_EDF, down_EFD, biases) -> None:
    E, D, F = gate_EDF.shape
    M, C = routing.expert_index_MC.shape
    expected = {
        "x_MD": (x_MD.shape, (M, D)),
        "routing.gate_MC": (routing.gate_MC.shape, (M, C)),
        "routing.probs_ME": (routing.probs_ME.shape, (M, E)),
        "up_EDF": (up_EDF.shape, (E, D, F)),
        "down_EFD": (down_EFD.shape, (E, F, D)),
    }
    if biases:
        expected["biases"] = (tuple(bias.shape for bias in biases), ((E, F), (E, F), (E, D)))
    for name, (got, want) in expected.items():
        if got != want:
            raise ValueError(f"{name} must have shape {want} to fit the rest, got {got}")


def _onehot(x_MD, routing, weights, biases, clamp):
    dtype = jnp.promote_types(x_MD.dtype, jnp.float32)
    gate_EDF, up_EDF, down_EFD = (w.astype(dtype) for w in weights)
    gate_E1F, up_E1F, down_E1D = (b[:, None].astype(dtype) for b in biases) if biases else (0,) * 3
    wide_MD = x_MD.astype(dtype)
    # An empty slot's index, E, is outside the one-hot range: a row of zeros.
    onehot_MCE = jax.nn.one_hot(routing.expert_index_MC, gate_EDF.shape[0], dtype=dtype)
    gate_ME = jnp.einsum("MC,MCE->ME", routing.gate_MC.astype(dtype), onehot_MCE)
    hidden_EMF = gated_unit(
        jnp.einsum("MD,EDF->EMF", wide_MD, gate_EDF) + gate_E1F,
        jnp.einsum("MD,EDF->EMF", wide_MD, up_EDF) + up_E1F,
        clamp=clamp,
    )
    y_EMD = jnp.einsum("EMF,EFD->EMD", hidden_EMF, down_EFD) + down_E1D
    return jnp.einsum("ME,EMD->MD", gate_ME, y_EMD).astype(x_MD.dtype)


def _ragged(x_MD, routing, weights, biases, clamp):
    gate_EDF, up_EDF, down_EFD = weights
    gate_EF, up_EF, down_ED = biases or (None, None, None)
    order = sort_slots(routing.expert_index_MC, gate_EDF.shape[0])
    filled_S1 = order.filled_S[:, None]

    def grouped_dot(rows_SX, weight_EXY, bias_EY):
        # Rows past the last group are unspecified, forward and backward: zero them on both sides.
        y_SY = jax.lax.ragged_dot(
            jnp.where(filled_S1, rows_SX, 0),
            weight_EXY.astype(rows_SX.dtype),
            order.size_E,
            preferred_element_type=jnp.promote_types(rows_SX.dtype, jnp.float32),
        )
        if bias_EY is not None:
            y_SY += bias_EY[_expert_of(order)]
        return jnp.where(filled_S1, y_SY, 0)

    rows_SD = _dispatch(x_MD, order)
    hidden_SF = gated_unit(
        grouped_dot(rows_SD, gate_EDF, gate_EF), grouped_dot(rows_SD, up_EDF, up_EF), clamp=clamp
    )
    y_SD = grouped_dot(hidden_SF.astype(x_MD.dtype), down_EFD, down_ED).astype(x_MD.dtype)
    gate_MC = jnp.where(routing.filled_MC, routing.gate_MC, 0.0)
    return _combine(y_SD, gate_MC, order).astype(x_MD.dtype)


def _expert_of(order: SlotOrder) -> jax.Array:
    """expert_S, the expert of each sorted slot; the last one for empty slots."""
    slots_S = jnp.arange(order.slot_S.shape[0])
    expert_S = jnp.searchsorted(order.end_E, slots_S, side="right")
    return jnp.minimum(expert_S, order.end_E.shape[0] - 1)


@jax.custom_vjp
def _dispatch(x_MD: jax.Array, order: SlotOrder) -> jax.Array:
    """The rows of x in sorted slot order; differentiated by gather, not by scatter-add."""
    return x_MD[order.token_S]


def _dispatch_forward(x_MD, order):
    return _dispatch(x_MD, order), order


def _dispatch_backward(order, drows_SD):
    filled_MC = order.position_MC < order.end_E[-1]
    dx_MD = ordered_sum(drows_SD, order.position_MC, filled_MC)
    return dx_MD.astype(drows_SD.dtype), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(rows_SD: jax.Array, gate_MC: jax.Array, order: SlotOrder) -> jax.Array:
    """The weighted sum of each token's rows, in slot order."""
    return ordered_sum(rows_SD, order.position_MC, gate_MC)


def _combine_forward(rows_SD, gate_MC, order):
    return _combine(rows_SD, gate_MC, order), (rows_SD, gate_MC, order)


def _combine_backward(residuals, dy_MD):
    rows_SD, gate_MC, order = residuals
    gate_S = gate_MC.reshape(-1)[order.slot_S]
    dy_SD = dy_MD[order.token_S]
    dgate_S = jnp.sum(dy_SD * rows_SD.astype(dy_SD.dtype), axis=-1)
    drows_SD = (gate_S[:, None].astype(dy_SD.dtype) * dy_SD).astype(rows_SD.dtype)
    return drows_SD, dgate_S[order.position_MC].astype(gate_MC.dtype), None


_combine.defvjp(_combine_forward, _combine_backward)
