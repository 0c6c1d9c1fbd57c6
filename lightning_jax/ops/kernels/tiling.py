"""Block sizes of the attention kernels, and the measurements behind them."""

from __future__ import annotations

import dataclasses

# Rows of one query block and the most keys that one visit takes.
_QUERY_ROWS = 128
_MAX_KEYS = 1024
# Blocks are whole vector registers wide, so that no row ends in a scalar remainder.
_LANES = 16


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How `xla_banded` cuts the score matrix; changes speed and memory, never the result.

    Attributes:
        query: query positions per block.
        key: keys per visit; a query block makes as many visits as its visible keys need.
    """

    query: int
    key: int

    def __post_init__(self):
        for name in ("query", "key"):
            if getattr(self, name) < 1:
                raise ValueError(f"block size {name}={getattr(self, name)}: must be at least 1")


def block_sizes(length: int, window: int | None, head_dim: int) -> BlockSizes:
    query = min(_QUERY_ROWS, _round_up(length, _LANES))
    span = min(length, window or length) - 1 + query
    visits = -(-span // _MAX_KEYS)
    return BlockSizes(query=query, key=_round_up(-(-span // visits), _LANES))


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
