"""Attention over caches, however the tokens came in, against the dense mask over the whole row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import cached_attention
from lightning_jax.ops.cached_attention import attend
from lightning_jax.ops.kv_cache import KV, Chunk, Full, Ring, Stored
from tests.ops.kernels.dense_attention import dense_attention, window_mask
from tests.targets import HOPPER, TPU

B, N, K, H = 3, 4, 2, 8
LENGTH, WINDOW = 30, 7


@functools.cache
def rows():
    """Queries, keys, values and documents of whole rows; the last row ends early."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, LENGTH, heads, H)) for heads in (N, K, K))
    segment_BT = np.ones((B, LENGTH), np.int32)
    segment_BT[0, 11:] = 2
    segment_BT[2, 17:] = 0
    return query, key, value, segment_BT


def oracle(window, sinks_N):
    """The answer to every query in float64."""
    query, key, value, segment_BT = rows()
    visible_BTS = window_mask(LENGTH, window, segment_BT)
    return dense_attention(
        query, key, value, query, visible_BTS=visible_BTS, scale=H**-0.5, sinks=sinks_N
    )[0]


@functools.partial(jax.jit, static_argnames=("window", "implementation"))
def step(cache, query, kv, chunk, sinks_N, window, implementation):
    cache, view = cache.update(kv, jnp.int32(1), chunk, window)
    # Keys at hand are attended to by ops.attention, which has other implementations.
    named = implementation if hasattr(view, "chunk") else None
    return cache, attend(query, view, sinks_N=sinks_N, implementation=named)


def answers(cache, widths, window, sinks_N, implementation, dtype="float32"):
    query, key, value, segment_BT = (
        jnp.asarray(x, x.dtype if x.dtype == np.int32 else dtype) for x in rows()
    )
    out, start = np.zeros((B, LENGTH, N, H)), 0
    before_BS = jnp.zeros((B, cache.size), jnp.int32)
    for width in widths:
        here = slice(start, start + width)
        chunk = Chunk.append(jnp.full(B, start, jnp.int32), segment_BT[:, here], before_BS)
        kv = KV(key[:, here], value[:, here])
        cache, made = step(cache, query[:, here], kv, chunk, sinks_N, window, implementation)
        out[:, here], before_BS, start = made, chunk.after_BS, start + width
    return out


CACHES = {"ring": (Ring, WINDOW, WINDOW), "full": (Full, LENGTH, None), "wide": (Full, 41, WINDOW)}
WIDTHS = {"one by one": (1,) * LENGTH, "chunks": (9, 9, 9, 3), "whole": (LENGTH,)}


