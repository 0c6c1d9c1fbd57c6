"""How often a run reads the text of each source: what it has read so far, and what it plans."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_jax.config import StageConfig
from lightning_jax.data.packing import document_tokens
from lightning_jax.data.sources import Source, Sources
from lightning_jax.data.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Text that is repeated up to four times is worth about as much as new text, more repeats soon
# nothing: Muennighoff et al. 2023, "Scaling Data-Constrained Language Models".
MOST_EPOCHS = 4
_SAMPLE = 2**18  # characters of a source that say how many tokens it has


# By stream, by source: targets that it has given, and documents, parts of them included.
Counts = dict[str, dict[str, tuple[int, float]]]


def counts(state: Mapping[str, Any]) -> Counts:
    """Returns what the streams of a process have read of each source, over all stages.

    Args:
      state: of `mixture.make_train_iterator` after a batch. The result survives JSON.
    """
    return {
        stream: {
            name: (source["pairs"], source["documents"])
            for name, source in position["sources"].items()
        }
        for stream, position in state["streams"].items()
    }


def consumed(counts: Counts, sources: Sources) -> dict[str, dict[str, float]]:
    """Returns, by source, the `tokens` and `epochs` that a run has read, over all its stages.

    Args:
      counts: of all streams. The sums are in the order of the streams, whoever has counted them.
      sources: of the run.
    """
    streams = [counts[stream] for stream in sorted(counts, key=int)]
    names = [name for name in streams[0] if name in sources.train]
    return {
        name: {
            "tokens": sum(stream[name][0] for stream in streams),
            "epochs": sum(stream[name][1] for stream in streams) / len(sources.train[name]),
        }
        for name in names
    }


def planned_epochs(
    sources: Sources, stages: Sequence[StageConfig], tokenizer: Tokenizer
) -> dict[str, float]:
    """Returns, by source with weight, about how often the stages read all of it.

    Logs a warning for each source above `MOST_EPOCHS`.

    Raises:
      UserError: a source that cannot be opened, or has nothing left to train on.
    """
    epochs: dict[str, float] = {}
    for name in sources.data.source_names:
        tokens = sum(stage.tokens * sources.data.shares(stage).get(name, 0.0) for stage in stages)
        if not tokens:
            continue
        available = _num_tokens(sources.train[name], tokenizer)
        epochs[name] = tokens / available
        if epochs[name] > MOST_EPOCHS:
            logger.warning(
                "data.sources.%s: the stages read %s tokens of it, which has about %s: %.1f epochs;"
                " from %d epochs on, repeated text teaches little (Muennighoff et al. 2023): give "
                "it more text or less weight",
                *(name, f"{tokens:,.0f}", f"{available:,.0f}", epochs[name], MOST_EPOCHS),
            )
    return epochs


def _num_tokens(source: Source, tokenizer: Tokenizer) -> float:
    """About how many targets one epoch of a source has, by a sample of its text."""
    size = tokens = 0
    for document in source.hash_order():
        text = source[document]["text"][:_SAMPLE]
        size += len(text.encode("utf-8"))
        tokens += len(document_tokens(text, tokenizer)) - 2
        if size >= _SAMPLE:
            break
    return source.num_bytes * tokens / max(size, 1) + len(source)
