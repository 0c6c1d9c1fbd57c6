"""Exact match on recall tasks, by length and depth: see `data.recall` for the tasks.

An answer is right if each of its tokens is the most probable one after the text before it, so that
greedy decoding gives the answer. All examples are packed into rows as long as the longest of them,
each a segment of its own, so that one program serves all lengths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import RunConfig
from lightning_jax.data import recall, round_trip
from lightning_jax.data.batch import Batch
from lightning_jax.data.recall_cells import Cell, Example, make_cells
from lightning_jax.data.sources import Source
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.runtime import compiler
from lightning_jax.runtime.phases import phase
from lightning_jax.train import step as steps
from lightning_jax.train.placement import put_whole


def make_greedy_step(config: RunConfig, mesh: Mesh) -> Callable[..., jax.Array]:
    """Returns the jitted `(params, router, batch, rope_base_global) -> bool [B, T]`.

    See `step.greedy_step`. The output is whole on every device.
    """

    def greedy_step(params: Any, router: lm.Router, batch: Batch, base: Any) -> jax.Array:
        return steps.greedy_step(config, params, router, batch, base)

    return jax.jit(
        greedy_step, out_shardings=sharding.replicated(mesh), compiler_options=compiler.options()
    )


def task_of(source: Source) -> recall.Documents | None:
    """Returns the documents of a source that is a recall task; None for any other text."""
    [*others, last] = source.readers
    return last if not others and isinstance(last, recall.Documents) else None


def evaluate_recall(
    greedy_step: Callable[[Batch], jax.Array],
    documents: recall.Documents,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    window: int,
    batch_tokens: int,
    max_tokens: int = 0,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measures exact matches of one task.

    Args:
      greedy_step: maps a batch on the mesh to a result of `step.greedy_step`.
      documents: of the task.
      tokenizer: of the model.
      mesh: of the model.
      window: of its local layers, in tokens.
      batch_tokens: of a batch; more where a row or the mesh needs more.
      max_tokens: of all examples, 0: no limit; see `recall_cells.make_cells`.
      before_batch: is called before each batch, and may raise.

    Returns:
      `task` (its path), `window`, `exact` (mean over cells), and `cells`, each with `length` in
      tokens, `windows` (the same in windows), `depth` (passkey: of the number in the text, 0 to 1),
      `pairs` (mqar), `exact` (share of the answers that are right), `token_accuracy` (the same of
      their tokens), `chance` (`exact` of a blind guess), `examples` (number of answers) and
      `deviation` of `exact`: that of the posterior under a uniform prior, so that neither 0 nor 1
      is certain. Answers of mqar share texts, which that does not count. Where nothing can be
      measured, only `task`, `window` and `no_exact`, the reason.
    """
    row: dict[str, Any] = {"task": documents.task.path, "window": window}
    if reason := _lost(documents, tokenizer):
        return {**row, "no_exact": reason}
    cells = make_cells(documents, tokenizer, window=window, max_tokens=max_tokens)
    if not cells:
        return {**row, "no_exact": f"no text of it fits 16 windows of {window} tokens"}
    rows = _Rows(cells, tokens=batch_tokens, mesh=mesh)
    with phase(f"recall: {documents.task.name}") as now:
        for number, (batch, answers_BT) in enumerate(rows, 1):
            now.detail = f"batch {number} of {len(rows)}"
            before_batch()
            rows.count(np.asarray(greedy_step(put_whole(batch, mesh))), answers_BT)
    found = [_cell(documents.task, cell, *rows.of(cell)) for cell in cells]
    return {**row, "exact": float(np.mean([cell["exact"] for cell in found])), "cells": found}


def _lost(documents: recall.Documents, tokenizer: Tokenizer) -> str:
    """Why answers have no tokens of their own, where a tokenizer changes the text; else ""."""
    text = documents.read(0)
    is_kept = round_trip.keeps(tokenizer, text, tokenizer.encode(text))
    return "" if is_kept else "the tokenizer changes its texts"


