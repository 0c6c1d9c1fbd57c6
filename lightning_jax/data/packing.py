"""Documents to rows of fixed length.

A document is its tokens with bos before and eos after: `n` tokens give `n + 1` pairs of an input
and the next token. Rows are made of pairs, so wherever a document is cut, no target is lost and
none is seen twice. Each piece is a segment of its own: attention and positions start again.

Grain's own packers are not used: `ConcatThenSplitIterDataset` keeps tuples in its state, which do
not survive JSON, and `FirstFitPackIterDataset` refuses documents longer than a row.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import grain
import numpy as np

from lightning_jax.data.batch import Batch
from lightning_jax.data.tokenizer import Tokenizer


class Documents(Protocol):
    """Random access to the tokens of documents, int32 [at least 2]; may be endless."""

    def __len__(self) -> int: ...

    def __getitem__(self, document: int, /) -> np.ndarray: ...


class _Piece(NamedTuple):
    """Pairs `start` to `stop` of a document; `tokens` are one more than the pairs.

    `share` is its part of the document.
    """

    document: int
    start: int
    stop: int
    tokens: np.ndarray
    share: float


# Rows that first_fit keeps open. With more rows there is less padding, and a resume reads more.
_OPEN_ROWS = 32
# Characters that are encoded at one time, and those on both sides of a cut that are looked at.
_PIECE, _AROUND = 2**20, 2**8


def document_tokens(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """Returns int32 `[bos, *ids, eos]`.

    A long text is encoded in pieces, because an encoding in the making takes up to 120 times the
    memory of its text.
    """
    tokens = array("i", [tokenizer.bos_id])
    for piece in _pieces(text, tokenizer):
        tokens.frombytes(np.array(tokenizer.encode(piece), np.int32).view(np.uint8))
    tokens.append(tokenizer.eos_id)
    return np.frombuffer(tokens, np.int32)


def _pieces(text: str, tokenizer: Tokenizer) -> Iterator[str]:
    """Cuts a text of more than `_PIECE` characters where its tokens show no trace of the cut.

    So a tokenizer that marks the beginning of a text gets it whole.
    """
    start = 0
    for limit in range(_PIECE, len(text), _PIECE):
        earliest = limit - _PIECE // 2
        cut = max(text.rfind("\n", earliest, limit) + 1, text.rfind(" ", earliest, limit))
        cut = cut if cut > earliest else limit
        left, right = text[cut - _AROUND : cut], text[cut : cut + _AROUND]
        if tokenizer.encode(left + right) == tokenizer.encode(left) + tokenizer.encode(right):
            yield text[start:cut]
            start = cut
    yield text[start:]


class _Pairs:
    """Pairs of a sequence of documents, taken piece by piece, with an exact position.

    The position is the number of the next document to open, and the spans of opened documents that
    are still to be taken: `[document, start, stop]`, counted in pairs. Besides, it counts the pairs
    and the documents (with parts of them) that were given out in rows.
    """

    def __init__(self, documents: Documents) -> None:
        self._documents = documents
        self._next = 0
        self._spans: list[list[int]] = []
        self._given_pairs, self._given_documents = 0, 0.0
        self._loaded: tuple[int, np.ndarray] | None = None

    def left(self) -> int:
        """Pairs left in the first span, which may be a new document; 0 after the last one."""
        self._drop_lost()
        if not self._spans:
            if self._next == len(self._documents):
                return 0
            self._spans.append([self._next, 0, len(self._tokens(self._next)) - 1])
            self._next += 1
        _, start, stop = self._spans[0]
        return stop - start

    def _drop_lost(self) -> None:
        """Cuts the first span to its document, which was changed if it is shorter now."""
        while self._spans:
            document, start, stop = self._spans[0]
            self._spans[0][2] = min(stop, len(self._tokens(document)) - 1)
            if start < self._spans[0][2]:
                return
            del self._spans[0]

    def take(self, count: int) -> _Piece:
        """Takes `1 <= count <= left()` pairs."""
        document, start, stop = self._spans[0]
        self._spans[0][1] = start + count
        if start + count == stop:
            del self._spans[0]
        return self.piece(document, start, start + count)

    def piece(self, document: int, start: int, stop: int) -> _Piece:
        """The pairs of a span, wherever the position is; fewer if the document is shorter now."""
        tokens = self._tokens(document)
        stop = min(stop, len(tokens) - 1)
        start = min(start, stop)
        share = (stop - start) / (len(tokens) - 1)
        return _Piece(document, start, stop, tokens[start : stop + 1], share)

    def give(self, pieces: list[_Piece], seq_len: int) -> Batch:
        """Returns a row of taken pieces, and counts it."""
        row, end = Batch.empty(seq_len), 0
        for segment, piece in enumerate(pieces, 1):
            start, end = end, end + piece.stop - piece.start
            row.tokens[start:end] = piece.tokens[:-1]
            row.targets[start:end] = piece.tokens[1:]
            row.segment_ids[start:end] = segment
            row.positions[start:end] = np.arange(end - start)
        row.loss_mask[:end] = 1
        self._given_pairs += end
        self._given_documents += sum(piece.share for piece in pieces)
        return row

    def _tokens(self, document: int) -> np.ndarray:
        if self._loaded is None or self._loaded[0] != document:
            self._loaded = document, self._documents[document]
        return self._loaded[1]

    def get_state(self) -> dict[str, Any]:
        return {
            "next": self._next,
            # As text, because Grain copies states and wants all of them to have one structure.
            "spans": json.dumps(self._spans),
            "pairs": self._given_pairs,
            "documents": self._given_documents,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._spans = state["next"], json.loads(state["spans"])
        # A checkpoint of before these were counted has none: then they begin here.
        self._given_pairs = state.get("pairs", 0)
        self._given_documents = state.get("documents", 0.0)


class _ConcatIterator(grain.DatasetIterator):
    def __init__(self, documents: Documents, seq_len: int) -> None:
        super().__init__()
        self._pairs, self._seq_len = _Pairs(documents), seq_len

    def __next__(self) -> Batch:
        pieces, room = [], self._seq_len
        while room and (left := self._pairs.left()):
            pieces.append(self._pairs.take(min(room, left)))
            room -= pieces[-1].stop - pieces[-1].start
        if not pieces:
            raise StopIteration
        return self._pairs.give(pieces, self._seq_len)

    def get_state(self) -> dict[str, Any]:
        return self._pairs.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._pairs.set_state(state)


class _FirstFitIterator(grain.DatasetIterator):
    """Fills `_OPEN_ROWS` rows until a piece fits in none of them, then emits them all."""

    def __init__(self, documents: Documents, seq_len: int) -> None:
        super().__init__()
        self._pairs, self._seq_len = _Pairs(documents), seq_len
        self._rows: list[list[_Piece]] = []  # filled and not yet emitted

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
        return self._pairs.give(self._rows.pop(0), self._seq_len)

    def get_state(self) -> dict[str, Any]:
        rows = json.dumps([[piece[:3] for piece in row] for row in self._rows])
        return {**self._pairs.get_state(), "rows": rows, "seq_len": self._seq_len}

    def set_state(self, state: dict[str, Any]) -> None:
        rows: list[list[list[int]]] = json.loads(state["rows"])
        self._rows = []
        if state["seq_len"] == self._seq_len:
            self._pairs.set_state(state)
            self._rows = [[self._pairs.piece(*span) for span in row] for row in rows]
        else:
            # Rows of another length are undone: their pieces are packed again, before the rest.
            spans = sorted(itertools.chain(*rows, json.loads(state["spans"])))
            self._pairs.set_state({**state, "spans": json.dumps(_joined(spans))})


def _joined(spans: list[list[int]]) -> list[list[int]]:
    """Joins spans that begin where the one before them ends."""
    joined: list[list[int]] = []
    for document, start, stop in spans:
        if joined and (joined[-1][0], joined[-1][2]) == (document, start):
            joined[-1][2] = stop
        else:
            joined.append([document, start, stop])
    return joined


class PackDataset(grain.IterDataset):
    """Packs the int32 arrays of `document_tokens` into rows of `seq_len`.

    `concat` pads only after the last document; `first_fit` cuts only documents of more than
    `seq_len` pairs, and pads. The state of the iterator is exact and survives JSON. It may be set
    on an iterator of another `seq_len` (and the same documents and packing), which continues where
    the first one stopped: no pair is dropped or repeated.
    """

    def __init__(self, documents: Documents, *, seq_len: int, packing: str) -> None:
        super().__init__()
        self._documents, self._seq_len = documents, seq_len
        self._kind = {"concat": _ConcatIterator, "first_fit": _FirstFitIterator}[packing]

    def __iter__(self) -> Iterator[Batch]:
        return self._kind(self._documents, self._seq_len)
