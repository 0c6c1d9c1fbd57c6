"""Table `correctness` of suite `kernels_gpu`: the compiled kernels against float32 on the GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_timing import attempt
from benchmarks.measure import Options
from lightning_jax.ops.attention import dot_product_attention
from lightning_jax.ops.experts import grouped_mlp
from lightning_jax.ops.kernels.cpu.banded import banded_attention
from lightning_jax.ops.kernels.gpu.attention import sliding_window_attention
from lightning_jax.ops.mask import Mask

# Largest error over largest value. Half precision rounds the probabilities before they multiply.
LIMITS = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 2e-5}
_LENGTH, _BATCH = 1000, 2

# (window, query heads, key heads, head size, documents, sinks, soft-cap, dtype, query offset)
CASES = (
    (1, 8, 2, 128, True, False, None, "bfloat16", 0),
    (64, 8, 8, 64, False, True, None, "bfloat16", 0),
    (65, 8, 1, 64, True, True, None, "bfloat16", 0),
    (256, 8, 2, 128, True, True, None, "bfloat16", 0),
    (255, 8, 2, 256, True, False, None, "bfloat16", 0),
    (None, 8, 1, 128, True, False, 30.0, "bfloat16", 0),
    (None, 8, 8, 64, False, False, None, "bfloat16", 0),
    (5000, 4, 4, 256, False, True, 20.0, "bfloat16", 0),
    (300, 8, 2, 128, True, False, None, "float16", 0),
    (100, 4, 2, 64, True, True, None, "float32", 0),
    (None, 4, 1, 128, False, False, 30.0, "float32", 0),
    (200, 4, 2, 256, True, False, None, "float32", 0),
    (256, 8, 2, 128, True, True, None, "bfloat16", 255),
    (None, 8, 2, 64, True, False, None, "bfloat16", 700),
    (100, 4, 1, 128, False, True, None, "float32", 999),
)


# What is compared of attention.
_ATTENTION = ("out", "dquery", "dkey", "dvalue", "dsinks")

# (dtype, D, F, rows of each expert): of 1000 rows, some of no expert.
EXPERT_CASES = (
    ("bfloat16", 512, 384, (300, 0, 257, 128, 1, 200, 0, 100)),
    ("bfloat16", 200, 100, (0, 1000)),
    ("float16", 256, 128, (0,) * 8),
    ("bfloat16", 512, 384, (5, 1, 0, 2) * 8),
    ("float32", 128, 96, (500, 3, 0, 400)),
)


def correctness_rows(options: Options) -> list[dict[str, Any]]:
    """One row per case: error of the output and of each gradient over the largest value."""
    rows = []
    for window, N, K, H, packed, with_sinks, cap, dtype, offset in CASES:
        features = "".join(
            f"_{name}"
            for name, on in (
                ("packed", packed),
                ("sinks", with_sinks),
                ("cap", cap),
                (f"offset{offset}", offset),
            )
            if on
        )
        name = f"correctness_{dtype}_H{H}_G{N // K}_W{window or 'full'}{features}"
        if not options.wants(name):
            continue
        query, key, value, dout = _arrays(_BATCH, _LENGTH, N, K, H, dtype)
        arrays = [query[:, offset:], key, value, dout[:, offset:]]
        segments_BS = _documents(_BATCH, _LENGTH) if packed else None
        sinks_N = jnp.linspace(-1.0, 3.0, N) if with_sinks else None
        call = {"window": window, "segments_BS": segments_BS, "cap": cap}
        exact, ours = (functools.partial(attend, **call) for attend in (dense, _ours))
        make = functools.partial(_compare, dtype, ours, exact, arrays, sinks_N)
        rows.append(attempt("correctness", name, make))
    name = "correctness_bfloat16_long_W1024_packed"
    if options.wants(name):
        rows.append(attempt("correctness", name, _long))
    return rows + _experts_rows(options)


def _experts_rows(options: Options) -> list[dict[str, Any]]:
    """One row per case of grouped matmuls, like those of attention, against every expert's."""
    rows = []
    for dtype, D, F, sizes in EXPERT_CASES:
        name = f"correctness_experts_{dtype}_D{D}_F{F}_{'x'.join(map(str, sizes))}"
        if not options.wants(name):
            continue
        rng = np.random.default_rng(D + F)
        E, size_E = len(sizes), jnp.asarray(sizes, jnp.int32)
        shapes = ((_LENGTH, D), (E, D, F), (E, D, F), (E, F, D), (_LENGTH, D))
        arrays = [jnp.asarray(rng.normal(size=shape) * 0.3, dtype) for shape in shapes]

        def run(implementation, rows_SD, *weights, size_E=size_E):
            with jax.default_matmul_precision("highest"):
                return grouped_mlp(rows_SD, size_E, *weights, implementation=implementation)

        ours, exact = (functools.partial(run, kind) for kind in ("pallas_gpu", "onehot"))
        labels = ("out", "drows", "dgate", "dup", "ddown")
        make = functools.partial(_compare, dtype, ours, exact, arrays, labels=labels)
        rows.append(attempt("correctness", name, make))
    return rows


