"""Dropless mixture-of-experts MLP: y = sum over a token's slots of gate * expert MLP.

In three parts, so that a transport can exchange rows between them: `dispatch` sorts the slots by
expert, `grouped_mlp` runs each expert on its rows, `combine` sums each token's rows.
`routed_experts` is all three, where the experts are at hand.

Letters: M tokens, E experts, C choices (slots) per token, S = M*C slots, D model, F hidden.
"""

from __future__ import annotations

import functools
import importlib
import logging

import jax
import jax.numpy as jnp

from lightning_jax.config.errors import suggest
from lightning_jax.ops.activation import gated_unit
from lightning_jax.ops.kernels.common import precision
from lightning_jax.ops.kernels.cpu.experts import blocked_experts, blocked_grouped_mlp
from lightning_jax.ops.routing import Choices, SlotOrder, ordered_sum, sort_slots
from lightning_jax.runtime import target

logger = logging.getLogger(__name__)

# Kernels of our own: imported when first used, as importing Pallas takes a second.
_KERNELS = {
    "pallas_tpu": "lightning_jax.ops.kernels.tpu.grouped",
    "pallas_gpu": "lightning_jax.ops.kernels.gpu.grouped",
}
IMPLEMENTATIONS = ("onehot", "blocked", "ragged_dot", *_KERNELS)
_PLATFORMS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}


