"""Block sizes of the attention kernels, and the measurements behind them."""

from __future__ import annotations

import dataclasses

# Blocks are whole vector registers wide, so that no row ends in a scalar remainder.
_LANES = 16
# XLA computes a product on several cores from this many results on. A product has the scores of one
# key head's queries in one visit; the products of a batch run one after another.
_SPREAD = 2**17
# Query positions of short blocks, and the longest span of keys that they serve best.
_SHORT_QUERY, _SHORT_SPAN = 64, 1280
# Most keys per visit of short blocks: with many, and with few query heads per key head.
_SHORT_KEYS, _FEW_HEADS_KEYS = 640, 288
# Most rows per product (positions x query heads per key head) of long blocks, and most positions.
_LONG_ROWS, _LONG_QUERY = 512, 256


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


def block_sizes(
    queries: int, window: int | None, head_dim: int, group: int, offset: int = 0
) -> BlockSizes:
    """Block sizes for `queries` after `offset` keys, with `window` visible keys (None for all).

    A query block of P positions computes window + P - 1 scores per query, so short blocks waste
    least; long ones reuse each key more. A visit is just large enough for its products to use
    several cores, if `group` query heads per key head make that possible with short blocks. Rows no
    longer than the window are a triangle, not a band: shorter visits waste less of it. Queries
    after a whole window of keys (offset) are a band, however few they are.

    Measured on two AVX2 cores without offset, float32, 8 query heads of 64, milliseconds forward,
    and forward with backward (experiments.benchmark --suite=attention measures the first line):

        length, window, group   64 x 192   64 x 288   64 x 576   128 x 256   128 x 640   256 x 256
        4096, 512, 4            80, 249    76, 208    62, 169                69, 197
        2048, 512, 2            45, 128    42, 130    44, 123                39, 103
        2048, 512, 1            43, 138    43, 139    50, 160                48, 135
        2048, 512, 8            30, 90     28, 76     28, 78                 31, 87
        4 x 512, 512, 4         29, 91                           22, 64
        2048, None, 4                                            54, 156                 54, 155
        2048, None, 2                                            82, 253                 54, 153
    """
    keys = offset + queries
    span = min(keys, window or keys) - 1
    # Mean keys that a query sees without a window.
    average = (offset + keys) // 2
    # Larger heads make larger slices of keys and values: the visit shrinks to keep them in cache.
    shrink = max(head_dim, 64) / 64
    if span + _SHORT_QUERY <= _SHORT_SPAN and 2 * (span - offset) < queries:
        query = min(_SHORT_QUERY, _round_up(queries, _LANES))
        visit = min(_SPREAD // (query * group), _SHORT_KEYS if group >= 4 else _FEW_HEADS_KEYS)
        visits = max(1, round((span + query) * shrink / visit))
        visit = -(-(span + query) // visits)
    else:
        most = min(max(_LONG_ROWS // group, _SHORT_QUERY), _LONG_QUERY)
        query = _round_up(max(min(most, queries, average // 2), 1), _LANES)
        visit = int(min(_SPREAD // (query * group), average) / shrink)
    return BlockSizes(query=query, key=_round_up(max(visit, 1), _LANES))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
