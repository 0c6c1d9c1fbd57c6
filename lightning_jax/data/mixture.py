"""Batches: sources packed into rows, rows mixed by share of tokens; held-out text in order.

Each source is one stream of documents for the whole run, in an order of its own. A stage says how
its rows are cut, mixed and batched; where each stream stands is part of the iterator's state, which
one stage hands to the next. So no seam between stages repeats or drops a document, whatever changes
there, and a source that rests for a stage continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from lightning_jax.config import DataConfig, StageConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.data import round_trip
from lightning_jax.data.batch import Batch
from lightning_jax.data.packing import Documents, PackDataset, document_tokens
from lightning_jax.data.regroup import regroup
from lightning_jax.data.sources import Source, Sources
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.data.worker import WorkerIterator, in_words


class _MixIterator(grain.DatasetIterator):
    def __init__(self, mix: MixDataset) -> None:
        self._rows = {name: iter(rows) for name, rows in mix.rows.items()}
        super().__init__([*self._rows.values()])
        self._weights, self._seq_len, self._stage = mix.weights, mix.seq_len, mix.stage
        self._tokens = dict.fromkeys(self._rows, 0)
        self._beginnings = {name: rows.get_state() for name, rows in self._rows.items()}
        self._resting: dict[str, Any] = {}  # states of sources that this stage does not read

    def __next__(self) -> Batch:
        # The half-row offset centres each source in its interval: a 10% source first appears at
        # row 5, not at row 1 or 10.
        turns = {
            name: (tokens + self._seq_len / 2) / self._weights[name]
            for name, tokens in self._tokens.items()
        }
        chosen = min(turns, key=turns.__getitem__)
        row = next(self._rows[chosen])
        self._tokens[chosen] += int(np.count_nonzero(row.loss_mask))
        return row

    def get_state(self) -> dict[str, Any]:
        streams = {name: rows.get_state() for name, rows in self._rows.items()}
        return {
            "stage": self._stage,
            "tokens": dict(self._tokens),
            "streams": {**self._resting, **streams},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        streams = state["streams"]
        # Shares count this stage's tokens only: another stage hands over nothing but its streams.
        same = state["stage"] == self._stage
        self._tokens = dict(state["tokens"]) if same else dict.fromkeys(self._rows, 0)
        self._resting = {name: streams[name] for name in streams if name not in self._rows}
        for name, rows in self._rows.items():
            rows.set_state(streams.get(name, self._beginnings[name]))


class MixDataset(grain.IterDataset):
    """Takes each row from the source that is furthest behind its share of real tokens.

    Grain's own mix counts rows, which differ in padding under `first_fit`.

    Attributes:
      rows: by source, rows of `seq_len`.
      weights: by source, its share of real tokens.
      seq_len: tokens per row.
      stage: the name in its iterators' states. A state of another stage sets nothing but the
        positions of the streams; those of sources that are not in this stage are kept.
    """

    def __init__(
        self,
        rows: Mapping[str, grain.IterDataset],
        *,
        weights: Mapping[str, float],
        seq_len: int,
        stage: str,
    ) -> None:
        super().__init__([*rows.values()])
        self.rows, self.weights, self.seq_len, self.stage = rows, weights, seq_len, stage

    def __iter__(self) -> grain.DatasetIterator:
        return _MixIterator(self)


def make_train_iterator(
    sources: Sources,
    data: DataConfig,
    stage: StageConfig,
    *,
    tokenizer: Tokenizer,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
) -> WorkerIterator:
    """Returns an endless iterator of `[stage.batch_size // process_count, stage.seq_len]` batches.

    Elements are `Batch`es. Weights are shares of real tokens; a source of weight 0 is not opened.
    Each source is repeated for ever, in another order in each epoch, which depends on `seed` and
    its name alone; in each epoch every process reads its own part of the documents. `data.prefetch`
    batches are made ahead, in one thread (0: each when it is asked for).

    `get_state` gives the exact position after the last batch, and survives JSON. `set_state` takes
    a state of the same stage, to resume, or the last state of the stage before, to continue it;
    `set_states` those of all processes, if they were more or fewer.

    Raises:
      UserError: a batch that the processes cannot share, or a source that cannot be opened. Bad
        records raise when they are reached.
    """
    require(
        stage.batch_size % process_count == 0,
        f"stages.{stage.name}.batch_size",
        stage.batch_size,
        f"a multiple of the {process_count} processes",
    )
    weights = {name: weight for name, weight in stage.mixture if weight > 0}
    part = slice(process_index, None, process_count)
    rows = {
        name: PackDataset(
            _endless(sources.train[name], tokenizer, seed, part),
            seq_len=stage.seq_len,
            packing=data.packing,
        )
        for name in weights
    }
    mix = MixDataset(rows, weights=weights, seq_len=stage.seq_len, stage=stage.name)
    batches = mix.batch(stage.batch_size // process_count, drop_remainder=True)
    return WorkerIterator(
        iter(batches),
        ahead=data.prefetch,
        regroup=functools.partial(regroup, index=process_index, count=process_count),
    )


def _endless(source: Source, tokenizer: Tokenizer, seed: int, part: slice) -> Documents:
    """The tokens of a source's documents, epoch after epoch; `part` selects this process's."""
    digest = hashlib.sha256(f"{seed}\0{source.name}".encode()).digest()
    order = int.from_bytes(digest[:4], "big")
    # Repeat before slicing: then the parts are equal over epochs even if they do not divide one.
    documents = grain.MapDataset.source(source).shuffle(seed=order).repeat()[part]
    return documents.map(lambda document: _tokens(document, tokenizer))


def _tokens(document: Mapping[str, str], tokenizer: Tokenizer) -> np.ndarray:
    try:
        return document_tokens(document["text"], tokenizer)
    except BaseException as error:  # a panic of a library in Rust is no Exception
        message = f"{document['origin']}: cannot be tokenized ({in_words(error)})"
        raise UserError(message) from error


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """Batches over whole documents, which can be iterated repeatedly; see `eval_batches`.

    Attributes:
      documents: numbers of the source's documents, in order.
      num_bytes: UTF-8 bytes of their text, over all processes: bits per byte is the summed loss
        of all targets in bits over this.
      lost_bytes: those of documents that do not come back from their tokens; see `round_trip`.
      num_targets: predictions over all processes: one per token, and one eos per document.
    """

    documents: tuple[int, ...]
    num_bytes: int
    lost_bytes: int
    num_targets: int
    tokens: tuple[np.ndarray, ...]
    seq_len: int
    batch_size: int
    process_rows: slice

    def __len__(self) -> int:
        rows = -(-self.num_targets // self.seq_len)
        return -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rows = iter(PackDataset(self.tokens, seq_len=self.seq_len, packing="concat"))
        for _ in range(len(self)):
            padding = Batch.empty(self.seq_len)
            batch = [next(rows, padding) for _ in range(self.batch_size)]
            yield Batch(*map(np.stack, zip(*batch[self.process_rows], strict=True)))


def eval_batches(
    source: Source,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    max_tokens: int = 0,
    before_document: Callable[[], None] = lambda: None,
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Returns batches `[batch_size // process_count, seq_len]` that predict every token once.

    Documents are whole and in order, packed by `concat`; the last batch is filled up with rows of
    padding, and all processes have the same number of batches. With `max_tokens`, documents are
    drawn in hash order until they have that many targets, and no others are read. Tokens stay in
    memory, 4 bytes each, so that later passes cost no tokenizer. `before_document` is called before
    each document is read, and may raise.
    """
    require(
        batch_size % process_count == 0,
        "evaluation batch_size",
        batch_size,
        f"a multiple of the {process_count} processes",
    )
    tokens: dict[int, np.ndarray] = {}
    num_targets = num_bytes = lost_bytes = 0
    for document in source.hash_order():
        if max_tokens and num_targets >= max_tokens:
            break
        before_document()
        read = source[document]
        text, tokens[document] = read["text"], _tokens(read, tokenizer)
        num_targets += len(tokens[document]) - 1
        size = len(text.encode("utf-8"))
        num_bytes += size
        if not round_trip.keeps(tokenizer, text, tokens[document][1:-1].tolist()):
            lost_bytes += size
    local = batch_size // process_count
    documents = tuple(sorted(tokens))
    return EvalBatches(
        documents=documents,
        num_bytes=num_bytes,
        lost_bytes=lost_bytes,
        num_targets=num_targets,
        tokens=tuple(tokens[document] for document in documents),
        seq_len=seq_len,
        batch_size=batch_size,
        process_rows=slice(process_index * local, (process_index + 1) * local),
    )
