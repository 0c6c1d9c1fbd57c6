"""Grouped-query softmax attention: one call, several ways to compute it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.ops.kernels.common import HIDDEN, TRITON_HEAD_SIZES, precision
from lightning_jax.ops.mask import Mask
from lightning_jax.runtime import target

logger = logging.getLogger(__name__)

SEGMENTS, SINKS, SOFTCAP, OFFSET = "segments", "sinks", "logit_softcap", "query_offset"


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A function for causal masks without positions, and which features it honours.

    Imported when first used: importing Pallas takes a second, and some builds lack its GPU half.
    """

    module: str
    function: str
    honours: frozenset[str]

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.function)


_ALL = frozenset({SEGMENTS, SINKS, SOFTCAP, OFFSET})
_FOLDER = "lightning_jax.ops.kernels"
_KERNELS = {
    "xla_banded": _Kernel(f"{_FOLDER}.cpu.banded", "banded_attention", _ALL),
    "pallas_tpu": _Kernel(f"{_FOLDER}.tpu.attention", "sliding_window_attention", _ALL),
    "pallas_gpu": _Kernel(f"{_FOLDER}.gpu.attention", "sliding_window_attention", _ALL),
    "splash": _Kernel(f"{_FOLDER}.peers", "splash_attention", frozenset({SOFTCAP, OFFSET})),
    "cudnn": _Kernel(f"{_FOLDER}.peers", "cudnn_attention", frozenset()),
}
IMPLEMENTATIONS = ("reference", *_KERNELS)
_PLATFORMS = {"pallas_tpu": "tpu", "splash": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}

# From this many keys on xla_banded beats the reference on a CPU, with and without gradients: 1.3 to
# 4 times at 256 (no window to window 32); at 128 without a window gradients are slower by 1.6.
_BANDED_FROM_KEYS = 256
# Fewer queries do not fill its smallest block, and the reference wastes no pair.
_BANDED_FROM_QUERIES = 16


def dot_product_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask: Mask,
    *,
    sinks_N: jax.Array | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """softmax(scale x query . key) . value over the keys that `mask` shows.

    Query head n reads key/value head n // (N / K) (Ainslie et al., "GQA", arXiv:2305.13245);
    keys are never repeated. Scores, softmax and sums are float32.

    Args:
        query_BTNH: queries; N is a multiple of K.
        key_BSKH: keys.
        value_BSKH: values.
        mask: which pairs are visible.
        sinks_N: a logit per head that joins only the softmax denominator, so a head may attend to
            nothing (OpenAI, "gpt-oss model card", arXiv:2508.10925).
        scale: factor of the scores, H**-0.5 by default.
        logit_softcap: c in c x tanh(score / c), which bounds the scaled scores, not the sinks
            (Gemma 2, arXiv:2408.00118); None: no soft-cap.
        implementation: "reference" (all pairs at once, any mask); for causal masks without
            positions "xla_banded" (blocks of pairs in plain XLA), "pallas_tpu" and "pallas_gpu"
            (our kernels), "splash" and "cudnn" (JAX's TPU kernel and NVIDIA's, for comparison);
            None to choose by device, mask and numbers of queries and keys.

    Returns:
        out_BTNH in the queries' dtype. A query that sees nothing gets exactly 0, and sends no
        gradient anywhere, sinks included.

    Raises:
        ValueError: shapes that do not fit; a soft-cap that is not positive; an unknown
            implementation; one that cannot honour a feature of the call.
    """
    _check_shapes(query_BTNH, key_BSKH, value_BSKH, mask, sinks_N)
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap={logit_softcap}: must be positive, or None")
    T, S, H = query_BTNH.shape[1], key_BSKH.shape[1], query_BTNH.shape[-1]
    if scale is None:
        scale = H**-0.5
    options = {
        SEGMENTS: {
            "query_segments_BT": mask.query_segments_BT,
            "key_segments_BS": mask.key_segments_BS,
        },
        SINKS: {"sinks_N": sinks_N},
        SOFTCAP: {"logit_softcap": logit_softcap},
        OFFSET: {"query_offset": mask.query_offset or None},
    }
    # Only features in use are passed on: a kernel need not accept arguments for those it lacks.
    used = {name: part for name, part in options.items() if next(iter(part.values())) is not None}
    if implementation is None:
        implementation = _choose(
            target.current().platform, mask.aligned, mask.causal, T, S, mask.window, H
        )
    if implementation == "reference":
        mask_BTS = mask.as_array(T, S)
        return _reference(query_BTNH, key_BSKH, value_BSKH, mask_BTS, sinks_N, scale, logit_softcap)
    attend = _checked(implementation, mask, used).load()
    arguments = {name: value for part in used.values() for name, value in part.items()}
    return attend(query_BTNH, key_BSKH, value_BSKH, window=mask.window, scale=scale, **arguments)


