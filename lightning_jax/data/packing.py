"""Documents to rows of fixed length.

A document is its tokens with bos before and eos after: `n` tokens give `n + 1` pairs of an input
and the next token. Rows are made of pairs, so wherever a document is cut, no target is lost and
none is seen twice. Each piece is a segment of its own: attention and positions start again.

Grain's own packers are not used: `ConcatThenSplitIterDataset` keeps tuples in its state, which do
not survive JSON, and `FirstFitPackIterDataset` refuses documents longer than a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from lightning_jax.data.batch import Batch
from lightning_jax.data.tokenizer import Tokenizer

_Piece = tuple[np.ndarray, np.ndarray]  # inputs, targets

# Rows that first_fit keeps open. More of them leave less padding and make a resume read more.
_OPEN_ROWS = 32


def document_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Returns int32 `[bos, *ids, eos]`."""
    ids = tokenizer.encode(text)
    tokens = np.empty(len(ids) + 2, np.int32)
    tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos_id, ids, tokenizer.eos_id
    return tokens


def _make_row(pieces: list[_Piece], seq_len: int) -> Batch:
    row, end = Batch.empty(seq_len), 0
    for segment, (inputs, targets) in enumerate(pieces, 1):
        start, end = end, end + len(inputs)
        row.tokens[start:end] = inputs
        row.targets[start:end] = targets
        row.segment_ids[start:end] = segment
        row.positions[start:end] = np.arange(end - start)
    row.loss_mask[:end] = 1
    return row


class _Pairs:
    """Pairs of the documents of an iterator, taken a piece at a time, with an exact position."""

    def __init__(self, documents: grain.DatasetIterator) -> None:
        self._documents = documents
        self._start = documents.get_state()  # before the open document
        self._open: np.ndarray | None = None
        self._offset = 0  # pairs taken from it

    def left(self) -> int:
        """Pairs that the open document still has; 0 after the last document."""
        if self._open is None:
            try:
                self._open = next(self._documents)
            except StopIteration:
                return 0
        return len(self._open) - 1 - self._offset

    def take(self, count: int) -> _Piece:
        """Takes `1 <= count <= left()` pairs."""
        assert self._open is not None
        start, end = self._offset, self._offset + count
        piece = self._open[start:end], self._open[start + 1 : end + 1]
        self._offset = end
        if end == len(self._open) - 1:
            self._start, self._open, self._offset = self._documents.get_state(), None, 0
        return piece

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._start, "offset": self._offset}

    def set_state(self, state: dict[str, Any]) -> None:
        self._documents.set_state(state["documents"])
        self._start, self._open, self._offset = state["documents"], None, state["offset"]


class _ConcatIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, seq_len: int) -> None:
        super().__init__(parent)
        self._pairs, self._seq_len = _Pairs(parent), seq_len

    def __next__(self) -> Batch:
        pieces, room = [], self._seq_len
        while room and (left := self._pairs.left()):
            pieces.append(self._pairs.take(min(room, left)))
            room -= len(pieces[-1][0])
        if not pieces:
            raise StopIteration
        return _make_row(pieces, self._seq_len)

    def get_state(self) -> dict[str, Any]:
        return self._pairs.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._pairs.set_state(state)


class _FirstFitIterator(grain.DatasetIterator):
    """Fills `_OPEN_ROWS` rows until a piece fits in none of them, then emits them all."""

    def __init__(self, parent: grain.DatasetIterator, seq_len: int) -> None:
        super().__init__(parent)
        self._pairs, self._seq_len = _Pairs(parent), seq_len
        self._start = self._pairs.get_state()  # before the first piece of `_rows`
        self._rows: list[list[_Piece]] = []
        self._emitted = 0

    def _fill(self) -> None:
        rooms: list[int] = []
        while left := self._pairs.left():
            size = min(left, self._seq_len)
            fit = next((i for i, room in enumerate(rooms) if room >= size), len(rooms))
            if fit == _OPEN_ROWS:
                return
            if fit == len(rooms):
                rooms.append(self._seq_len)
                self._rows.append([])
            self._rows[fit].append(self._pairs.take(size))
            rooms[fit] -= size

    def __next__(self) -> Batch:
        if not self._rows:
            self._fill()
        if not self._rows:
            raise StopIteration
        row = _make_row(self._rows[self._emitted], self._seq_len)
        self._emitted += 1
        if self._emitted == len(self._rows):
            self._start, self._rows, self._emitted = self._pairs.get_state(), [], 0
        return row

    def get_state(self) -> dict[str, Any]:
        return {"pairs": self._start, "emitted": self._emitted}

    def set_state(self, state: dict[str, Any]) -> None:
        self._pairs.set_state(state["pairs"])
        self._start, self._rows, self._emitted = state["pairs"], [], state["emitted"]


class PackDataset(grain.IterDataset):
    """Packs the int32 arrays of `document_tokens` that `parent` gives into rows of `seq_len`.

    `concat` leaves no padding but after the last document; `first_fit` cuts only documents of more
    than `seq_len` pairs, and pads. The state of its iterator is exact and survives JSON.
    """

    def __init__(self, parent: grain.IterDataset, *, seq_len: int, packing: str) -> None:
        super().__init__(parent)
        self._seq_len = seq_len
        self._kind = {"concat": _ConcatIterator, "first_fit": _FirstFitIterator}[packing]

    def __iter__(self) -> Iterator[Batch]:
        return self._kind(iter(self._parent), self._seq_len)