def _cell(task: recall.Task, cell: Cell, tokens: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """The row of a cell, from the tokens of its answers and how many of them are right."""
    examples, exact = len(tokens), int((right == tokens).sum())
    mean = (exact + 1) / (examples + 2)
    row: dict[str, Any] = {"length": cell.length, "windows": cell.windows}
    if cell.depth is not None:
        row["depth"] = cell.depth
    if task.name == "mqar":
        row["pairs"] = cell.size
    return row | {
        "exact": exact / examples,
        "deviation": math.sqrt(mean * (1 - mean) / (examples + 3)),
        "token_accuracy": float(right.sum() / tokens.sum()),
        "chance": task.chance(cell.size),
        "examples": examples,
    }


@dataclasses.dataclass(frozen=True)
class _Placed:
    """An example in a row of the packed ones; `answer` is the number of its first answer."""

    example: Example
    start: int
    answer: int


class _Rows:
    """The examples of all cells in batches, and how many tokens of each answer are right.

    Iterating gives `(batch, answers_BT)`: the number of the answer that each target is of, or -1.
    """

    def __init__(self, cells: Sequence[Cell], *, tokens: int, mesh: Mesh) -> None:
        pieces, shards = mesh.shape["sequence"], sharding.batch_shards(mesh)
        longest = max(cell.length for cell in cells)
        self._seq_len = -(-longest // pieces) * pieces
        self._batch_size = max(1, tokens // self._seq_len // shards) * shards
        self._answers: dict[int, slice] = {}
        self._rows: list[list[_Placed]] = []
        rooms: list[int] = []
        sizes: list[int] = []
        # The longest first: the others fill what those leave.
        for cell in sorted(cells, key=lambda cell: -cell.length):
            begin = len(sizes)
            for example in cell.examples:
                size = len(example.tokens) - 1
                fit = next((i for i, room in enumerate(rooms) if room >= size), len(rooms))
                if fit == len(rooms):
                    rooms.append(self._seq_len)
                    self._rows.append([])
                placed = _Placed(example, self._seq_len - rooms[fit], len(sizes))
                self._rows[fit].append(placed)
                rooms[fit] -= size
                sizes += [stop - start for start, stop in example.answers]
            self._answers[id(cell)] = slice(begin, len(sizes))
        self._tokens = np.array(sizes)
        self._right = np.zeros(len(sizes), np.int64)

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        for start in range(0, len(self._rows), self._batch_size):
            shape = self._batch_size, self._seq_len
            batch, answers_BT = Batch.empty(*shape), np.full(shape, -1, np.int64)
            rows = zip(*batch, answers_BT, strict=True)
            for placed, row in zip(
                self._rows[start : start + self._batch_size], rows, strict=False
            ):
                for segment, piece in enumerate(placed, 1):
                    _write(piece, segment, *row)
            yield batch, answers_BT

    def count(self, greedy_BT: np.ndarray, answers_BT: np.ndarray) -> None:
        """Counts the right tokens of a batch."""
        found = answers_BT[greedy_BT & (answers_BT >= 0)]
        self._right += np.bincount(found, minlength=len(self._right))

    def of(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens of each answer of a cell, how many of them are right)."""
        return self._tokens[self._answers[id(cell)]], self._right[self._answers[id(cell)]]


def _write(
    placed: _Placed,
    segment: int,
    tokens_T: np.ndarray,
    targets_T: np.ndarray,
    segment_ids_T: np.ndarray,
    positions_T: np.ndarray,
    loss_mask_T: np.ndarray,
    answers_T: np.ndarray,
) -> None:
    """Writes an example into a row."""
    tokens, start = placed.example.tokens, placed.start
    where = slice(start, start + len(tokens) - 1)
    tokens_T[where], targets_T[where] = tokens[:-1], tokens[1:]
    segment_ids_T[where], positions_T[where] = segment, np.arange(len(tokens) - 1)
    for answer, (first, stop) in enumerate(placed.example.answers, placed.answer):
        # A target stands one place before its token.
        answers_T[start + first - 1 : start + stop - 1] = answer
        loss_mask_T[start + first - 1 : start + stop - 1] = 1
