"""Grouped matmuls for TPUs, run as plain JAX, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.kernels.tpu import grouped, grouped_blocks
from lightning_jax.ops.kernels.tpu.grouped import Tiles, list_visits
from tests.ops.kernels import grouped_cases as cases

S, E = 8192, 16


def _mlp(rows, size_E, w, biases=(), **options):
    options |= {"interpret": True, "tiles": Tiles(16, 8, 128)}
    return grouped.grouped_mlp(rows, jnp.asarray(size_E), w, biases, **options)


@pytest.mark.parametrize("name", cases.SIZES)
def test_matches_the_oracle_and_reads_no_row_past_the_last_group(name):
    cases.check(_mlp, name, jnp.float32)


def test_bfloat16_rows_with_float32_weights():
    cases.check(_mlp, "random", jnp.bfloat16)


@pytest.mark.parametrize("name", ["random", "no row"])
def test_biases_and_the_clamped_unit(name):
    cases.check_biases(_mlp, name, 0.5)


def test_columns_of_several_blocks_and_a_loop_over_contracted_ones(monkeypatch):
    monkeypatch.setattr(grouped, "CHUNK", 128)
    cases.check_wide(_mlp)


def test_a_unit_of_stacked_weights():
    cases.check_unit(_mlp)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("name", cases.SIZES)
def test_visits_cover_every_row_once_in_order(name, empty):
    size, tile = np.asarray(cases.SIZES[name], np.int32), 16
    visits, count = list_visits(jnp.asarray(size), cases.M, tile, empty=empty, fill=not empty)
    steps = list(zip(*(np.asarray(x)[: int(count)] for x in visits), strict=True))
    rows = [
        (expert, tile * at + row) for expert, at, low, high, *_ in steps for row in range(low, high)
    ]
    owners = np.repeat(np.arange(cases.E), size)
    assert rows == list(zip(owners, range(len(owners)), strict=True))
    if empty:
        assert sorted({step[0] for step in steps}) == list(range(cases.E))
        for which in (-2, -1):  # Each expert has one first and one last step.
            assert [step[0] for step in steps if step[which]] == list(range(cases.E))
    else:
        assert [step[1] for step in steps if step[-2]] == [0, 1, 2]


def test_other_dtypes_are_refused():
    w = [jnp.zeros((2, 4, 4))] * 3
    with pytest.raises(ValueError, match="pallas_tpu: dtypes float16: must all be the same, bfl"):
        grouped.grouped_mlp(jnp.zeros((4, 4), jnp.float16), jnp.zeros(2, jnp.int32), w)


@pytest.mark.parametrize(("D", "F"), [(2**16, 128), (128, 2**16)])
def test_widths_without_room_in_fast_memory_are_refused_in_one_line(D, F):
    shapes = ((S, D), (E, D, F), (E, D, F), (E, F, D))
    rows, *w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    size_E = jax.ShapeDtypeStruct((E,), jnp.int32)
    with pytest.raises(ValueError, match="65536 columns need .* MiB of fast memory") as refused:
        jax.eval_shape(lambda r, s, *w: grouped.grouped_mlp(r, s, w), rows, size_E, *w)
    assert "\n" not in str(refused.value)


def test_tiles_are_of_fewer_rows_where_more_do_not_fit():
    """The largest widths of each height that libtpu compiles for a v5e, to the nearest 512."""
    two = grouped_blocks.Arrays(rows=2, weights=2, results=1)

    def rows(K, dtype):
        tiles = grouped_blocks.tiles_for(dtype)
        return grouped_blocks.cut(tiles, two, S, K, 512, dtype, jnp.float32)[0]

    assert [rows(K, jnp.bfloat16) for K in (15872, 16384, 24064)] == [512, 256, 256]
    assert rows(15872, jnp.float32) == 256
    for K, dtype in ((24576, jnp.bfloat16), (16384, jnp.float32)):
        with pytest.raises(ValueError, match=f"{K} columns need 9. MiB"):
            rows(K, dtype)
