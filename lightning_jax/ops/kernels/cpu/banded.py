"""Causal attention in plain XLA that only visits the keys a query can see.

Query blocks are taken one after another. A block looks at its visible keys in one or more visits,
each a slice of the keys counted backwards from the block's last query, with a running softmax.
So time and memory grow as length x window; without a window only the blocks on or below the
diagonal are visited. No array is length x length. The backward pass recomputes the probabilities
of each block from the saved log-sum-exp (Dao et al., "FlashAttention", arXiv:2205.14135, section 3
and appendix B.4; the running softmax is Milakov & Gimelshein, arXiv:1805.02867).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.ops.kernels.common import FLOOR, HIDDEN, check_band, precision
from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.kernels.cpu.blocks import BlockSizes, block_sizes


class _Layout(NamedTuple):
    """Everything static: the trace is specialised to it."""

    offset: int
    window: int
    scale: float
    softcap: float | None
    blocks: BlockSizes


def banded_attention(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    window: int | None = None,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float | None = None,
    logit_softcap: float | None = None,
    query_offset: int = 0,
    blocks: BlockSizes | None = None,
) -> jax.Array:
    """Causal grouped-query attention: query t, which is key s = t + offset, sees s-window+1 .. s.

    Differentiable (reverse mode only) in query, key, value and sinks. Time follows the pairs that
    the queries see; keys that none of them sees are copied once and get gradients of exactly 0.

    Args:
        query_BTNH: queries; N is a multiple of K.
        key_BSKH: keys, S = T + `query_offset`.
        value_BSKH: values.
        window: visible keys per query, self included; None for all.
        query_segments_BT: document of each query; 0 is padding, which sees nothing.
        key_segments_BS: document of each key; 0 is padding, which nobody sees.
        sinks_N: a logit per head that joins only the softmax denominator.
        scale: factor of the scores; H**-0.5 by default.
        logit_softcap: c of c * tanh(score / c), applied to scaled scores (Gemma Team, "Gemma 2",
            arXiv:2408.00118, section 2); None: no soft-cap.
        query_offset: keys before the first query.
        blocks: block sizes; `cpu.blocks.block_sizes` by default.

    Returns:
        out_BTNH in the dtype of the queries; 0 where a query sees nothing. Scores, softmax and
        sums are float32; products take their operands in the input dtype.

    Raises:
        ValueError: a window below 1; a negative offset; another number of keys than T + offset.
    """
    (T, N, H), (S, K) = query_BTNH.shape[1:], key_BSKH.shape[1:3]
    check_band("xla_banded", T, S, window, query_offset)
    layout = _Layout(
        offset=query_offset,
        window=min(window or S, S),
        scale=H**-0.5 if scale is None else float(scale),
        softcap=None if logit_softcap is None else float(logit_softcap),
        blocks=blocks or block_sizes(T, window, H, N // K, query_offset),
    )
    segments = None if query_segments_BT is None else (query_segments_BT, key_segments_BS)
    return _banded(layout, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments)


# Axes of this module besides the usual ones: P query positions of a block, S keys of one visit (all
# keys in the caller's arrays), L padded keys. Scores are stored keys first (BKSGP), and keys and
# values in both orders (BKLH, BKHL) where both are needed: then every product of both passes finds
# its operands in the order that a CPU multiplies fastest. With scores stored queries first, those
# of the backward pass that sum over queries run at half speed.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _banded(layout, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments):
    return _forward(layout, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments)[0]


def _forward(layout, query_BTNH, key_BSKH, value_BSKH, sinks_N, segments):
    """Returns the output and the residuals of the backward pass."""
    K, dtype = key_BSKH.shape[2], query_BTNH.dtype
    queries = _pad_queries(query_BTNH, layout)
    padding = _key_padding(query_BTNH, layout)
    key_BKLH = _pad_keys(key_BSKH, padding)
    value_BKHL = _pad_keys_last(value_BSKH, padding)
    segments = _pad_segments(segments, layout)

    def one_block(out_bits, block):
        query_BKGPH = _rows(queries, block, K, layout)

        def visit(index, state):
            top_BKGP, total_BKGP, sum_BKHGP = state
            start = _start(block, index, layout)
            scores_BKSGP = _scores(layout, start, query_BKGPH, key_BKLH)
            scores_BKSGP += _hidden(layout, block, start, segments)
            new_top_BKGP = jnp.maximum(top_BKGP, jnp.max(scores_BKSGP, axis=2))
            weights_BKSGP = jnp.exp(scores_BKSGP - new_top_BKGP[:, :, None])
            decay_BKGP = jnp.exp(top_BKGP - new_top_BKGP)
            value_BKHS = _keys_at(value_BKHL, start, layout, axis=3)
            seen_BKHGP = _dot(
                "BKHS,BKSGP->BKHGP", value_BKHS, weights_BKSGP.astype(value_BKHS.dtype)
            )
            return (
                new_top_BKGP,
                decay_BKGP * total_BKGP + jnp.sum(weights_BKSGP, axis=2),
                decay_BKGP[:, :, None] * sum_BKHGP + seen_BKHGP,
            )

        B, _, G, P, H = query_BKGPH.shape
        rows = (B, K, G, P)
        state = _full(rows, FLOOR), _full(rows, 0.0), _full((B, K, H, G, P), 0.0)
        top_BKGP, total_BKGP, sum_BKHGP = _visit_all(layout, block, visit, state)
        out_BKHGP, lse_BKGP = _normalise(top_BKGP, total_BKGP, sum_BKHGP, sinks_N)
        return _put_rows(out_bits, out_BKHGP, block, layout, dtype), lse_BKGP

    blocks = jnp.arange(queries.shape[1] // layout.blocks.query)
    out_bits, lse = lax.scan(one_block, _no_rows(queries, dtype), blocks)
    out_BTNH = narrow.from_bits(out_bits[:, : query_BTNH.shape[1]], dtype)
    return out_BTNH, (query_BTNH, key_BSKH, value_BSKH, sinks_N, segments, out_BTNH, lse)


def _backward(layout, saved, dout_BTNH):
    query_BTNH, key_BSKH, value_BSKH, sinks_N, segments, out_BTNH, lse = saved
    T, K, dtype = query_BTNH.shape[1], key_BSKH.shape[2], query_BTNH.dtype
    queries, outs, douts = (_pad_queries(x, layout) for x in (query_BTNH, out_BTNH, dout_BTNH))
    padding = _key_padding(query_BTNH, layout)
    key_BKLH, value_BKLH = (_pad_keys(x, padding) for x in (key_BSKH, value_BSKH))
    key_BKHL = _pad_keys_last(key_BSKH, padding)

    def one_block(carry, block_and_lse):
        dquery_bits, *dkey_dvalue = carry
        block, lse_BKGP = block_and_lse
        query_BKGPH, out_BKGPH, dout_BKGPH = (
            _rows(x, block, K, layout) for x in (queries, outs, douts)
        )
        delta_BKGP = jnp.sum(
            dout_BKGPH.astype(jnp.float32) * out_BKGPH.astype(jnp.float32), axis=-1
        )

        def visit(index, state):
            dquery_BKHGP, dkey_BKLH, dvalue_BKLH = state
            start = _start(block, index, layout)
            scores_BKSGP = _scores(layout, start, query_BKGPH, key_BKLH)
            hidden_B1S1P = _hidden(layout, block, start, segments)
            weights_BKSGP = jnp.exp(scores_BKSGP + hidden_B1S1P - lse_BKGP[:, :, None])
            value_BKSH = _keys_at(value_BKLH, start, layout, axis=2)
            dweights_BKSGP = _dot("BKSH,BKGPH->BKSGP", value_BKSH, dout_BKGPH)
            dscores_BKSGP = layout.scale * weights_BKSGP * (dweights_BKSGP - delta_BKGP[:, :, None])
            if layout.softcap is not None:
                dscores_BKSGP *= 1 - jnp.square(scores_BKSGP / layout.softcap)
            dscores_BKSGP = dscores_BKSGP.astype(query_BKGPH.dtype)
            weights_BKSGP = weights_BKSGP.astype(dout_BKGPH.dtype)
            key_BKHS = _keys_at(key_BKHL, start, layout, axis=3)
            dkey_BKSH = _dot("BKSGP,BKGPH->BKSH", dscores_BKSGP, query_BKGPH)
            dvalue_BKSH = _dot("BKSGP,BKGPH->BKSH", weights_BKSGP, dout_BKGPH)
            return (
                dquery_BKHGP + _dot("BKHS,BKSGP->BKHGP", key_BKHS, dscores_BKSGP),
                _add_at(dkey_BKLH, start, dkey_BKSH),
                _add_at(dvalue_BKLH, start, dvalue_BKSH),
            )

        state = (_full(jnp.moveaxis(query_BKGPH, -1, 2).shape, 0.0), *dkey_dvalue)
        dquery_BKHGP, *dkey_dvalue = _visit_all(layout, block, visit, state)
        dquery_bits = _put_rows(dquery_bits, dquery_BKHGP, block, layout, dtype)
        return (dquery_bits, *dkey_dvalue), delta_BKGP

    zeros = _full(key_BKLH.shape, 0.0), _full(value_BKLH.shape, 0.0)
    (dquery_bits, dkey_BKLH, dvalue_BKLH), delta = lax.scan(
        one_block, (_no_rows(queries, dtype), *zeros), (jnp.arange(lse.shape[0]), lse)
    )
    return (
        narrow.from_bits(dquery_bits[:, :T], dtype),
        _unpad_keys(dkey_BKLH, key_BSKH, layout),
        _unpad_keys(dvalue_BKLH, value_BSKH, layout),
        _sink_gradient(sinks_N, lse, delta),
        None,
    )


_banded.defvjp(_forward, _backward)


def _start(block, visit, layout):
    """Where the keys of a visit start in the padded arrays: visit 0 ends with the block."""
    return _end(block, layout) - visit * layout.blocks.key


def _end(block, layout):
    """The key after the last one that a query block can see."""
    return layout.offset + (block + 1) * layout.blocks.query


def _visit_all(layout, block, visit, state):
    """Folds `visit` over the slices of keys that a query block can see."""
    P, S = layout.blocks.query, layout.blocks.key
    visits = -(-(layout.window - 1 + P) // S)
    if visits == 1:
        return visit(0, state)
    return lax.fori_loop(0, jnp.minimum(visits, -(-_end(block, layout) // S)), visit, state)


def _scores(layout, start, query_BKGPH, key_BKLH):
    """Scaled and capped scores of one visit, hidden pairs too."""
    key_BKSH = _keys_at(key_BKLH, start, layout, axis=2)
    scores_BKSGP = layout.scale * _dot("BKSH,BKGPH->BKSGP", key_BKSH, query_BKGPH)
    if layout.softcap is None:
        return scores_BKSGP
    return layout.softcap * jnp.tanh(scores_BKSGP / layout.softcap)


def _hidden(layout, block, start, segments):
    """The addend of the scores of one visit: 0 for visible pairs, HIDDEN for hidden ones."""
    P, S = layout.blocks.query, layout.blocks.key
    key_S = start - S + jnp.arange(S)
    query_P = layout.offset + block * P + jnp.arange(P)
    distance_SP = query_P[None] - key_S[:, None]
    visible_SP = (distance_SP >= 0) & (distance_SP < layout.window) & (key_S >= 0)[:, None]
    visible_BSP = visible_SP[None]
    if segments is not None:
        query_BT, key_BL = segments
        query_BP = lax.dynamic_slice_in_dim(query_BT, block * P, P, 1)
        key_BS = _keys_at(key_BL, start, layout, axis=1)
        same_BSP = key_BS[:, :, None] == query_BP[:, None]
        visible_BSP = visible_BSP & same_BSP & (key_BS != 0)[:, :, None]
    hidden_BSP = jnp.where(visible_BSP, 0.0, HIDDEN).astype(jnp.float32)
    # Written out once: if fused, the comparisons would be repeated for every head and reader.
    return lax.optimization_barrier(hidden_BSP)[:, None, :, None]


def _normalise(top_BKGP, total_BKGP, sum_BKHGP, sinks_N):
    """Ends the running softmax; returns output and log-sum-exp, both 0 where nothing was seen."""
    if sinks_N is not None:
        sinks_1KG1 = _sinks_like(sinks_N, top_BKGP)
        new_top_BKGP = jnp.maximum(top_BKGP, sinks_1KG1)
        decay_BKGP = jnp.exp(top_BKGP - new_top_BKGP)
        sum_BKHGP = decay_BKGP[:, :, None] * sum_BKHGP
        total_BKGP = decay_BKGP * total_BKGP + jnp.exp(sinks_1KG1 - new_top_BKGP)
        top_BKGP = new_top_BKGP
    seen_BKGP = total_BKGP > 0
    total_BKGP = jnp.where(seen_BKGP, total_BKGP, 1.0)
    lse_BKGP = jnp.where(seen_BKGP, top_BKGP + jnp.log(total_BKGP), 0.0)
    return sum_BKHGP / total_BKGP[:, :, None], lse_BKGP


def _sink_gradient(sinks_N, lse, delta):
    """-sum of (share of the sink in the softmax) x delta; both are stacked blocks of BKGP."""
    if sinks_N is None:
        return None
    share = jnp.exp(_sinks_like(sinks_N, lse) - lse)
    return -jnp.sum(share * delta, axis=(0, 1, 4)).reshape(sinks_N.shape).astype(sinks_N.dtype)


def _sinks_like(sinks_N, x):
    """Sinks in a shape that broadcasts against an array that ends in the axes KGP."""
    K, G = x.shape[-3:-1]
    return sinks_N.astype(jnp.float32).reshape(*[1] * (x.ndim - 3), K, G, 1)


def _pad_queries(x_BTNH, layout):
    """Pads queries to whole blocks of positions."""
    return jnp.pad(x_BTNH, ((0, 0), (0, -x_BTNH.shape[1] % layout.blocks.query), (0, 0), (0, 0)))


def _rows(x_BTNH, block, K, layout):
    """One block of a padded query-side array as x_BKGPH, the operand of a product."""
    P = layout.blocks.query
    x_BPNH = lax.dynamic_slice_in_dim(x_BTNH, block * P, P, 1)
    x_BPNH = narrow.operand(x_BPNH, x_BPNH.dtype)
    B, _, N, H = x_BPNH.shape
    x_BPKGH = x_BPNH.reshape(B, P, K, N // K, H)
    return x_BPKGH.transpose(0, 2, 3, 1, 4)


def _no_rows(queries_BTNH, dtype):
    """A buffer for results of the shape of the padded queries."""
    return narrow.to_bits(jnp.zeros(queries_BTNH.shape, dtype))


def _put_rows(bits_BTNH, x_BKHGP, block, layout, dtype):
    """Writes one block of results."""
    B, K, H, G, P = x_BKHGP.shape
    x_BPNH = x_BKHGP.transpose(0, 4, 1, 3, 2).reshape(B, P, K * G, H)
    return narrow.put(bits_BTNH, x_BPNH, block * layout.blocks.query, dtype, axis=1)


def _pad_keys(x_BSKH, padding):
    """To x_BKLH."""
    x_BKSH = narrow.operand(x_BSKH, x_BSKH.dtype).swapaxes(1, 2)
    return jnp.pad(x_BKSH, ((0, 0), (0, 0), padding, (0, 0)))


def _pad_keys_last(x_BSKH, padding):
    """The same as x_BKHL."""
    B, S, K, H = x_BSKH.shape
    # Written out before it is padded: XLA's padding of a transposed array goes by single elements.
    x_BXS = lax.optimization_barrier(
        narrow.operand(x_BSKH, x_BSKH.dtype).reshape(B, S, K * H).swapaxes(1, 2)
    )
    x_BXL = jnp.pad(x_BXS, ((0, 0), (0, 0), padding))
    return x_BXL.reshape(B, K, H, x_BXL.shape[2])


def _key_padding(query_BTX, layout):
    """Padding: a visit's keys in front, which keep every slice inside, and up to whole blocks."""
    return layout.blocks.key, -query_BTX.shape[1] % layout.blocks.query


def _unpad_keys(dx_BKLH, x_BSKH, layout):
    """Inverse of `_pad_keys` for a gradient, in the shape and dtype of `x_BSKH`."""
    first, S = layout.blocks.key, x_BSKH.shape[1]
    return dx_BKLH[:, :, first : first + S].swapaxes(1, 2).astype(x_BSKH.dtype)


def _pad_segments(segments, layout):
    if segments is None:
        return None
    query_BT, key_BS = segments
    front, back = _key_padding(query_BT, layout)
    return jnp.pad(query_BT, ((0, 0), (0, back))), jnp.pad(key_BS, ((0, 0), (front, back)))


def _full(shape, value):
    return jnp.full(shape, value, jnp.float32)


def _keys_at(x, start, layout, axis):
    return lax.dynamic_slice_in_dim(x, start, layout.blocks.key, axis)


def _add_at(x_BKLH, start, update_BKSH):
    old_BKSH = lax.dynamic_slice_in_dim(x_BKLH, start, update_BKSH.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(x_BKLH, old_BKSH + update_BKSH, start, 2)


def _dot(spec, left, right):
    return jnp.einsum(
        spec, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )
