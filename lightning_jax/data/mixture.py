"""Batches: sources packed into rows, rows mixed by share of tokens; held-out text in order.

Each source is one sequence of documents for the whole run, in an order of its own, dealt out to
`data.streams` streams (see `streams`). A stage says how its rows are cut, mixed and batched; where
each stream stands in each source is part of the iterator's state, which one stage hands to the
next. So no seam between stages repeats or drops a document, whatever changes there, and a source
that rests for a stage continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lightning_jax.config import DataConfig, StageConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.data import round_trip, streams
from lightning_jax.data.batch import Batch
from lightning_jax.data.packing import Documents, PackDataset, document_tokens
from lightning_jax.data.sources import Source, Sources
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.data.worker import WorkerIterator, in_words


class _MixIterator(grain.DatasetIterator):
    def __init__(self, mix: MixDataset) -> None:
        self._rows = {name: iter(rows) for name, rows in mix.rows.items()}
        super().__init__([*self._rows.values()])
        self._mix, self._tokens = mix, dict(mix.begun)
        self._beginnings = {name: rows.get_state() for name, rows in self._rows.items()}
        self._resting: dict[str, Any] = {}  # states of sources that this stage does not read

    def __next__(self) -> Batch:
        chosen = streams.furthest_behind(self._tokens, self._mix.weights, self._mix.seq_len)
        row = next(self._rows[chosen])
        self._tokens[chosen] += int(np.count_nonzero(row.loss_mask))
        return row

    def get_state(self) -> dict[str, Any]:
        sources = {name: rows.get_state() for name, rows in self._rows.items()}
        return {
            "stage": self._mix.stage,
            "tokens": dict(self._tokens),
            "sources": {**self._resting, **sources},
        }

    def set_state(self, state: dict[str, Any]) -> None:
        sources = state["sources"]
        # Shares count this stage's tokens only: another stage hands over nothing but positions.
        same = state["stage"] == self._mix.stage
        self._tokens = dict(state["tokens"] if same else self._mix.begun)
        self._resting = {name: sources[name] for name in sources if name not in self._rows}
        for name, rows in self._rows.items():
            rows.set_state(sources.get(name, self._beginnings[name]))


class MixDataset(grain.IterDataset):
    """Takes each row from the source that is furthest behind its share of real tokens.

    Grain's own mix counts rows, which differ in padding under `first_fit`.

    Attributes:
      rows: by source, rows of `seq_len`.
      weights: by source, its share of real tokens.
      seq_len: tokens per row.
      stage: the name in its iterators' states. A state of another stage sets nothing but the
        positions in the sources; those of sources that are not in this stage are kept.
      begun: by source, tokens that count as taken when the stage begins.
    """

    def __init__(
        self,
        rows: Mapping[str, grain.IterDataset],
        *,
        weights: Mapping[str, float],
        seq_len: int,
        stage: str,
        begun: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__([*rows.values()])
        self.rows, self.weights, self.seq_len, self.stage = rows, weights, seq_len, stage
        self.begun = begun or dict.fromkeys(rows, 0)

    def __iter__(self) -> grain.DatasetIterator:
        return _MixIterator(self)


def make_train_iterator(
    sources: Sources,
    data: DataConfig,
    stage: StageConfig,
    *,
    tokenizer: Tokenizer,
    seed: int,
    rows: Sequence[int] | None = None,
) -> WorkerIterator:
    """Returns an endless iterator of a stage's batches, `[len(rows), stage.seq_len]`.

    Elements are `Batch`es. Weights are shares of real tokens; a source of weight 0 is not opened.
    Each source is repeated for ever, in another order in each epoch, which depends on `seed` and
    its name alone. `data.prefetch` batches are made ahead, in one thread (0: each when it is asked
    for).

    `get_state` gives the exact position after the last batch, and survives JSON. `set_state` takes
    a state of the same stage, to resume, or the last state of the stage before, to continue it; of
    several processes, the states of all with their `streams` in one.

    Args:
      rows: which rows of each batch of `stage.batch_size` to give; None: all. No other rows are
        made but those of the same streams.

    Raises:
      UserError: a source that cannot be opened, or is too small for the streams. Bad records raise
        when they are reached.
    """
    require_streams(sources, [stage])
    weights = data.weights(stage)
    each = stage.batch_size // data.streams
    rows = range(stage.batch_size) if rows is None else rows
    before = streams.rows_before(weights, each, data.streams)

    def mix(stream: int) -> MixDataset:
        part = slice(stream, None, data.streams)
        packed = {
            name: PackDataset(
                _endless(sources.train[name], tokenizer, seed, part),
                seq_len=stage.seq_len,
                packing=data.packing,
            )
            for name in weights
        }
        begun = {name: count * stage.seq_len for name, count in before[stream].items()}
        return MixDataset(
            packed, weights=weights, seq_len=stage.seq_len, stage=stage.name, begun=begun
        )

    own = {stream: mix(stream) for stream in streams.needed(rows, each)}
    batches = streams.StreamsIterator(own, each=each, rows=rows)
    return WorkerIterator(batches, ahead=data.prefetch)


def require_streams(sources: Sources, stages: Sequence[StageConfig]) -> None:
    """Raises UserError where a source with weight has fewer documents than there are streams.

    Then streams would read the same documents at the same time.
    """
    count = sources.data.streams
    for name in sources.data.source_names:
        if any(name in sources.data.weights(stage) for stage in stages):
            right = f"at most {len(sources.train[name])}, the documents of data.sources.{name}"
            require(count <= len(sources.train[name]), "data.streams", count, right)


def _endless(source: Source, tokenizer: Tokenizer, seed: int, part: slice) -> Documents:
    """The tokens of a source's documents, epoch after epoch; `part` selects those of a stream."""
    digest = hashlib.sha256(f"{seed}\0{source.name}".encode()).digest()
    order = int.from_bytes(digest[:4], "big")
    # Repeat before slicing: then the parts are equal over epochs even if they do not divide one.
    documents: Any = grain.MapDataset.source(source).shuffle(seed=order).repeat()[part]
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
      num_bytes: UTF-8 bytes of their text: bits per byte is the summed loss of all targets in bits
        over this.
      lost_bytes: those of documents that do not come back from their tokens; see `round_trip`.
      num_targets: predictions: one per token, and one eos per document.
      tokens: of each document, in the order of the source.
    """

    num_bytes: int
    lost_bytes: int
    num_targets: int
    tokens: tuple[np.ndarray, ...]
    seq_len: int
    batch_size: int

    def __len__(self) -> int:
        rows = -(-self.num_targets // self.seq_len)
        return -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rows = iter(PackDataset(self.tokens, seq_len=self.seq_len, packing="concat"))
        for _ in range(len(self)):
            padding = Batch.empty(self.seq_len)
            batch = [next(rows, padding) for _ in range(self.batch_size)]
            yield Batch(*map(np.stack, zip(*batch, strict=True)))


def eval_batches(
    source: Source,
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    batch_size: int,
    max_tokens: int = 0,
    before_document: Callable[[], None] = lambda: None,
) -> EvalBatches:
    """Returns batches `[batch_size, seq_len]` that predict every token once.

    Documents are whole and in order, packed by `concat`; the last batch is filled up with rows of
    padding. With `max_tokens`, documents are drawn in hash order until they have that many targets,
    and no others are read. Tokens stay in memory, 4 bytes each, so that later passes cost no
    tokenizer. `before_document` is called before each document is read, and may raise.
    """
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
    return EvalBatches(
        num_bytes=num_bytes,
        lost_bytes=lost_bytes,
        num_targets=num_targets,
        tokens=tuple(tokens[document] for document in sorted(tokens)),
        seq_len=seq_len,
        batch_size=batch_size,
    )
