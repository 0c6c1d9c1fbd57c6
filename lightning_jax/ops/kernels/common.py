"""Shared by the attention kernels of all devices: constants, argument checks, arithmetic.

The error of every check gives the implementation (`name`), the argument and its value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LOG2_E = math.log2(math.e)
# Hidden scores are HIDDEN, running maxima never fall below FLOOR: the exponential of their
# difference is exactly 0 in float32, so a row that sees nothing needs no special case. Powers of
# two, because FLOOR x factor must be exact where it is fused into a sum: `fma(FLOOR, factor,
# -rounded(FLOOR x factor))` is then 0, and not a rounding error of 1e22 whose exponential is
# infinite.
HIDDEN = -(2.0**100)
FLOOR = -(2.0**98)
# Window of a decode kernel that has none: more than any position.
UNBOUNDED = 2**30
# Head sizes that Triton's tiles can hold: powers of two.
TRITON_HEAD_SIZES = (16, 32, 64, 128, 256)


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """The precision of a product of operands of `dtype`: float32 ones are multiplied as such.

    Left to itself a TPU rounds them to bfloat16, and a GPU to TF32.
    """
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two tiles over axis `contract[0]` of the left and `contract[1]` of the right.

    Sums are float32.
    """
    return lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision(left.dtype),
        preferred_element_type=jnp.float32,
    )


def sink_gradient(
    sinks_N: jax.Array | None, lse_BNT: jax.Array, delta_BNT: jax.Array
) -> jax.Array | None:
    """-sum of (share of the sink in the softmax) x delta, or None without sinks.

    `lse_BNT` is the log-sum-exp in base 2, `delta_BNT` the sum of out x dout over H.
    """
    if sinks_N is None:
        return None
    share_BNT = jnp.exp2(LOG2_E * sinks_N.astype(jnp.float32)[None, :, None] - lse_BNT)
    return -jnp.sum(share_BNT * delta_BNT, axis=(0, 2)).astype(sinks_N.dtype)


def check_band(name: str, queries: int, keys: int, window: int | None, query_offset: int) -> None:
    """Raises a ValueError unless the queries are the last of the keys, and see at least one."""
    if query_offset < 0:
        raise ValueError(f"{name}: query_offset={query_offset}: must not be negative")
    if queries + query_offset != keys:
        raise ValueError(
            f"{name}: {queries} queries for {keys} keys: at query_offset={query_offset} there must"
            f" be {queries + query_offset} keys"
        )
    if window is not None and window < 1:
        raise ValueError(f"{name}: window={window}: must be at least 1 (self), or None for all")


def check_dtypes(name: str, arrays: Sequence[Any], dtypes: Sequence[jnp.dtype]) -> None:
    """Raises a ValueError unless all arrays have one and the same of some dtypes."""
    found = [x.dtype for x in arrays]
    if found[0] not in dtypes or len(set(found)) > 1:
        expected = " or ".join(jnp.dtype(dtype).name for dtype in dtypes)
        raise ValueError(
            f"{name}: dtypes {', '.join(map(str, found))}: must all be the same, {expected}"
        )


def check_scores(name: str, scale: float, logit_softcap: float | None) -> None:
    """Raises a ValueError unless scale and soft-cap are positive."""
    if not scale > 0:
        raise ValueError(f"{name}: scale={scale}: must be positive")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"{name}: logit_softcap={logit_softcap}: must be positive, or None")


def check_head_size(name: str, head_size: int, sizes: Sequence[int]) -> None:
    """Raises a ValueError unless the head size is one of some sizes."""
    if head_size not in sizes:
        expected = ", ".join(map(str, sizes))
        raise ValueError(f"{name}: head size {head_size}: must be one of {expected}")


def check_rows(name: str, queries: int, heads: int, limit: int) -> None:
    """Raises a ValueError unless a decode step has at most `limit` rows, one per query and head."""
    if queries * heads > limit:
        raise ValueError(f"{name}: {queries} queries of {heads} heads: at most {limit} together")


def check_stack(name: str, key: jax.Array, unit: jax.Array | None) -> None:
    """Raises a ValueError unless a cache leads with an axis of units just where one is named."""
    axes = "BSKH" if unit is None else "UBSKH"
    if key.ndim != len(axes):
        given = "without" if unit is None else "with"
        raise ValueError(f"{name}: key cache of shape {key.shape} {given} a unit: must be {axes}")


def check_cache(
    name: str, query: jax.Array, cache: Sequence[jax.Array], scales: Sequence[jax.Array | None]
) -> None:
    """Raises a ValueError unless the cache has the queries' dtype, or is int8 with scales."""
    for part, x, factor in zip(("key", "value"), cache, scales, strict=True):
        expected = query.dtype if factor is None else jnp.dtype(jnp.int8)
        if x.dtype != expected:
            given = "without" if factor is None else "with"
            raise ValueError(f"{name}: {part} cache of {x.dtype} {given} scales: {expected}")