@pytest.mark.parametrize(
    "implementation", [None, pytest.param("reference", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("kind", CACHES)
def test_any_way_in_gives_the_dense_answer(kind, widths, implementation, monkeypatch):
    # Several blocks, of which the last overlaps the one before it.
    monkeypatch.setattr(cached_attention, "block_size", lambda rows, size: min(size, 4))
    make, size, window = CACHES[kind]
    cache = make.init(2, B, size, K, H, "float32")
    sinks_N = jnp.linspace(-1.0, 1.0, N) if kind == "ring" else None
    got = answers(cache, widths, window, sinks_N, implementation)
    np.testing.assert_allclose(got, oracle(window, sinks_N), atol=2e-6)
    assert not got[2, 17:].any()


def test_bfloat16_is_as_near_as_its_keys():
    cache = Full.init(2, B, LENGTH, K, H, "bfloat16")
    got = answers(cache, (9, 9, 9, 3), None, None, "blocked", "bfloat16")
    np.testing.assert_allclose(got, oracle(None, None), atol=0.03)


def test_the_decode_kernels_read_the_same_cache(monkeypatch):
    """In interpret mode, through the same call as on their devices."""
    from lightning_jax.ops.kernels.tpu import decode

    kernel = functools.partial(decode.ring_decode, interpret=True)
    monkeypatch.setattr(decode, "ring_decode", kernel)
    cache = Full.init(2, B, LENGTH, K, H, "float32")
    got = answers(cache, (9, 9, 9, 3), None, None, "pallas_tpu")
    np.testing.assert_allclose(got, oracle(None, None), atol=2e-5)


def _shapes(units, T, heads, slots, kv_heads, head_size):
    """Queries, and a view of a bfloat16 cache, of shapes without values."""
    shape = jax.ShapeDtypeStruct
    query = shape((1, T, heads, head_size), jnp.bfloat16)
    keys = shape((units, 1, slots, kv_heads, head_size), jnp.bfloat16)
    tokens, held = shape((1, T), jnp.int32), shape((1, slots), jnp.int32)
    chunk = Chunk(shape((1,), jnp.int32), tokens, held, held)
    view = Stored(Full(keys, keys, "bfloat16"), shape((), jnp.int32), chunk, None)
    return query, view


def _program(mesh, *sizes):
    """What `attend` becomes on the devices of a mesh, as text."""
    with jax.sharding.use_abstract_mesh(mesh):
        return str(jax.make_jaxpr(attend)(*_shapes(*sizes)))


TPU_KERNEL, GPU_KERNEL = "name=cache_decode", "name=decode_attention"


@pytest.mark.parametrize(
    "T, heads, kv_heads, slots, head_size, on_tpu, on_gpu",
    [
        (1, 8, 2, 384, 64, True, True),
        # 1,024 rows of all heads on a TPU, 128 of a key head on a GPU, and one query more.
        (128, 8, 2, 384, 64, True, False),
        (129, 8, 2, 384, 64, False, False),
        (32, 64, 16, 384, 128, False, True),
        (33, 64, 16, 384, 128, False, False),
        # Head sizes: any on a TPU, powers of two on a GPU.
        (1, 8, 2, 384, 16, True, True),
        (1, 8, 2, 384, 96, True, False),
        # Fast memory of a TPU does not hold slots that cannot be cut into pages.
        (1, 32, 32, 2001, 128, False, True),
    ],
)
def test_the_choice_is_the_kernel_where_it_fits(
    T, heads, kv_heads, slots, head_size, on_tpu, on_gpu
):
    sizes = 3, T, heads, slots, kv_heads, head_size
    for mesh, kernel, expected in ((TPU, TPU_KERNEL, on_tpu), (HOPPER, GPU_KERNEL, on_gpu)):
        text = _program(mesh, *sizes)
        assert (kernel in text) == expected
        assert ("pallas_call" in text) == expected


@pytest.mark.parametrize("implementation", [None, "reference"])
def test_a_decode_step_takes_no_unit_out_of_its_stack(implementation):
    units, slots, kv_heads, head_size = 3, 384, 2, 128
    query, view = _shapes(units, 1, 8, slots, kv_heads, head_size)
    kv = KV(*[jax.ShapeDtypeStruct((1, 1, kv_heads, head_size), jnp.bfloat16)] * 2)

    def step(cache, query, kv, chunk, unit):
        cache, view = cache.update(kv, unit, chunk, None)
        return cache, attend(query, view, implementation=implementation)

    with jax.sharding.use_abstract_mesh(TPU):
        traced = jax.jit(step).trace(view.cache, query, kv, view.chunk, view.unit)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    one = f"tensor<1x1x{slots}x{kv_heads}x{head_size}xbf16>"
    # The reference shows that a unit taken out would be found.
    in_place = implementation is None
    assert (one in text) != in_place
    assert ("tpu_custom_call" in text) == in_place


def test_names_are_checked_and_nothing_falls_back():
    cache, _ = Full.init(1, 1, 4, K, H, "float32"), None
    chunk = Chunk.append(jnp.zeros(1, jnp.int32), jnp.ones((1, 1), jnp.int32), jnp.zeros((1, 4)))
    _, view = cache.update(KV(*(jnp.ones((1, 1, K, H)),) * 2), jnp.int32(0), chunk, None)
    with pytest.raises(ValueError, match="xla_banded.*one of reference, blocked"):
        attend(jnp.ones((1, 1, N, H)), view, implementation="xla_banded")


def test_cost_follows_filled_keys_and_blocks_fit():
    assert cached_attention.block_size(4, 16384) == 256
    assert cached_attention.block_size(512, 16384) == 512
    assert cached_attention.block_size(512, 100) == 100