def attention_probabilities(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    mask: Mask,
    *,
    sinks_N: jax.Array | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
) -> jax.Array:
    """The weights with which `dot_product_attention` sums the values: its reference computes these.

    Args:
        query_BTNH, key_BSKH, mask, sinks_N, scale, logit_softcap: see `dot_product_attention`.

    Returns:
        float32 probs_BNTS. A row sums to 1, to less with a sink, which takes the rest, and to 0
        where a query sees nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_shapes(query_BTNH, key_BSKH, key_BSKH, mask, sinks_N)
    (B, T, N, H), S = query_BTNH.shape, key_BSKH.shape[1]
    scale = H**-0.5 if scale is None else scale
    probs_BKGTS = _probabilities(
        query_BTNH, key_BSKH, mask.as_array(T, S), sinks_N, scale, logit_softcap
    )
    return probs_BKGTS.reshape(B, N, T, S)


def check_device(implementation: str, platform: str, head_size: int) -> None:
    """Raises UserError if a named implementation does not run on a platform, or on that size."""
    field = "model.attention.implementation"
    needs = (_PLATFORMS.get(implementation, platform),)
    target.require_platform(field, implementation, needs, platform)
    if implementation == "pallas_gpu" and head_size not in TRITON_HEAD_SIZES:
        sizes = ", ".join(map(str, TRITON_HEAD_SIZES))
        raise UserError(
            f"{field} = {implementation!r}: needs a head_dim out of {sizes}, not {head_size}"
        )


def _reference(query_BTNH, key_BSKH, value_BSKH, mask_BTS, sinks_N, scale, logit_softcap):
    """All scores at once; the definition that every other implementation is tested against."""
    probs_BKGTS = _probabilities(query_BTNH, key_BSKH, mask_BTS, sinks_N, scale, logit_softcap)
    out_BTKGH = _dot("BKGTS,BSKH->BTKGH", probs_BKGTS.astype(value_BSKH.dtype), value_BSKH)
    return out_BTKGH.reshape(query_BTNH.shape).astype(query_BTNH.dtype)


def _probabilities(query_BTNH, key_BSKH, mask_BTS, sinks_N, scale, logit_softcap):
    B, T, N, H = query_BTNH.shape
    K = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
    visible = mask_BTS[:, None, None]
    scores_BKGTS = scale * _dot("BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH)
    if logit_softcap is not None:
        scores_BKGTS = logit_softcap * jnp.tanh(scores_BKGTS / logit_softcap)
    scores_BKGTS = jnp.where(visible, scores_BKGTS, HIDDEN)
    top_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        top_BKGT1 = jnp.maximum(top_BKGT1, sinks)
    top_BKGT1 = lax.stop_gradient(top_BKGT1)
    weights_BKGTS = jnp.where(visible, jnp.exp(scores_BKGTS - top_BKGT1), 0.0)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKGT1 += jnp.exp(sinks - top_BKGT1)
    # Only a query that sees nothing has a total of 0, and 0 / 1 is its right result.
    return weights_BKGTS / jnp.where(total_BKGT1 == 0, 1.0, total_BKGT1)


def _dot(spec, left, right):
    return jnp.einsum(
        spec, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )


@functools.cache
def _choose(
    backend: str,
    aligned: bool,
    causal: bool,
    queries: int,
    keys: int,
    window: int | None,
    head_size: int,
) -> str:
    # Cached so that each kind of call is logged once, however often it is traced.
    choice = "reference"
    if aligned and causal:
        if backend == "tpu":
            choice = "pallas_tpu"
        elif backend == "gpu" and head_size in TRITON_HEAD_SIZES:
            choice = "pallas_gpu"
        elif queries >= _BANDED_FROM_QUERIES and keys >= _BANDED_FROM_KEYS:
            choice = "xla_banded"
    logger.debug(
        "attention: %s on %s for %s %s queries, length %s, window %s",
        choice,
        backend,
        "causal" if causal else "bidirectional",
        "aligned" if aligned else "positioned",
        keys if queries == keys else f"{keys} ({queries} queries)",
        window,
    )
    return choice


def _checked(implementation: str, mask: Mask, used: dict[str, Any]) -> _Kernel:
    """Raises a ValueError for an unknown kernel, or one that lacks a feature of the call."""
    if implementation not in _KERNELS:
        known = suggest(implementation, IMPLEMENTATIONS)
        raise ValueError(f"implementation={implementation!r}: expected {known}")
    kernel = _KERNELS[implementation]
    lacks = [name for name in used if name not in kernel.honours]
    if not mask.aligned:
        lacks.append("explicit positions")
    if not mask.causal:
        lacks.append("causal=False")
    if lacks:
        raise ValueError(
            f"implementation={implementation!r} cannot honour {' and '.join(lacks)}:"
            " use 'reference'"
        )
    return kernel


def _check_shapes(query_BTNH, key_BSKH, value_BSKH, mask, sinks_N) -> None:
    if query_BTNH.ndim != 4 or key_BSKH.ndim != 4:
        raise ValueError(
            f"query {query_BTNH.shape} and key {key_BSKH.shape}: expected four axes, BTNH and BSKH"
        )
    B, T, N, H = query_BTNH.shape
    S, K = key_BSKH.shape[1:3]
    if key_BSKH.shape != (B, S, K, H):
        raise ValueError(f"key {key_BSKH.shape}: expected B={B} and H={H} as in the query")
    if value_BSKH.shape != key_BSKH.shape:
        raise ValueError(f"value {value_BSKH.shape}: expected the key's shape {key_BSKH.shape}")
    if N % K:
        raise ValueError(f"{N} query heads over {K} key/value heads: not a multiple")
    if sinks_N is not None and sinks_N.shape != (N,):
        raise ValueError(f"sinks {sinks_N.shape}: expected one per query head, ({N},)")
    mask.check_lengths(T, S)
    for name, length in (
        ("query_positions_BT", T),
        ("key_positions_BS", S),
        ("query_segments_BT", T),
        ("key_segments_BS", S),
    ):
        field = getattr(mask, name)
        if field is not None and field.shape not in ((B, length), (1, length)):
            raise ValueError(
                f"mask.{name} {field.shape}: expected ({B}, {length}) or (1, {length})"
            )
