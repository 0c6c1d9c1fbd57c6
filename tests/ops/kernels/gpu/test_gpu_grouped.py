"""Grouped matmuls for GPUs: run as plain JAX against float64, and lowered for CUDA."""

import jax
import jax.numpy as jnp
import pytest

from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu import grouped
from lightning_jax.ops.kernels.gpu.grouped import Tiles
from tests.ops.kernels import grouped_cases as cases


def _mlp(rows, size_E, w, biases=(), **options):
    tiles = Tiles(16, 16, 16, 4, 1)
    options |= {"interpret": True, "dot_tiles": tiles, "outer_tiles": tiles}
    return grouped.grouped_mlp(rows, jnp.asarray(size_E), w, biases, **options)


@pytest.mark.parametrize("name", cases.SIZES)
def test_matches_the_oracle_and_reads_no_row_past_the_last_group(name):
    cases.check(_mlp, name, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_rows_with_float32_weights(dtype):
    cases.check(_mlp, "random", dtype)


@pytest.mark.parametrize("name", ["random", "no row"])
def test_biases_and_the_clamped_unit(name):
    cases.check_biases(_mlp, name, 0.5)


def test_a_unit_of_stacked_weights():
    cases.check_unit(_mlp)


@pytest.mark.parametrize("device", ["hopper", "ampere", "small"])
@pytest.mark.parametrize(
    ("rows", "dtype", "sizes", "units"),
    [
        (1000, jnp.bfloat16, (512, 384), None),
        (1000, jnp.bfloat16, (200, 100), None),
        (40, jnp.float16, (256, 128), 3),
        (500, jnp.float32, (128, 64), None),
    ],
)
def test_forward_and_gradients_lower_for_cuda(device, rows, dtype, sizes, units, monkeypatch):
    monkeypatch.setattr(gpu_blocks, "device_class", lambda: device)
    (D, F), lead = sizes, (8,) if units is None else (units, 8)
    shape = jax.ShapeDtypeStruct
    w = [shape((*lead, *s), jnp.float32) for s in ((D, F), (D, F), (F, D))]
    biases = [shape((*lead, size), jnp.float32) for size in (F, F, D)]

    def loss(rows, w, biases, size_E, unit):
        unit = None if units is None else unit
        y = grouped.grouped_mlp(rows, size_E, tuple(w), tuple(biases), clamp=7.0, unit=unit)
        return y.astype(jnp.float32).sum()

    arguments = (shape((rows, D), dtype), w, biases, shape((8,), jnp.int32), shape((), jnp.int32))
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Projections, down, its gradient, that of the rows, and two of weights.
    assert text.count("__gpu$xla.gpu.triton") == 6


def test_other_dtypes_are_refused():
    w = [jnp.zeros((2, 4, 4))] * 3
    with pytest.raises(ValueError, match="pallas_gpu: dtypes int32: must all be the same, bfl"):
        grouped.grouped_mlp(jnp.zeros((4, 4), jnp.int32), jnp.zeros(2, jnp.int32), w)
