"""bfloat16 in loops on a CPU: helpers that keep XLA from widening whole buffers.

XLA's CPU back end widens operations that it does not have in bfloat16, copies included: a
`dynamic_update_slice` of bfloat16 becomes one of float32 between two conversions of the *whole*
buffer, in every iteration of a loop. So buffers that a loop writes hold the bits (`to_bits`).
Products stay in bfloat16 where the processor multiplies it; elsewhere their operands are widened by
hand, which the caller can do outside of its loop (`operand`).
"""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from lightning_jax.ops.kernels.common import precision
from lightning_jax.runtime import target

# Processor flags of instructions that multiply bfloat16: x86, then Arm.
_MULTIPLIES = {"avx512_bf16", "amx_bf16", "bf16"}
_CPUINFO = Path("/proc/cpuinfo")


def operand(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns x rounded to `dtype`, in the dtype that this machine multiplies fastest.

    That is `dtype` or, for bfloat16 on a processor without such products, float32: a float32
    product of bfloat16 values is exact, so it is the same product.
    """
    wide = jnp.dtype(dtype) == jnp.bfloat16 and not multiplies_bfloat16()
    return x.astype(dtype).astype(jnp.float32 if wide else dtype)


def multiplies_bfloat16() -> bool:
    """False if the target is a CPU without bfloat16 products; a CPU is taken to be this machine."""
    return target.current().platform != "cpu" or _this_cpu_multiplies_bfloat16()


@functools.cache
def _this_cpu_multiplies_bfloat16() -> bool:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = (line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features")))
    return not _MULTIPLIES.isdisjoint(next(flags, ()))


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
    """left @ right of two matrices of one dtype, accumulated in at least float32."""
    return jnp.dot(
        left,
        right,
        precision=precision(left.dtype),
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def transposed(x: jax.Array) -> jax.Array:
    """x.T, written out.

    A product that contracts the rows of both operands runs at two thirds of the speed of one that
    finds its left operand already transposed, on XLA's CPU back end; left to itself, XLA takes
    the transposition into the product.
    """
    return jax.lax.optimization_barrier(x.T)


def to_bits(x: jax.Array) -> jax.Array:
    """A bfloat16 array as uint16 of the same bits; any other as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The inverse of `to_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if x.dtype == jnp.uint16 else x


def put(
    bits: jax.Array, rows: jax.Array, start: jax.Array, dtype: jnp.dtype, axis: int = 0
) -> jax.Array:
    """Writes `rows`, rounded to `dtype`, at `start` into a buffer made by `to_bits`."""
    rows = to_bits(rows.astype(dtype))
    return jax.lax.dynamic_update_slice_in_dim(bits, rows, start, axis)
