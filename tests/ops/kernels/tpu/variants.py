"""Compiles all variants of the TPU kernels for a chip; prints {variant: error or null} as JSON.

Sizes are the smallest that reach every branch: two blocks of queries and more, windows that fold,
cut tiles, or do not end.

    python tests/ops/kernels/tpu/variants.py v5e
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[4]))

import jax
import jax.numpy as jnp

from benchmarks.tpu_static import Case, compile_case
from lightning_jax.ops.kernels.tpu.attention import sliding_window_attention
from lightning_jax.ops.kernels.tpu.band import BlockSizes
from lightning_jax.ops.kernels.tpu.blocks import Blocks
from lightning_jax.ops.kernels.tpu.decode import paged_decode, ring_decode
from lightning_jax.ops.kernels.tpu.grouped import grouped_mlp

Shape = jax.ShapeDtypeStruct


def _attention(
    window=256,
    length=700,
    query_heads=2,
    kv_heads=1,
    head_size=128,
    tiles=1,
    stack=1,
    dtype=jnp.bfloat16,
    segments=False,
    sinks=False,
    softcap=None,
    offset=0,
):
    """Forward and backward with small tiles: the larger ones of the table run the same code."""
    blocks = Blocks(*[BlockSizes(tile=128, tiles=tiles, stack=stack, visit=1)] * 2)
    B, T, S = 2, length - offset, length
    query = Shape((B, T, query_heads, head_size), dtype)
    key = Shape((B, S, kv_heads, head_size), dtype)
    arguments = [query, key, key, query]
    arguments += [Shape((B, S), jnp.int32)] * segments + [
        Shape((query_heads,), jnp.float32)
    ] * sinks

    def function(query, key, value, dout, *rest):
        ids = rest[0] if segments else None

        def attend(query, key, value, *sinks_N):
            return sliding_window_attention(
                query,
                key,
                value,
                window=window,
                query_segments_BT=ids[:, offset:] if segments else None,
                key_segments_BS=ids,
                sinks_N=sinks_N[0] if sinks_N else None,
                scale=head_size**-0.5,
                logit_softcap=softcap,
                query_offset=offset,
                blocks=blocks,
            )

        out, pull = jax.vjp(attend, query, key, value, *rest[segments:])
        return out, pull(dout)

    return Case(function, tuple(arguments), 0, 0)


def _ring(
    queries=1, slots=1024, head_size=128, int8=False, segments=False, softcap=None, units=None
):
    B, N, K = 2, 16, 8
    lead = (B,) if units is None else (units, B)
    dtype = jnp.int8 if int8 else jnp.bfloat16
    names = {
        "query_positions_BT": Shape((B, queries), jnp.int32),
        "key_positions_BS": Shape((B, slots), jnp.int32),
    }
    if int8:
        scales = Shape((*lead, slots, K), jnp.float32)
        names |= {"key_scales_BSK": scales, "value_scales_BSK": scales}
    if segments:
        names |= {
            "query_segments_BT": Shape((B, queries), jnp.int32),
            "key_segments_BS": Shape((B, slots), jnp.int32),
        }
    if units:
        names["unit"] = Shape((), jnp.int32)
    cache = Shape((*lead, slots, K, head_size), dtype)
    query = Shape((B, queries, N, head_size), jnp.bfloat16)

    def function(query, key, value, *rest):
        options = dict(zip(names, rest, strict=True))
        return ring_decode(
            query, key, value, window=1000, scale=0.1, logit_softcap=softcap, **options
        )

    return Case(function, (query, cache, cache, *names.values()), 0, 0)


def _paged(queries=1, kv_heads=8, head_size=128, window=None, int8=False):
    B, N, J, page = 2, 16, 16, 128
    dtype = jnp.int8 if int8 else jnp.bfloat16
    scales = [Shape((B * J, page, kv_heads), jnp.float32)] * 2 if int8 else []
    pool = Shape((B * J, page, kv_heads, head_size), dtype)
    query = Shape((B, queries, N, head_size), jnp.bfloat16)

    def function(query, key, value, positions, pages, *scales):
        return paged_decode(
            query,
            key,
            value,
            query_positions_BT=positions,
            pages_BJ=pages,
            window=window,
            scale=0.1,
            **dict(zip(("key_scales", "value_scales"), scales, strict=False)),
        )

    positions, pages = Shape((B, queries), jnp.int32), Shape((B, J), jnp.int32)
    return Case(function, (query, pool, pool, positions, pages, *scales), 0, 0)


def _grouped(
    rows=1000, D=256, F=128, dtype=jnp.bfloat16, held=jnp.float32, biases=False, units=None
):
    """The experts' MLP with its gradients."""
    E = 8
    lead = (E,) if units is None else (units, E)
    shapes = [(rows, D), (*lead, D, F), (*lead, D, F), (*lead, F, D)]
    shapes += [(*lead, F), (*lead, F), (*lead, D)] * biases
    arrays = [Shape(shape, held if index else dtype) for index, shape in enumerate(shapes)]

    def function(size_E, unit, rows, *params):
        def mlp(rows, *params):
            chosen = None if units is None else unit
            return grouped_mlp(rows, size_E, params[:3], params[3:], unit=chosen)

        y, pull = jax.vjp(mlp, rows, *params)
        return y, pull(y)

    return Case(function, (Shape((E,), jnp.int32), Shape((), jnp.int32), *arrays), 0, 0)


