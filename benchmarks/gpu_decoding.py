"""Table `decode` of suite `kernels_gpu`: one query per row against rings and pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import QUEUED, attempt, note, queue, runnable, timed
from benchmarks.measure import Call, Options
from lightning_jax.ops.attention import dot_product_attention
from lightning_jax.ops.kernels.gpu.decode import paged_decode, ring_decode
from lightning_jax.ops.mask import Mask

BATCH, QUERY_HEADS, KV_HEADS, HEAD_DIM, PAGE = 64, 32, 8, 128, 64
LENGTH, WINDOWS = 16_384, (1024, 4096)
SCALE = HEAD_DIM**-0.5
_COPIED = 2**28
_CHECKED_ROWS = 2


def decode_rows(options: Options) -> list[dict[str, Any]]:
    """Rows: rings of each window, then pages of long rows with a window and without."""
    rows = []
    for window in WINDOWS:
        for dtype in ("bfloat16", "int8"):
            name = f"decode_ring_{window}_{dtype}"
            if options.wants(name):
                make = functools.partial(_row, _ring, window, window, dtype, options)
                rows.append(attempt("decode", name, make))
    for window in (WINDOWS[0], None):
        for dtype in ("bfloat16", "int8"):
            name = f"decode_pages_{LENGTH}_{window or 'full'}_{dtype}"
            if options.wants(name):
                make = functools.partial(_row, _pages, window, window or LENGTH, dtype, options)
                rows.append(attempt("decode", name, make))
    return rows


def _row(cache, window, visible, dtype, options) -> dict[str, Any]:
    """Times the calls next to a copy of a large array, whose rate is the peak of the memory."""
    builders, error = cache(window, dtype)
    calls, reasons = runnable(builders)
    block = jnp.zeros((_COPIED,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    found = timed(calls | {"copy": queue(lambda: copy(block))}, options)
    width = HEAD_DIM * (1 if dtype == "int8" else 2) + (4 if dtype == "int8" else 0)
    useful = 2.0 * BATCH * visible * KV_HEADS * width
    # `gflops` divides any amount of work by time: here bytes, so GB/s.
    speed = found.gflops("ours", useful) * QUEUED
    memory = found.gflops("copy", 2.0 * 4 * _COPIED) * QUEUED
    others = [other for other in calls if other != "ours"]
    return {
        "ours_ms": found.median_ms("ours") / QUEUED,
        **{f"{other}_ms": found.median_ms(other) / QUEUED for other in others},
        "ours_gb_s": speed,
        "copy_gb_s": memory,
        "of_copy": speed / memory,
        **{f"vs_{other}": found.ratio(other, "ours") for other in others},
        "error": error,
        "ok": error <= 2e-2,
    } | note(reasons)


def _ring(window: int, dtype: str) -> tuple[dict[str, Callable[[], Call]], float]:
    """Full rings of `window` slots whose rows stand at different positions."""
    query, (key, value), scales = _arrays((BATCH, window), dtype)
    position_B = jnp.asarray(np.random.default_rng(1).integers(window, 10 * window, BATCH))
    query_BT = position_B[:, None].astype(jnp.int32)
    slot_1S = jnp.arange(window, dtype=jnp.int32)[None]
    stored_BS = query_BT - (query_BT - slot_1S) % window
    named = dict(zip(("key_scales_BSK", "value_scales_BSK"), scales, strict=False))
    decode = functools.partial(ring_decode, window=window, scale=SCALE)
    ours = jax.jit(
        lambda query, key, value, named: decode(
            query, key, value, query_positions_BT=query_BT, key_positions_BS=stored_BS, **named
        )
    )
    dense = jax.jit(functools.partial(_dense, window=window))
    exact = _exact(dense, query, key, value, scales, query_BT, stored_BS)
    builders = {"ours": lambda: queue(lambda: ours(query, key, value, named))}
    if dtype != "int8":
        builders["xla"] = lambda: queue(lambda: dense(query, key, value, query_BT, stored_BS))
    return builders, _error(ours(query, key, value, named), exact)


def _pages(window: int | None, dtype: str) -> tuple[dict[str, Callable[[], Call]], float]:
    """Rows of `LENGTH` tokens in pages that lie in random order."""
    count = LENGTH // PAGE
    query, (key, value), scales = _arrays((BATCH * count, PAGE), dtype)
    order = np.random.default_rng(2).permutation(BATCH * count).reshape(BATCH, count)
    pages_BJ = jnp.asarray(order, jnp.int32)
    query_BT = jnp.full((BATCH, 1), LENGTH - 1, jnp.int32)
    named = dict(zip(("key_scales", "value_scales"), scales, strict=False))
    decode = functools.partial(paged_decode, window=window, scale=SCALE)
    ours = jax.jit(
        lambda query, key, value, named: decode(
            query, key, value, query_positions_BT=query_BT, pages_BJ=pages_BJ, **named
        )
    )

    def rows(x):
        some = x[pages_BJ[:_CHECKED_ROWS]]
        return some.reshape(_CHECKED_ROWS, LENGTH, *x.shape[2:])

    stored_BS = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (_CHECKED_ROWS, 1))
    dense = jax.jit(functools.partial(_dense, window=window))
    exact = _exact(
        dense, query, rows(key), rows(value), [rows(x) for x in scales], query_BT, stored_BS
    )
    builders = {"ours": lambda: queue(lambda: ours(query, key, value, named))}
    if window is None and dtype != "int8":
        builders["jax_paged"] = lambda: _jax_paged(query, key, value, pages_BJ)
    return builders, _error(ours(query, key, value, named), exact)


def _jax_paged(query, key, value, pages_BJ) -> Call:
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    key, value = (jnp.copy(x.transpose(2, 0, 1, 3)) for x in (key, value))
    lengths_B = jnp.full((BATCH,), LENGTH, jnp.int32)
    scaled = (query[:, 0] * SCALE).astype(query.dtype)
    return queue(lambda: paged_attention(scaled, key, value, pages_BJ, lengths_B))


def _arrays(leading: tuple[int, int], dtype: str) -> tuple[jax.Array, list, list]:
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (BATCH, 1, QUERY_HEADS, HEAD_DIM), jnp.bfloat16)
    shape = (*leading, KV_HEADS, HEAD_DIM)
    cache = [jax.random.normal(k, shape, jnp.bfloat16) for k in keys[1:]]
    if dtype != "int8":
        return query, cache, []
    quantized = [_quantize(x) for x in cache]
    return query, [x for x, _ in quantized], [scale for _, scale in quantized]


@jax.jit
def _quantize(x):
    scale = jnp.max(jnp.abs(x).astype(jnp.float32), axis=-1) / 127
    return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def _dense(query, key, value, query_BT, stored_BS, *, window):
    mask = Mask(query_positions_BT=query_BT, key_positions_BS=stored_BS, window=window)
    return dot_product_attention(query, key, value, mask, scale=SCALE, implementation="reference")


def _exact(dense, query, key, value, scales, query_BT, stored_BS):
    """The exact answer of the first rows: float32 without TF32, from the rounded cache."""
    few = slice(0, _CHECKED_ROWS)
    wide = [x[few].astype(jnp.float32) for x in (key, value)]
    if scales:
        wide = [x * scale[few, ..., None] for x, scale in zip(wide, scales, strict=True)]
    with jax.default_matmul_precision("highest"):
        return dense(query[few].astype(jnp.float32), *wide, query_BT[few], stored_BS[few])


def _error(found, wanted) -> float:
    wanted = np.asarray(wanted, np.float64)
    found = np.asarray(found[:_CHECKED_ROWS], np.float64)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
