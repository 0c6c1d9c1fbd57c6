"""The input of training and evaluation: one row of packed text, or a batch of rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Arrays `[T]` of a row or `[B, T]` of a batch; a pytree, of numpy or jax arrays.

    `tokens` int32 are the inputs, `targets` int32 the next tokens; `segment_ids` int32 number the
    documents of a row from 1, 0 is padding; `positions` int32 count from 0 in each segment;
    `loss_mask` float32 is 1 where there is a target, 0 on padding.
    """

    tokens: Any
    targets: Any
    segment_ids: Any
    positions: Any
    loss_mask: Any

    @classmethod
    def empty(cls, *shape: int) -> Batch:
        """Returns padding: zeros of numpy in the dtypes above."""
        ids = (np.zeros(shape, np.int32) for _ in cls._fields[:-1])
        return cls(*ids, loss_mask=np.zeros(shape, np.float32))
