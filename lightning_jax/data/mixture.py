"""Batches: sources packed into rows, rows mixed by share of tokens; held-out text in order."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from lightning_jax.config import DataConfig, SourceConfig, StageConfig
from lightning_jax.config.fields import require
from lightning_jax.data.batch import Batch
from lightning_jax.data.packing import PackDataset, document_tokens
from lightning_jax.data.sources import Source, open_source
from lightning_jax.data.tokenizer import Tokenizer

# Grain would start 16 threads a source; here one thread makes whole batches ahead instead.
_UNTHREADED = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class _MixIterator(grain.DatasetIterator):
    def __init__(
        self, parents: Sequence[grain.DatasetIterator], weights: Sequence[float], seq_len: int
    ) -> None:
        super().__init__(parents)
        self._weights, self._seq_len = tuple(weights), seq_len
        self._tokens = [0] * len(self._weights)

    def __next__(self) -> Batch:
        # Half a row is counted ahead, so that each source's rows come in the middle of their turns
        # and a small share is neither early nor late.
        turns = [
            (tokens + self._seq_len / 2) / weight
            for tokens, weight in zip(self._tokens, self._weights, strict=True)
        ]
        chosen = turns.index(min(turns))
        row = next(self._parents[chosen])
        self._tokens[chosen] += int(np.count_nonzero(row.loss_mask))
        return row

    def get_state(self) -> dict[str, Any]:
        return {
            "tokens": list(self._tokens),
            "parents": [parent.get_state() for parent in self._parents],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._tokens = list(state["tokens"])
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)


class MixDataset(grain.IterDataset):
    """Takes each row from the source that is furthest behind its share of real tokens.

    Grain's own mix counts rows, which differ in padding under `first_fit`.
    """

    def __init__(
        self, parents: Sequence[grain.IterDataset], *, weights: Sequence[float], seq_len: int
    ) -> None:
        super().__init__(parents)
        self._weights, self._seq_len = tuple(weights), seq_len

    def __iter__(self) -> grain.DatasetIterator:
        return _MixIterator([iter(p) for p in self._parents], self._weights, self._seq_len)


def make_train_iterator(
    data: DataConfig,
    stage: StageConfig,
    *,
    tokenizer: Tokenizer,
    seed: int,
    stage_index: int,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Returns an endless iterator of `[stage.batch_size // process_count, stage.seq_len]` batches.

    Elements are `Batch`es. Weights are shares of real tokens; a source of weight 0
    is not opened. Each source is repeated for ever, in another order in each epoch and stage; in
    each epoch every process reads its own part of the documents. `data.prefetch` batches are made
    ahead in one thread. `get_state` is that of the last batch given, exact, and survives JSON.

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
    by_name = {source.name: source for source in data.sources}
    mixture = [(by_name[name], weight) for name, weight in stage.mixture if weight > 0]
    parts = slice(process_index, None, process_count)
    rows = [
        _train_rows(
            _open(data, config, "train"),
            tokenizer=tokenizer,
            seed=_order_seed(seed, stage_index, config.name),
            part=parts,
            seq_len=stage.seq_len,
            packing=data.packing,
        )
        for config, _ in mixture
    ]
    dataset = MixDataset(rows, weights=[w for _, w in mixture], seq_len=stage.seq_len)
    dataset = dataset.batch(stage.batch_size // process_count, drop_remainder=True)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=data.prefetch)
    )


def _train_rows(
    source: Source, *, tokenizer: Tokenizer, seed: int, part: slice, seq_len: int, packing: str
) -> grain.IterDataset:
    # Repeat before slice: parts are then equal over epochs also where they do not divide one.
    documents = grain.MapDataset.source(source).shuffle(seed=seed).repeat()[part]
    tokens = documents.map(lambda document: document_tokens(document["text"], tokenizer))
    return PackDataset(tokens.to_iter_dataset(_UNTHREADED), seq_len=seq_len, packing=packing)


def _order_seed(seed: int, stage_index: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}\0{stage_index}\0{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def _open(data: DataConfig, config: SourceConfig, split: str) -> Source:
    return open_source(
        config, split=split, text_field=data.text_field, eval_fraction=data.eval_fraction
    )


def open_eval_sources(data: DataConfig) -> dict[str, Source]:
    """Returns the eval split of every source by name."""
    return {config.name: _open(data, config, "eval") for config in data.sources}


@dataclasses.dataclass(frozen=True, eq=False)
class EvalBatches:
    """Batches over whole documents, as often as one likes; see `eval_batches`.

    Attributes:
      documents: which ones of the source, in order.
      num_bytes: UTF-8 bytes of their text, over all processes: bits per byte is the summed loss
        of all targets in bits over this.
      num_targets: predictions over all processes: one a token, and one eos a document.
    """

    documents: tuple[int, ...]
    num_bytes: int
    num_targets: int
    tokens: tuple[np.ndarray, ...]
    seq_len: int
    batch_size: int
    process_rows: slice

    def __len__(self) -> int:
        rows = -(-self.num_targets // self.seq_len)
        return -(-rows // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        documents = grain.MapDataset.source(self.tokens).to_iter_dataset(_UNTHREADED)
        rows = iter(PackDataset(documents, seq_len=self.seq_len, packing="concat"))
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
    process_index: int = 0,
    process_count: int = 1,
) -> EvalBatches:
    """Returns batches `[batch_size // process_count, seq_len]` that predict every token once.

    Documents are whole and in order, packed by `concat`; the last batch is filled up with rows of
    padding, and all processes have the same number of batches. With `max_tokens`, documents are
    drawn in hash order until they have that many targets. Tokens stay in memory, 4 bytes each, so
    that later passes cost no tokenizer.
    """
    require(
        batch_size % process_count == 0,
        "evaluation batch_size",
        batch_size,
        f"a multiple of the {process_count} processes",
    )
    tokens: dict[int, np.ndarray] = {}
    num_targets = num_bytes = 0
    for document in source.hash_order():
        if max_tokens and num_targets >= max_tokens:
            break
        text = source[document]["text"]
        tokens[document] = document_tokens(text, tokenizer)
        num_targets += len(tokens[document]) - 1
        num_bytes += len(text.encode("utf-8"))
    local = batch_size // process_count
    documents = tuple(sorted(tokens))
    return EvalBatches(
        documents=documents,
        num_bytes=num_bytes,
        num_targets=num_targets,
        tokens=tuple(tokens[document] for document in documents),
        seq_len=seq_len,
        batch_size=batch_size,
        process_rows=slice(process_index * local, (process_index + 1) * local),
    )


def data_fingerprint(data: DataConfig) -> dict[str, dict[str, Any]]:
    """Returns, by source, `fingerprint` (sha256 of both splits) and the size of each split.

    The same documents under the same relative names give the same fingerprint on any machine.
    Reads all text once.
    """
    result = {}
    for config in data.sources:
        train, held_out = _open(data, config, "train"), _open(data, config, "eval")
        both = f"{train.fingerprint}\n{held_out.fingerprint}"
        result[config.name] = {
            "fingerprint": hashlib.sha256(both.encode()).hexdigest(),
            "documents": len(train),
            "bytes": train.num_bytes,
            "eval_documents": len(held_out),
            "eval_bytes": held_out.num_bytes,
        }
    return result


def held_out_text(data: DataConfig) -> dict[str, bytes]:
    """Returns, by source, the UTF-8 text that `eval_batches` predicts when `max_tokens` is 0."""
    return {
        name: b"".join(text.encode("utf-8") for text in source.texts())
        for name, source in open_eval_sources(data).items()
    }
