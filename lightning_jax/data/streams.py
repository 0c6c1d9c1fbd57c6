"""A run's batches as a fixed number of streams, which any number of processes share out.

Stream v of V reads documents v, v + V, v + 2V ... of each source's order, packs and mixes them by
itself, and gives rows v * B / V to (v + 1) * B / V - 1 of every batch of B rows. So a batch, and
where each stream stands after it, depend on the config alone: a process makes those streams of
which its devices hold rows, and the positions are saved by stream, whoever made it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lightning_jax.config.errors import UserError
from lightning_jax.data.batch import Batch


def needed(rows: Sequence[int], each: int) -> list[int]:
    """Returns the numbers of the streams, of `each` rows in a batch, that give these rows."""
    return sorted({row // each for row in rows})


def rows_before(weights: Mapping[str, float], each: int, count: int) -> list[dict[str, int]]:
    """Returns, for each of `count` streams, by source, the rows that it counts as taken already.

    Streams that began to mix alike would all take the row of a small source at the same step. So
    stream v begins where one mix of all rows would be after v * each rows, and the rows of a batch
    are as well mixed as consecutive rows of that mix.
    """
    taken, before = dict.fromkeys(weights, 0), []
    for row in range(each * (count - 1) + 1):
        if row % each == 0:
            before.append(dict(taken))
        taken[furthest_behind(taken, weights, 1)] += 1
    return before


def furthest_behind(taken: Mapping[str, float], weights: Mapping[str, float], row: float) -> str:
    """Returns the source whose turn it is, after `taken` of each; `row` is the size of a row."""
    # The half-row offset centres each source in its interval: a 10% source first appears at row 5,
    # not at row 1 or 10.
    turns = {name: (count + row / 2) / weights[name] for name, count in taken.items()}
    return min(turns, key=turns.__getitem__)


class StreamsIterator(grain.DatasetIterator):
    """Batches of some rows, from the streams that give them.

    The state is `{"streams": {number: state of that stream}}`. It may be set to that of any other
    process or processes, if it has the streams of this one.

    Args:
      streams: by number, an endless dataset of rows.
      each: rows of each stream in a batch of all streams.
      rows: which rows of that batch to give, in this order.
    """

    def __init__(
        self, streams: Mapping[int, grain.IterDataset], *, each: int, rows: Sequence[int]
    ) -> None:
        self._streams = {number: iter(stream) for number, stream in streams.items()}
        super().__init__([*self._streams.values()])
        self._each = each
        made = [number * each + row for number in streams for row in range(each)]
        place = {row: index for index, row in enumerate(made)}
        self._kept = [place[row] for row in rows]

    def __next__(self) -> Batch:
        made = [next(rows) for rows in self._streams.values() for _ in range(self._each)]
        return Batch(*map(np.stack, zip(*(made[row] for row in self._kept), strict=True)))

    def get_state(self) -> dict[str, Any]:
        return {"streams": {str(n): rows.get_state() for n, rows in self._streams.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        for number, rows in self._streams.items():
            if str(number) not in state["streams"]:
                raise UserError(f"the position of data stream {number} is not known")
            rows.set_state(state["streams"][str(number)])
