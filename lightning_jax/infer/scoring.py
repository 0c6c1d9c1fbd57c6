"""Log-probabilities of given continuations, in batches of few shapes.

The head runs on scored tokens only, chunk by chunk, so the logits of a whole batch never exist.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import model as lm
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.infer.buckets import length_bucket


@functools.partial(jax.jit, static_argnames=("config",))
def _score(
    config: ModelConfig,
    params: Any,
    router: lm.Router,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    index_M: jax.Array,
    target_M: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Scores `target_M[:count]` after the flat positions `index_M[:count]` of `tokens_BT`.

    Returns (log-probabilities, most probable tokens), float32 and int32, arbitrary from `count` on.
    """
    valid_BT = jnp.arange(tokens_BT.shape[1])[None, :] < length_B[:, None]
    output = lm.LightningLM(config).apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=valid_BT.astype(jnp.int32),
        router=router,
    )
    hidden_MD = output.hidden_BTD.reshape(-1, output.hidden_BTD.shape[-1])
    chunk = min(config.head_chunk, len(index_M))
    padding = (0, -len(index_M) % chunk)
    index_M, target_M = jnp.pad(index_M, padding), jnp.pad(target_M, padding)

    def one_chunk(number: jax.Array, found: tuple[jax.Array, jax.Array]) -> Any:
        start = number * chunk
        hidden_CD = hidden_MD[jax.lax.dynamic_slice_in_dim(index_M, start, chunk)]
        target_C = jax.lax.dynamic_slice_in_dim(target_M, start, chunk)
        logits_CV = output._replace(hidden_BTD=hidden_CD[None]).logits()[0]
        logit_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=1)[:, 0]
        made = (
            logit_C - jax.nn.logsumexp(logits_CV, axis=1),
            jnp.argmax(logits_CV, axis=1).astype(jnp.int32),
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new, start, 0)
            for old, new in zip(found, made, strict=True)
        )

    empty = (jnp.zeros(len(index_M)), jnp.zeros(len(index_M), jnp.int32))
    return jax.lax.fori_loop(0, (count + chunk - 1) // chunk, one_chunk, empty)


@dataclasses.dataclass
class _Row:
    """One row of a forward pass: the tokens that the model reads, and the pairs scored from it."""

    inputs: tuple[int, ...]
    pairs: list[int]
    entries: int


class Scorer:
    """Scores continuations with one model; rows of a batch do not see each other."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        router: lm.Router,
        *,
        max_length: int,
        batch_size: int,
    ):
        """Args:
          config: with its vocabulary resolved (not 0).
          params, router: of that model.
          max_length: most tokens that the model reads; longer contexts lose their beginning.
          batch_size: rows per forward pass.

        Raises:
          UserError: a number out of its range.
        """
        require(config.vocab_size > 0, "model.vocab_size", config.vocab_size, "resolved, above 0")
        require(max_length >= 1, "max_length", max_length, "at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "at least 1")
        self._model = (config, params, router)
        self._vocab_size = config.vocab_size
        self.max_length, self.batch_size = max_length, batch_size

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        advance: Callable[[int], Any] = lambda scored: None,
    ) -> list[tuple[float, bool]]:
        """Scores each pair of a context (at least one id) and its continuation.

        Pairs that differ in the last token alone share a forward pass.

        Args:
          pairs: token ids.
          advance: called with the number of pairs scored after each batch.

        Returns:
          In the order of `pairs`, the sum of the log-probabilities of the continuation's tokens
          (0.0 for none), and whether each of them is the most probable one.

        Raises:
          UserError: an empty context, an id outside of the vocabulary, a continuation longer than
            `max_length`, or a log-probability that is not finite.
        """
        for number, (context, continuation) in enumerate(pairs):
            self._check(number, context, continuation)
        scores = [(0.0, True)] * len(pairs)
        rows = sorted(self._rows(pairs), key=lambda row: (-len(row.inputs), row.inputs))
        pending: tuple[list[_Row], Any] | None = None
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            made = self._dispatch(batch, pairs)
            # The device works on the next batch while the last one is read.
            if pending:
                advance(self._collect(*pending, pairs, scores))
            pending = batch, made
        if pending:
            advance(self._collect(*pending, pairs, scores))
        return scores

    def _collect(
        self,
        batch: Sequence[_Row],
        made: tuple[jax.Array, jax.Array],
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        scores: list[tuple[float, bool]],
    ) -> int:
        """Writes the scores of a batch's pairs; returns how many."""
        numbers = _write_scores(batch, made, pairs, scores)
        for number in numbers:
            if not math.isfinite(scores[number][0]):
                _, params, router = self._model
                lm.require_finite({"params": params, "router": router}, "scoring")
                raise UserError(f"scoring: the log-probability of pair {number} is not finite")
        return len(numbers)

    def _check(self, number: int, context: Sequence[int], continuation: Sequence[int]) -> None:
        require(len(context) >= 1, f"pairs[{number}] context", list(context), "at least one id")
        length = len(continuation)
        require(
            length <= self.max_length,
            f"tokens of continuation {number}",
            length,
            f"at most max_length = {self.max_length}",
        )
        for token in (*context, *continuation):
            ids = f"ids in [0, {self._vocab_size})"
            require(0 <= token < self._vocab_size, f"pairs[{number}]", token, ids)

    def _rows(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[_Row]:
        rows: list[_Row] = []
        last_with: dict[tuple[int, ...], _Row] = {}
        for number, (context, continuation) in enumerate(pairs):
            if not len(continuation):
                continue
            inputs = (*context, *continuation)[-self.max_length - 1 : -1]
            row = last_with.get(inputs)
            # A batch has room for as many scored tokens as it has tokens.
            if row is None or row.entries + len(continuation) > length_bucket(len(inputs)):
                row = last_with[inputs] = _Row(inputs, [], 0)
                rows.append(row)
            row.pairs.append(number)
            row.entries += len(continuation)
        return rows

    def _dispatch(
        self, batch: Sequence[_Row], pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> tuple[jax.Array, jax.Array]:
        time = length_bucket(max(len(row.inputs) for row in batch))
        tokens_BT = np.zeros((self.batch_size, time), np.int32)
        length_B = np.zeros(self.batch_size, np.int32)
        index_M, target_M = np.zeros((2, tokens_BT.size), np.int32)
        count = 0
        for number, row in enumerate(batch):
            end = length_B[number] = len(row.inputs)
            tokens_BT[number, :end] = row.inputs
            for pair in row.pairs:
                targets = pairs[pair][1]
                entries = slice(count, count + len(targets))
                index_M[entries] = np.arange(end - len(targets), end) + number * time
                target_M[entries] = targets
                count += len(targets)
        return _score(*self._model, tokens_BT, length_B, index_M, target_M, jnp.int32(count))


def _write_scores(
    batch: Sequence[_Row],
    made: tuple[jax.Array, jax.Array],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    scores: list[tuple[float, bool]],
) -> list[int]:
    """Writes the scores of a batch's pairs; returns the pairs' numbers."""
    logprob_M, best_M = np.asarray(made[0], np.float64), np.asarray(made[1])
    start = 0
    numbers = [pair for row in batch for pair in row.pairs]
    for number in numbers:
        targets = pairs[number][1]
        entries = slice(start, start + len(targets))
        greedy = bool((best_M[entries] == np.asarray(targets)).all())
        scores[number] = float(logprob_M[entries].sum()), greedy
        start += len(targets)
    return numbers
