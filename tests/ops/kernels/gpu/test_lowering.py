"""Every variant of the GPU kernels lowers to Triton for CUDA, on a jaxlib that knows only CPUs."""

import functools

import jax
import jax.numpy as jnp
import pytest

from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu.attention import sliding_window_attention
from lightning_jax.ops.kernels.gpu.decode import paged_decode, ring_decode

slow = functools.partial(pytest.param, marks=pytest.mark.slow)
B, N, K = 2, 8, 2


def _lowered(function, *shapes):
    """Text of the module; shapes are (shape, dtype) or None."""
    structs = [None if x is None else jax.ShapeDtypeStruct(*x) for x in shapes]
    return jax.jit(function).trace(*structs).lower(lowering_platforms=("cuda",)).as_text()


def _attention(H, dtype, window, length, packed, with_sinks, cap, offset=0):
    def loss(query, key, value, sinks, segments):
        out = sliding_window_attention(
            query,
            key,
            value,
            window=window,
            query_segments_BT=None if segments is None else segments[:, offset:],
            key_segments_BS=segments,
            sinks_N=sinks,
            scale=H**-0.5,
            logit_softcap=cap,
            query_offset=offset,
        )
        return out.astype(jnp.float32).sum()

    arguments = (0, 1, 2, 3) if with_sinks else (0, 1, 2)
    sizes = (length - offset, N), (length, K), (length, K)
    heads = [((B, *size, H), dtype) for size in sizes]
    sinks = ((N,), jnp.float32) if with_sinks else None
    segments = ((B, length), jnp.int32) if packed else None
    return _lowered(jax.grad(loss, arguments), *heads, sinks, segments)


@pytest.mark.parametrize(
    "device, H, window",
    [
        ("hopper", 128, 1024),
        ("hopper", 64, 128),
        slow("hopper", 256, None),
        slow("ampere", 64, None),
        slow("ampere", 128, 1024),
        slow("ampere", 256, 128),
        slow("small", 64, 128),
        slow("small", 128, None),
        slow("small", 256, 1024),
    ],
)
def test_every_row_of_the_table_with_all_features(device, H, window, monkeypatch):
    monkeypatch.setattr(gpu_blocks, "device_class", lambda: device)
    text = _attention(H, jnp.bfloat16, window, 2000, packed=True, with_sinks=True, cap=30.0)
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("window, packed", [(1024, True), slow(None, False)])
def test_the_last_queries(window, packed):
    text = _attention(
        128, jnp.bfloat16, window, 2000, packed, with_sinks=True, cap=None, offset=1023
    )
    assert text.count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.float16)])
def test_plain_attention_of_other_dtypes(dtype):
    text = _attention(128, dtype, 1024, 2048, packed=False, with_sinks=False, cap=None)
    assert text.count("__gpu$xla.gpu.triton") == 3


def test_vmap():
    def attend(query, key, value):
        return sliding_window_attention(query, key, value, window=100, scale=0.1)

    heads = [((3, B, 300, count, 64), jnp.bfloat16) for count in (N, K, K)]
    assert "__gpu$xla.gpu.triton" in _lowered(jax.vmap(attend), *heads)


@pytest.mark.parametrize(
    "H, T, quantized, units",
    [(128, 1, True, None), (64, 4, False, None), (256, 1, False, None), (64, 2, True, 3)],
)
def test_decode(H, T, quantized, units):
    cache = jnp.int8 if quantized else jnp.bfloat16
    positions = ((B, T), jnp.int32)
    query = ((B, T, N, H), jnp.bfloat16)

    def ring(query, key, value, at, stored, segments, scales, unit):
        return ring_decode(
            query,
            key,
            value,
            unit=unit,
            query_positions_BT=at,
            key_positions_BS=stored,
            query_segments_BT=at,
            key_segments_BS=segments,
            key_scales_BSK=scales,
            value_scales_BSK=scales,
            window=1000,
            scale=H**-0.5,
            logit_softcap=30.0,
        )

    def paged(query, key, value, at, pages, scales):
        return paged_decode(
            query,
            key,
            value,
            query_positions_BT=at,
            pages_BJ=pages,
            key_scales=scales,
            value_scales=scales,
            scale=H**-0.5,
        )

    lead, unit = ((B,), None) if units is None else ((units, B), ((), jnp.int32))
    slots, rings = ((B, 1024), jnp.int32), ((*lead, 1024, K, H), cache)
    scales = ((*lead, 1024, K), jnp.float32) if quantized else None
    assert "__gpu$xla.gpu.triton" in _lowered(
        ring, query, rings, rings, positions, slots, slots, scales, unit
    )
    pages = ((99, 64, K, H), cache)
    scales = ((99, 64, K), jnp.float32) if quantized else None
    assert "__gpu$xla.gpu.triton" in _lowered(
        paged, query, pages, pages, positions, ((B, 40), jnp.int32), scales
    )
