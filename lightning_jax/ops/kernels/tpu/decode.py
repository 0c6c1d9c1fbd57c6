"""Attention of one or few queries over a cache on a TPU: rings, and pools of pages.

A grid step takes a row of the batch and walks those pages that hold positions its queries can see;
the next page is on its way while one is computed with. All heads share a page's copy and its two
products: a page is a matrix with a row for every (token, key/value head), and scores between a
query head and keys of another key/value head are hidden. That takes K times the products, which a
TPU has to spare, and keys need not be taken apart by head. Pages are those of PagedAttention (Kwon
et al., arXiv:2309.06180).

Letters besides the usual ones: R rows, the queries of all heads in the order (key/value head, time,
head of the group); C columns of a page, in the order (token, key/value head); J pages of a row of
the batch; W lanes of a statistic.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from lightning_jax.ops.kernels import common
from lightning_jax.ops.kernels.common import HIDDEN, LOG2_E, UNBOUNDED
from lightning_jax.ops.kernels.tpu.decode_kernel import VMEM_BYTES, Static, walk_pages

MAX_ROWS = 1024
_SHARES = (512, 256, 128)  # slots of a ring that are one page
# Rows of a register that holds bfloat16, its smallest tile.
_SUBLANES = 16
# What two pages in flight, with keys and values, may take of fast memory, and a page's scores.
_PAGE_BYTES, _SCORE_BYTES = VMEM_BYTES // 2, VMEM_BYTES // 3


def fits(query_BTNH: jax.Array, key_BSKH: jax.Array) -> bool:
    """Whether `ring_decode` takes so many queries, and caches of that shape and dtype."""
    rows = query_BTNH.shape[1] * query_BTNH.shape[2]
    return rows <= MAX_ROWS and _page_fits(rows, _page_size(rows, key_BSKH), key_BSKH)


def ring_decode(
    query_BTNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    unit: jax.Array | None = None,
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    window: int | None,
    query_segments_BT: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
    key_scales_BSK: jax.Array | None = None,
    value_scales_BSK: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float,
    logit_softcap: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Attention of few queries to a cache where position p lies in slot p % S, theirs included.

    Not differentiable. The result is that of the dense mask over all slots, of which only shares
    with positions inside some query's window are read. To answer T queries a ring needs
    window + T - 1 slots, since it must still hold what the first one sees.

    Args:
        query_BTNH: queries, few: N x T is at most 1024.
        key_BSKH: cached keys in the queries' dtype, or int8 with `key_scales_BSK`. S is best a
            multiple of 128; other rings are read whole.
        value_BSKH: cached values, likewise.
        unit: int32 below U, the one of U caches that is read, in place: keys, values and scales
            then lead with an axis U, and all U units share the slots' positions and segments.
        query_positions_BT: int32 position of each query; negative ones see nothing.
        key_positions_BS: int32 position that each slot holds; `EMPTY_POSITION` if none.
        window: visible keys per query, self included; None for all.
        query_segments_BT: int32 document of each query; 0 sees nothing. None with
            `key_segments_BS` means that positions alone decide.
        key_segments_BS: document of the token in each slot, 0 for none.
        key_scales_BSK: float32 factor of each int8 key vector.
        value_scales_BSK: float32 factor of each int8 value vector.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive.
        logit_softcap: c in c x tanh(logit / c); None: no soft-cap.
        interpret: run as plain JAX on any device, or simulate a TPU's memories.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing.

    Raises:
        ValueError: more queries, another dtype, another sign or a longer share than the kernel can
            honour.
    """
    common.check_stack("pallas_tpu", key_BSKH, unit)
    B, S, K, H = key_BSKH.shape[-4:]
    share = _page_size(query_BTNH.shape[1] * query_BTNH.shape[2], key_BSKH)
    J = S // share
    pages_BJ = jnp.arange(B * J, dtype=jnp.int32).reshape(B, J)
    scales = [key_scales_BSK, value_scales_BSK]
    if unit is not None:
        pages_BJ += unit * (B * J)
        # Scales are copied in any case, to have them along columns: those of one unit, then.
        scales = [
            None if x is None else lax.dynamic_index_in_dim(x, unit, 0, False) for x in scales
        ]
    valid_BT = query_positions_BT >= 0
    if query_segments_BT is not None:
        valid_BT &= query_segments_BT != 0
    low_B, high_B = _bounds(query_positions_BT, valid_BT, window)
    start_B = low_B % S
    # Whole shares; a range that comes around into its first share meets it only once.
    count_B = jnp.minimum((start_B % share + high_B - low_B) // share + 1, J)
    slots = [
        jnp.broadcast_to(x_BS, (B, S)).reshape(B * J, share)
        for x_BS in (key_positions_BS, key_segments_BS)
        if x_BS is not None
    ]
    return _decode(
        query_BTNH,
        [x.reshape(-1, share, K, H) for x in (key_BSKH, value_BSKH)],
        [None if x is None else x.reshape(B * J, share, K) for x in scales],
        jnp.where(valid_BT, query_positions_BT, -1),
        query_segments_BT,
        slots,
        (start_B // share, jnp.where(high_B < 0, 0, count_B)),
        pages_BJ,
        sinks_N,
        (window, scale, logit_softcap, interpret),
    )


def paged_decode(
    query_BTNH: jax.Array,
    key_pages: jax.Array,
    value_pages: jax.Array,
    *,
    query_positions_BT: jax.Array,
    pages_BJ: jax.Array,
    window: int | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    sinks_N: jax.Array | None = None,
    scale: float,
    logit_softcap: float | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Attention of few queries to a pool of pages that holds all their earlier tokens, and them.

    Not differentiable. With a window only the pages inside it are looked up and read.

    Args:
        query_BTNH: queries, few: N x T is at most 1024.
        key_pages: [pages, page size, K, H] in the queries' dtype, or int8 with `key_scales`.
        value_pages: the same for values.
        query_positions_BT: int32 position of each query in its row; negative ones see nothing.
        pages_BJ: int32, page that holds positions j x page size and following of row b. Entries
            that no query can see are not read.
        window: visible keys per query, self included; None for all.
        key_scales: float32 [pages, page size, K], factor of each int8 key vector.
        value_scales: the same for values.
        sinks_N: per head logit that joins the softmax denominator only.
        scale: factor of the scores, positive.
        logit_softcap: c in c x tanh(logit / c); None: no soft-cap.
        interpret: run as plain JAX on any device, or simulate a TPU's memories.

    Returns:
        out_BTNH in the dtype of the queries; exactly 0 where a query sees nothing.

    Raises:
        ValueError: more queries, another dtype, another sign or a larger page than the kernel can
            honour.
    """
    page = key_pages.shape[1]
    valid_BT = query_positions_BT >= 0
    low_B, high_B = _bounds(query_positions_BT, valid_BT, window)
    first_B = low_B // page
    count_B = jnp.where(high_B < 0, 0, high_B // page - first_B + 1)
    return _decode(
        query_BTNH,
        (key_pages, value_pages),
        (key_scales, value_scales),
        query_positions_BT,
        None,
        [],
        (first_B, count_B),
        pages_BJ,
        sinks_N,
        (window, scale, logit_softcap, interpret),
    )


def _page_size(rows, key_BSKH):
    """Slots of a ring that are one page: all, unless a share divides them and fits."""
    S = key_BSKH.shape[-3]
    shares = (size for size in _SHARES if S % size == 0 and _page_fits(rows, size, key_BSKH))
    return next(shares, S)


def _page_fits(rows, page, key_BSKH):
    """Whether fast memory holds pages of a cache and their scores."""
    K, H = key_BSKH.shape[-2:]
    key_bytes = page * K * H * key_BSKH.dtype.itemsize
    return 4 * key_bytes <= _PAGE_BYTES and 4 * rows * page * K <= _SCORE_BYTES


def _bounds(positions_BT, valid_BT, window):
    """First and last position that a row's queries see; the last is -1 where there is none."""
    high_B = jnp.max(jnp.where(valid_BT, positions_BT, -1), axis=1)
    low_B = jnp.min(jnp.where(valid_BT, positions_BT, UNBOUNDED), axis=1)
    low_B = jnp.minimum(low_B, high_B)
    if window is None:
        low_B = jnp.zeros_like(low_B)
    else:
        low_B -= window - 1
    return jnp.maximum(low_B, 0), high_B


def _decode(
    query_BTNH, pool, scales, positions_BT, segments_BT, slots, walk, pages_BJ, sinks_N, options
):
    """Lays queries out as rows and pages as matrices, and runs the kernel."""
    window, scale, softcap, interpret = options
    B, T, N, H = query_BTNH.shape
    page, K = pool[0].shape[1:3]
    _check(query_BTNH, pool, scales, scale, softcap)
    static = Static(
        window=window or UNBOUNDED,
        factor=scale * LOG2_E if softcap is None else scale / softcap,
        softcap=softcap,
        page=page,
        stored=bool(slots),
        segments=len(slots) == 2,
        quantized=scales[0] is not None,
    )
    rows_BRH = _to_rows(query_BTNH, K)
    per_row = [jnp.arange(N) // (N // K), positions_BT[:, :, None]]
    per_row += [segments_BT[:, :, None]] if static.segments else []
    # Rows that only fill a register belong to no head.
    rows_BRX = jnp.concatenate(
        [_to_rows(jnp.broadcast_to(x, (B, T, N))[..., None], K, fill=-1) for x in per_row], axis=2
    )
    sinks = jnp.full((N,), HIDDEN) if sinks_N is None else sinks_N.astype(jnp.float32) * LOG2_E
    sinks_1R1 = _to_rows(jnp.broadcast_to(sinks, (1, T, N))[..., None], K, fill=HIDDEN)
    column_C = jnp.arange(page * K, dtype=jnp.int32)
    columns_2C = jnp.stack([column_C % K, column_C // K])
    matrices = [x.reshape(-1, page * K, H) for x in pool]
    matrices += [x.reshape(-1, 1, page * K) for x in scales if x is not None]
    matrices += [jnp.repeat(x, K, axis=1)[:, None] for x in slots]
    out_BRH = walk_pages(
        static, walk, pages_BJ, rows_BRH, rows_BRX, sinks_1R1[0], columns_2C, matrices, interpret
    )
    out_BKTGH = out_BRH[:, : N * T].reshape(B, K, T, N // K, H)
    return out_BKTGH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _to_rows(x_BTNH, K, fill: float = 0):
    """Rows in the order (key/value head, time, head of the group), filled to whole registers."""
    B, T, N, H = x_BTNH.shape
    x_BRH = x_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B, T * N, H)
    return jnp.pad(x_BRH, ((0, 0), (0, -T * N % _SUBLANES), (0, 0)), constant_values=fill)


def _check(query_BTNH, pool, scales, scale, logit_softcap) -> None:
    T, N = query_BTNH.shape[1:3]
    common.check_rows("pallas_tpu", T, N, MAX_ROWS)
    common.check_dtypes("pallas_tpu", [query_BTNH], (jnp.bfloat16, jnp.float32))
    common.check_cache("pallas_tpu", query_BTNH, pool, scales)
    common.check_scores("pallas_tpu", scale, logit_softcap)
    page = pool[0].shape[1]
    if not _page_fits(T * N, page, pool[0]):
        raise ValueError(
            f"pallas_tpu: pages of {page} tokens and their scores for {T * N} rows are more than"
            f" fast memory holds; a ring is cut into pages if its slots are a multiple of 128"
        )