def dense(query_BTNH, key_BSKH, value_BSKH, sinks_N, *, window, segments_BS, cap) -> jax.Array:
    """Attention by all pairs at once, in float32 without TF32; the queries are the last of S."""
    offset = key_BSKH.shape[1] - query_BTNH.shape[1]
    segments = None, None
    if segments_BS is not None:
        segments = segments_BS[:, offset:], segments_BS
    mask = Mask(None, None, *segments, window=window, query_offset=offset)
    with jax.default_matmul_precision("highest"):
        return dot_product_attention(
            query_BTNH,
            key_BSKH,
            value_BSKH,
            mask,
            sinks_N=sinks_N,
            logit_softcap=cap,
            implementation="reference",
        )


def _ours(query_BTNH, key_BSKH, value_BSKH, sinks_N, *, window, segments_BS, cap) -> jax.Array:
    offset = key_BSKH.shape[1] - query_BTNH.shape[1]
    return sliding_window_attention(
        query_BTNH,
        key_BSKH,
        value_BSKH,
        window=window,
        query_segments_BT=None if segments_BS is None else segments_BS[:, offset:],
        key_segments_BS=segments_BS,
        sinks_N=sinks_N,
        scale=query_BTNH.shape[-1] ** -0.5,
        logit_softcap=cap,
        query_offset=offset,
    )


def _long() -> dict[str, Any]:
    """The benchmark's length, one row of it, against the banded form in float32."""
    arrays = _arrays(1, 16_384, 8, 2, 128, "bfloat16")
    segments_BT = _documents(1, 16_384)
    ours = functools.partial(_ours, window=1024, segments_BS=segments_BT, cap=None)

    def exact(query, key, value, sinks_N):
        with jax.default_matmul_precision("highest"):
            return banded_attention(
                query,
                key,
                value,
                window=1024,
                query_segments_BT=segments_BT,
                key_segments_BS=segments_BT,
            )

    return _compare("bfloat16", ours, exact, arrays, None)


def _compare(dtype, ours, exact, arrays, *more, labels=_ATTENTION) -> dict[str, Any]:
    *inputs, dout = arrays

    def both(attend, *inputs_and_dout):
        *inputs, dout = inputs_and_dout
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(dout.astype(out.dtype))

    wide = [x.astype(jnp.float32) for x in inputs]
    wanted = jax.jit(functools.partial(both, exact))(*wide, *more, dout.astype(jnp.float32))
    call = jax.jit(functools.partial(both, ours))
    found, again = (call(*inputs, *more, dout) for _ in range(2))
    errors = {
        label: _error(left, right)
        for label, left, right in zip(labels, found, wanted, strict=True)
        if right is not None
    }
    same = all(
        np.array_equal(np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    )
    limit = LIMITS[dtype]
    # `not above` and not `below`: a NaN fails.
    good = same and all(error <= limit for error in errors.values())
    return errors | {"limit": limit, "same_bits": same, "ok": good}


def _error(found: jax.Array, wanted: jax.Array) -> float:
    wanted = np.asarray(wanted, np.float64)
    difference = np.abs(np.asarray(found, np.float64) - wanted).max()
    # The exact answer can be 0: a window of 1 has no gradient of the scores.
    return float(difference / max(np.abs(wanted).max(), 0.1))


def _arrays(B: int, T: int, N: int, K: int, H: int, dtype: str) -> list[jax.Array]:
    rng = np.random.default_rng(T + N + H)
    return [jnp.asarray(rng.normal(size=(B, T, heads, H)), dtype) for heads in (N, K, K, N)]


def _documents(B: int, T: int) -> jax.Array:
    """Four documents that start inside blocks and some padding; the last row is turned by 37."""
    row = np.repeat([1, 2, 3, 4, 0], [5, T // 3, T // 7, T - T // 3 - T // 7 - 25, 20])
    rows = np.stack([np.roll(row, 37 if b else 0) for b in range(B)])
    return jnp.asarray(rows, jnp.int32)
