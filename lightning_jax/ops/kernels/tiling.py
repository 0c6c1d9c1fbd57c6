"""Block sizes of the attention kernels, and the measurements behind them."""

from __future__ import annotations

import dataclasses

# Blocks are whole vector registers wide, so that no row ends in a scalar remainder.
_LANES = 16
# Keys of one visit, and the longest span of keys that short query blocks serve best.
_SHORT_QUERY, _SHORT_KEYS, _SHORT_SPAN = 64, 224, 1280
_LONG_QUERY, _LONG_KEYS = 128, 256


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How `xla_banded` cuts the score matrix; changes speed and memory, never the result.

    Attributes:
        query: query positions per block.
        key: keys per visit; a query block makes as many visits as its visible keys need.

    Raises:
        ValueError: a size below 1.
    """

    query: int
    key: int

    def __post_init__(self):
        for name in ("query", "key"):
            if getattr(self, name) < 1:
                raise ValueError(f"block size {name}={getattr(self, name)}: must be at least 1")


def block_sizes(length: int, window: int | None, head_dim: int) -> BlockSizes:
    """Block sizes for rows of `length` tokens and `window` visible keys (None for all).

    A query block of P positions computes window + P - 1 scores a query, so short blocks waste
    least; long ones reuse each key more. Either way the scores of one visit and of eight query
    heads stay below half a megabyte: they are written and read several times, and the second level
    cache holds one or two such arrays.

    Measured on an AVX2 core, float32, 8 query and 2 key/value heads of 64, length 4096;
    milliseconds of processor time forward, and forward with backward:

        window   128 x 640    64 x 576     64 x 288     64 x 192     64 x 144     32 x 272
        512      110, 329     91, 284      87, 272      87, 269      89, 275      84, 267

    and on two such cores, seconds:

        window   64 x 256     64 x 512     64 x 1024    128 x 256    256 x 256
        None     0.46, 1.23   0.46, 1.37   0.49, 1.40   0.44, 1.21   0.40, 1.29
    """
    span = min(length, window or length) - 1
    short = span + _SHORT_QUERY <= _SHORT_SPAN
    query, keys = (_SHORT_QUERY, _SHORT_KEYS) if short else (_LONG_QUERY, _LONG_KEYS)
    # Larger heads make larger slices of keys and values: the visit shrinks to keep them in cache.
    keys = max(_LANES, keys * 64 // max(head_dim, 64))
    query = min(query, _round_up(length, _LANES))
    visits = -(-(span + query) // keys)
    return BlockSizes(query=query, key=_round_up(-(-(span + query) // visits), _LANES))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