VARIANTS = {
    "folded": functools.partial(_attention, tiles=2, query_heads=1),
    "folded with a loop": functools.partial(_attention, window=384, query_heads=1),
    "cut tiles": functools.partial(_attention, window=200, tiles=2, query_heads=1),
    "no window": functools.partial(_attention, window=None, query_heads=1),
    "window 1": functools.partial(_attention, window=1, length=200),
    "stacked heads in parts, all features": functools.partial(
        _attention, query_heads=4, stack=2, segments=True, sinks=True, softcap=30.0
    ),
    "head size 64": functools.partial(
        _attention, head_size=64, query_heads=2, kv_heads=2, window=None
    ),
    "half registers of one head": functools.partial(_attention, head_size=64),
    "head size 256": functools.partial(_attention, head_size=256, query_heads=1),
    "last queries, folded": functools.partial(_attention, offset=255, query_heads=1),
    "last queries, cut tiles": functools.partial(_attention, offset=150, window=200, tiles=2),
    "last queries, no window, all features": functools.partial(
        _attention,
        window=None,
        offset=333,
        query_heads=4,
        stack=2,
        segments=True,
        sinks=True,
        softcap=30.0,
    ),
    "one last query": functools.partial(_attention, offset=699),
    "float32": functools.partial(_attention, dtype=jnp.float32, query_heads=1),
    "ring": _ring,
    "ring, few queries, all features": functools.partial(
        _ring, queries=4, segments=True, softcap=30.0, int8=True
    ),
    "ring of other slots": functools.partial(_ring, slots=1000),
    "ring of one unit of three": functools.partial(_ring, units=3, segments=True, int8=True),
    "ring, as many queries as fit": functools.partial(_ring, queries=64, segments=True),
    "pages": _paged,
    "pages, window, int8": functools.partial(_paged, queries=3, window=500, int8=True),
    "pages of one head": functools.partial(_paged, kv_heads=1),
    "experts": _grouped,
    "experts of odd sizes, biases, a unit of three": functools.partial(
        _grouped, rows=37, D=96, F=72, held=jnp.bfloat16, biases=True, units=3
    ),
    "experts of odd widths": functools.partial(_grouped, D=1100, F=700),
    "experts in float32": functools.partial(_grouped, dtype=jnp.float32),
    "experts of one row": functools.partial(_grouped, rows=1),
    "pages of two heads of 64": functools.partial(_paged, kv_heads=2, head_size=64),
}


def _error(build, chip):
    try:
        compile_case(build(), chip)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:500]}"
    return None


if __name__ == "__main__":
    _, target = sys.argv
    # What differs between chips is how much they hold: one variant of the experts tells.
    chosen = [name for name in VARIANTS if target == "v5e" or not name.startswith("experts ")]
    print(json.dumps({name: _error(VARIANTS[name], target) for name in chosen}))
