"""Grouped-query softmax attention: one call, several ways to compute it."""

from __future__ import annotations

import difflib
import functools
import logging

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.ops.kernels import xla_banded
from lightning_jax.ops.mask import Mask

_logger = logging.getLogger(__name__)

IMPLEMENTATIONS = ("reference", "xla_banded")

# From this length on xla_banded is the faster of the two on a CPU, with and without gradients: 1.3
# to 4 times at 256 (no window to window 32); at 128 without a window gradients are slower by 1.6.
_BANDED_FROM_LENGTH = 256

# Far below any score, yet its difference to another such number is finite.
_HIDDEN = -1e30


def dot_product_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    mask: Mask,
    *,
    sinks_N: jax.Array | None = None,
    scale: float | None = None,
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
        sinks_N: per head logit that joins the softmax denominator only, so a head may attend to
            nothing (OpenAI, "gpt-oss model card", arXiv:2508.10925).
        scale: factor of the scores, H**-0.5 by default.
        implementation: "reference" (all pairs at once, any mask), "xla_banded" (blocks of pairs in
            plain XLA, causal masks without positions), or None to choose by mask and length.

    Returns:
        out_BTNH in the queries' dtype. A query that sees nothing gets exactly 0, and sends no
        gradient anywhere, sinks included.

    Raises:
        ValueError: shapes that do not fit; an unknown implementation; one that cannot honour a
            feature of the mask.
    """
    _check_shapes(query_BTNH, key_BSKH, value_BSKH, mask, sinks_N)
    T, S, H = query_BTNH.shape[1], key_BSKH.shape[1], query_BTNH.shape[-1]
    if scale is None:
        scale = H**-0.5
    if implementation is None:
        implementation = _choose(mask.aligned, mask.causal, T, mask.window)
    if implementation == "reference":
        mask_BTS = mask.as_array(T, S)
        return _reference(query_BTNH, key_BSKH, value_BSKH, mask_BTS, sinks_N, scale)
    if implementation == "xla_banded":
        _check_banded(mask)
        return xla_banded.banded_attention(
            query_BTNH,
            key_BSKH,
            value_BSKH,
            window=mask.window,
            query_segments_BT=mask.query_segments_BT,
            key_segments_BT=mask.key_segments_BS,
            sinks_N=sinks_N,
            scale=scale,
        )
    close = difflib.get_close_matches(str(implementation), IMPLEMENTATIONS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(
        f"implementation={implementation!r}: expected one of {', '.join(IMPLEMENTATIONS)}{hint}"
    )


def _reference(query_BTNH, key_BSKH, value_BSKH, mask_BTS, sinks_N, scale):
    """All scores at once; the definition that every other implementation is tested against."""
    B, T, N, H = query_BTNH.shape
    K = key_BSKH.shape[2]
    query_BTKGH = query_BTNH.reshape(B, T, K, N // K, H)
    visible = mask_BTS[:, None, None]
    scores_BKGTS = scale * _dot("BTKGH,BSKH->BKGTS", query_BTKGH, key_BSKH)
    scores_BKGTS = jnp.where(visible, scores_BKGTS, _HIDDEN)
    top_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        sinks = sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
        top_BKGT1 = jnp.maximum(top_BKGT1, sinks)
    top_BKGT1 = lax.stop_gradient(top_BKGT1)
    weights_BKGTS = jnp.where(visible, jnp.exp(scores_BKGTS - top_BKGT1), 0.0)
    total_BKGT1 = jnp.sum(weights_BKGTS, axis=-1, keepdims=True)
    if sinks_N is not None:
        total_BKGT1 += jnp.exp(sinks - top_BKGT1)
    # Only a query that sees nothing has a total of 0, and 0 / 1 is what it should get.
    weights_BKGTS /= jnp.where(total_BKGT1 == 0, 1.0, total_BKGT1)
    out_BTKGH = _dot("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(value_BSKH.dtype), value_BSKH)
    return out_BTKGH.reshape(B, T, N, H).astype(query_BTNH.dtype)


def _dot(spec, left, right):
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


@functools.cache
def _choose(aligned: bool, causal: bool, length: int, window: int | None) -> str:
    # Cached so that each kind of call is logged once, however often it is traced.
    banded = aligned and causal and length >= _BANDED_FROM_LENGTH
    choice = "xla_banded" if banded else "reference"
    _logger.info(
        "attention: %s for %s %s queries, length %d, window %s",
        choice,
        "causal" if causal else "bidirectional",
        "aligned" if aligned else "positioned",
        length,
        window,
    )
    return choice


def _check_banded(mask: Mask) -> None:
    if not mask.aligned:
        raise ValueError(
            "implementation='xla_banded' cannot honour explicit positions: use 'reference'"
        )
    if not mask.causal:
        raise ValueError("implementation='xla_banded' cannot honour causal=False: use 'reference'")


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
    if mask.aligned and T != S:
        raise ValueError(f"mask without positions: {T} queries need as many keys, not {S}")
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