def routed_experts(
    x_MD: jax.Array,
    choices: Choices,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    biases: tuple[jax.Array, ...] = (),
    clamp: float | None = None,
    unit: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y_MD = sum over slots of gate_MC * down(gated_unit(x gate, x up)), in the dtype of x.

    `ops.activation.gated_unit` is SwiGLU, or its clamped form.

    No token is dropped. Deterministic: each token's slots are summed in a fixed order. Empty slots
    add nothing and carry no gradient. Gradients reach x, `choices.gate_MC` (and through it the
    router), the three weights and the biases.

    Args:
      x_MD: tokens. Matmuls take its dtype and accumulate in float32.
      choices: from `ops.routing.route`, of M tokens in one axis.
      gate_EDF, up_EDF, down_EFD, biases, clamp, unit, implementation: as for `grouped_mlp`.
        "blocked" gathers each block's rows by itself and keeps no row per slot.

    Raises:
      ValueError: unknown implementation or shapes that do not fit.
    """
    weights = (gate_EDF, up_EDF, down_EFD)
    _check_weights(x_MD.shape[-1], choices.num_experts, weights, biases, unit)
    M, C = choices.expert_index_MC.shape
    implementation = _resolve(implementation, M * C, x_MD.dtype, gate_EDF)
    _check_shapes(
        {
            "x_MD": (x_MD.shape, (M, x_MD.shape[-1])),
            "choices.gate_MC": (choices.gate_MC.shape, (M, C)),
        }
    )
    with jax.named_scope(f"experts_{implementation}"):
        if implementation == "blocked":
            return blocked_experts(x_MD, choices, weights, biases, clamp=clamp, unit=unit)
        rows_SD, order = dispatch(x_MD, choices)
        rows_SD = grouped_mlp(
            rows_SD,
            order.size_E,
            *weights,
            biases=biases,
            clamp=clamp,
            unit=unit,
            implementation=implementation,
        )
        return combine(rows_SD, choices.gate_MC, order)


def dispatch(x_MD: jax.Array, choices: Choices) -> tuple[jax.Array, SlotOrder]:
    """Returns rows_SD, for each slot a copy of its token's row, and the order of the rows.

    The rows are sorted by expert and within an expert by token; `order.size_E` belong to each
    expert. The rows of empty slots come last and hold unspecified tokens; their gradients are
    ignored. Differentiated by a gather and a sum in slot order, not by a scatter-add.
    """
    order = sort_slots(choices.expert_index_MC, choices.num_experts)
    return _dispatch(x_MD, order), order


def combine(rows_SD: jax.Array, gate_MC: jax.Array, order: SlotOrder) -> jax.Array:
    """Returns y_MD, the sum of each token's rows weighted by their gates, in the dtype of the rows.

    Sums in slot order, in at least float32: the same bits on every run and device. Gates of empty
    slots are taken as 0; the rows of empty slots must be finite.
    """
    gate_MC = jnp.where(order.filled_MC, gate_MC, 0.0)
    return _combine(rows_SD, gate_MC, order).astype(rows_SD.dtype)


def grouped_mlp(
    rows_SD: jax.Array,
    size_E: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    biases: tuple[jax.Array, ...] = (),
    clamp: float | None = None,
    unit: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """down(gated_unit(x gate, x up)) of rows sorted by expert, in the dtype of the rows.

    Rows past the last group may hold anything. They are zeros in the result, and so are their
    gradients. Gradients reach the rows, the weights and the biases; deterministic.

    Args:
      rows_SD: the rows of expert 0, then those of expert 1, and so on; matmuls take their dtype
        and accumulate in float32.
      size_E: int32, rows of each expert, any of them 0; their sum may be less than S.
      gate_EDF, up_EDF, down_EFD: expert weights, bfloat16 or float32.
      biases: gate_EF, up_EF, down_ED of the three projections; empty for none.
      clamp: of the gated unit; None for SwiGLU.
      unit: int32 scalar, may be traced: weights and biases then have a leading axis of units, and
        this entry of it is used. "blocked" and the kernels read it expert by expert, so that no
        expert without rows is copied; the others take out the unit first.
      implementation:
        "onehot": every expert on every row, in float32; the oracle, E times the work.
        "blocked": blocks of rows in plain XLA; cost follows the filled rows.
        "ragged_dot": `jax.lax.ragged_dot` over the real group sizes. It expands to E dense
          matmuls: on CPU and GPU always, on TPU for the weight gradients.
        "pallas_tpu": our Pallas kernels for TPUs, bfloat16 and float32.
        "pallas_gpu": our Pallas Triton kernels for GPUs, bfloat16, float16 and float32.
        None: "blocked" on CPU, our kernels on TPU and GPU, or "ragged_dot" where these do not take
          the dtype or (on TPU) the widths.

    Raises:
      ValueError: unknown implementation, one that does not take the dtype or the widths, or shapes
        that do not fit.
    """
    weights = (gate_EDF, up_EDF, down_EFD)
    _check_weights(rows_SD.shape[-1], size_E.shape[0], weights, biases, unit)
    implementation = _resolve(implementation, len(rows_SD), rows_SD.dtype, gate_EDF)
    if implementation == "blocked":
        return blocked_grouped_mlp(rows_SD, size_E, weights, biases, clamp=clamp, unit=unit)
    if implementation in _KERNELS:
        kernel = importlib.import_module(_KERNELS[implementation]).grouped_mlp
        return kernel(rows_SD, size_E, weights, biases, clamp=clamp, unit=unit)
    if unit is not None:
        weights, biases = jax.tree.map(lambda a: a[unit], (weights, tuple(biases)))
    grouped = _onehot if implementation == "onehot" else _ragged
    rows_SD = _zero_beyond(rows_SD, jnp.sum(size_E))
    return grouped(rows_SD, size_E, weights, biases, clamp).astype(rows_SD.dtype)


def check_device(implementation: str, platform: str) -> None:
    """Raises UserError if a named implementation does not run on a platform."""
    needs = (_PLATFORMS.get(implementation, platform),)
    target.require_platform("model.moe.implementation", implementation, needs, platform)


def _resolve(implementation: str | None, rows: int, dtype: jnp.dtype, gate_EDF: jax.Array) -> str:
    if implementation is None:
        (D, F), platform = gate_EDF.shape[-2:], target.current().platform
        return _choose(platform, rows, (D, F), jnp.dtype(dtype), gate_EDF.dtype)
    if implementation not in IMPLEMENTATIONS:
        known = suggest(implementation, IMPLEMENTATIONS)
        raise ValueError(f"implementation must be {known}, got {implementation!r}")
    return implementation


def _choose(
    platform: str, rows: int, dims: tuple[int, int], dtype: jnp.dtype, weight_dtype: jnp.dtype
) -> str:
    implementation, why = "blocked" if platform == "cpu" else "ragged_dot", ""
    for name, needs in _PLATFORMS.items():
        if platform == needs:
            try:
                importlib.import_module(_KERNELS[name]).check(rows, dims, dtype, weight_dtype)
                implementation = name
            except ValueError as error:
                why = f" ({error})"
    logger.debug(
        "experts of %s, %d rows, D, F = %s on %s: %s%s",
        *(dtype, rows, dims, platform, implementation, why),
    )
    return implementation


def _check_weights(D, E, weights, biases, unit) -> None:
    F = weights[0].shape[-1]
    lead = (E,) if unit is None else (weights[0].shape[0], E)
    wanted = ((*lead, D, F), (*lead, D, F), (*lead, F, D))
    names = ("gate_EDF", "up_EDF", "down_EFD")
    expected = {n: (w.shape, s) for n, w, s in zip(names, weights, wanted, strict=True)}
    if biases:
        shapes = ((*lead, F), (*lead, F), (*lead, D))
        expected["biases"] = (tuple(bias.shape for bias in biases), shapes)
    _check_shapes(expected)


def _check_shapes(expected) -> None:
    for name, (got, want) in expected.items():
        if got != want:
            raise ValueError(f"{name} must have shape {want} to fit the rest, got {got}")


def _expert_of(size_E: jax.Array, rows: int) -> jax.Array:
    """expert_S of sorted rows; E past the last group."""
    return jnp.searchsorted(jnp.cumsum(size_E), jnp.arange(rows), side="right")


def _onehot(rows_SD, size_E, weights, biases, clamp):
    dtype = jnp.promote_types(rows_SD.dtype, jnp.float32)
    # A TPU would round the operands of float32 products to bfloat16.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    gate_EDF, up_EDF, down_EFD = (w.astype(dtype) for w in weights)
    gate_E1F, up_E1F, down_E1D = (b[:, None].astype(dtype) for b in biases) if biases else (0,) * 3
    rows_SD = rows_SD.astype(dtype)
    hidden_ESF = gated_unit(
        einsum("SD,EDF->ESF", rows_SD, gate_EDF) + gate_E1F,
        einsum("SD,EDF->ESF", rows_SD, up_EDF) + up_E1F,
        clamp=clamp,
    )
    y_ESD = einsum("ESF,EFD->ESD", hidden_ESF, down_EFD) + down_E1D
    onehot_SE = jax.nn.one_hot(_expert_of(size_E, len(rows_SD)), len(size_E), dtype=dtype)
    return _zero_beyond(einsum("SE,ESD->SD", onehot_SE, y_ESD), jnp.sum(size_E))


def _ragged(rows_SD, size_E, weights, biases, clamp):
    gate_EDF, up_EDF, down_EFD = weights
    gate_EF, up_EF, down_ED = biases or (None, None, None)
    dtype = rows_SD.dtype

    def grouped_dot(rows_SX, weight_EXY, bias_EY):
        y_SY = jax.lax.ragged_dot(
            rows_SX,
            weight_EXY.astype(dtype),
            size_E,
            precision=precision(dtype),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        if bias_EY is not None:
            y_SY += _bias_of(bias_EY, _expert_of(size_E, len(rows_SX))).astype(y_SY.dtype)
        # `ragged_dot` leaves other rows unspecified, forward and backward.
        return _zero_beyond(y_SY, jnp.sum(size_E))

    hidden_SF = gated_unit(
        grouped_dot(rows_SD, gate_EDF, gate_EF), grouped_dot(rows_SD, up_EDF, up_EF), clamp=clamp
    )
    return grouped_dot(hidden_SF.astype(dtype), down_EFD, down_ED)


@jax.custom_vjp
def _zero_beyond(rows_SX: jax.Array, count: jax.Array) -> jax.Array:
    """Zeros in place of the rows from `count` on, and of their gradients.

    A `where` would keep its condition for the backward pass, once for every column.
    """
    return jnp.where((jnp.arange(len(rows_SX)) < count)[:, None], rows_SX, 0)


def _zero_beyond_forward(rows_SX, count):
    return _zero_beyond(rows_SX, count), count


def _zero_beyond_backward(count, drows_SX):
    return _zero_beyond(drows_SX, count), None


_zero_beyond.defvjp(_zero_beyond_forward, _zero_beyond_backward)


@jax.custom_vjp
def _bias_of(bias_EY: jax.Array, expert_S: jax.Array) -> jax.Array:
    """The bias of each row, 0 past the last; differentiated by a product, not by a scatter-add."""
    return bias_EY.at[expert_S].get(mode="fill", fill_value=0)


def _bias_of_forward(bias_EY, expert_S):
    return _bias_of(bias_EY, expert_S), (bias_EY[:, :0], expert_S)


def _bias_of_backward(residuals, dbias_SY):
    like_E0, expert_S = residuals
    onehot_SE = jax.nn.one_hot(expert_S, len(like_E0), dtype=dbias_SY.dtype)
    dbias_EY = jnp.dot(onehot_SE.T, dbias_SY, precision=jax.lax.Precision.HIGHEST)
    return dbias_EY.astype(like_E0.dtype), None


_bias_of.defvjp(_bias_of_forward, _bias_of_backward)


@jax.custom_vjp
def _dispatch(x_MD: jax.Array, order: SlotOrder) -> jax.Array:
    return x_MD[order.token_S]


def _dispatch_forward(x_MD, order):
    return _dispatch(x_MD, order), order


def _dispatch_backward(order, drows_SD):
    dx_MD = ordered_sum(drows_SD, order.position_MC, order.filled_MC)
    return dx_MD.astype(drows_SD.dtype), None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(rows_SD: jax.Array, gate_MC: jax.Array, order: SlotOrder) -> jax.Array:
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
