"""Which blocks the GPU kernels visit: those with visible pairs, unmasked where all are visible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu.blocks import Band, Tile
from tests.ops.kernels.dense_attention import window_mask

SIDES = {"keys": gpu_blocks.key_span, "queries": gpu_blocks.query_span}


def _spans(side, tile, band, segments):
    size, count = (tile.query, band.queries) if side == "keys" else (tile.key, band.keys)
    if segments is None:
        blocks = jnp.arange(-(-count // size))
        spans = jax.vmap(lambda block: SIDES[side](block, tile, band))(blocks)
        return np.stack(spans, -1)[None]
    sizes, sides = (tile.query, tile.key), (segments[:, band.offset :], segments)
    if side == "queries":
        sizes, sides = sizes[::-1], sides[::-1]
    spans_of = jax.jit(lambda *rows: gpu_blocks.packed_spans(SIDES[side], *rows, sizes, tile, band))
    return np.asarray(spans_of(*sides))


def _check(side, tile, length, window, segments, offset=0):
    """Returns visited and needed blocks, after checking that the first contain the second."""
    visible = window_mask(length, window, segments, offset)
    sizes = (tile.query, tile.key)
    if side == "queries":
        visible, sizes = visible.swapaxes(1, 2), sizes[::-1]
    spans = _spans(side, tile, Band(length - offset, offset, window), segments)
    length = visible.shape[2]
    visited = needed = 0
    for mask, row in zip(visible, spans, strict=True):
        for block, (begin, full_begin, full_end, end) in enumerate(row):
            assert 0 <= begin <= full_begin <= full_end <= end <= -(-length // sizes[1])
            own = mask[block * sizes[0] : (block + 1) * sizes[0]]
            seen = [own[:, at : at + sizes[1]] for at in range(0, length, sizes[1])]
            assert not any(part.any() for part in seen[:begin] + seen[end:])
            for part in seen[full_begin:full_end]:
                assert part.all() and part.shape[1] == sizes[1]
            # Keys' blocks are read without a mask, so queries past the end must not follow them.
            assert side == "keys" or full_end * sizes[1] <= length
            visited += end - begin
            needed += sum(part.any() for part in seen)
    return visited, needed


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("length, window", [(130, 1), (130, 33), (128, 64), (97, 97), (20, 7)])
def test_one_document_visits_what_is_needed(side, length, window):
    for tile in (Tile(32, 16, 4, 1), Tile(16, 64, 4, 1)):
        visited, needed = _check(side, tile, length, window, None)
        assert visited == needed


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "offset", [1, 33, 129, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 32, 64, 100))]
)
def test_the_last_queries_visit_what_is_needed(side, offset):
    documents = np.repeat([1, 2, 3, 0], [30, 60, 36, 4])[None].astype(np.int32)
    for window in (1, 33, 64, 130):
        for tile in (Tile(32, 16, 4, 1), Tile(16, 64, 4, 1)):
            visited, needed = _check(side, tile, 130, window, None, offset)
            assert visited == needed
        _check(side, Tile(32, 16, 4, 1), 130, window, documents, offset)


@pytest.mark.parametrize("side", SIDES)
def test_packed_documents(side):
    documents = np.repeat([1, 2, 3, 4, 0], [5, 64, 40, 81, 10])
    rows = np.stack([documents, 0 * documents, np.full_like(documents, 7)]).astype(np.int32)
    for window in (33, len(documents)):
        visited, needed = _check(side, Tile(32, 16, 4, 1), len(documents), window, rows)
        assert visited == needed


@pytest.mark.parametrize("side", SIDES)
def test_documents_in_any_order_lose_nothing(side):
    rng = np.random.default_rng(0)
    rows = np.stack([np.repeat(rng.integers(0, 4, 23), 9)[:200] for _ in range(3)])
    _check(side, Tile(16, 32, 4, 1), 200, 90, rows.astype(np.int32))


@pytest.mark.parametrize("device", ["hopper", "ampere", "small"])
def test_the_table_has_every_head_size_window_and_width(device):
    for head_dim in (16, 64, 128, 256):
        for window in (1, 128, 4096):
            for itemsize in (2, 4):
                tiles = gpu_blocks.tiles_for(device, head_dim, window, itemsize)
                assert tiles.forward.warps in (4, 8)


def test_bad_tile_is_named():
    with pytest.raises(ValueError, match="key=48"):
        Tile(query=64, key=48, warps=4, stages=1)
