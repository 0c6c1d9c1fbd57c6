"""What a card shows, read from the folder of a run; the model itself is asked for text."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from lightning_jax import accounting
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import changes, to_dict
from lightning_jax.data.compression import Compared, compare
from lightning_jax.data.sources import Sources
from lightning_jax.infer.readings import TextRouting
from lightning_jax.infer.run import Run, load_run
from lightning_jax.runtime.files import StrPath, read_json
from lightning_jax.train.metrics import pace, read_rows
from lightning_jax.train.plan import Plan, Segment
from lightning_jax.train.record import Record

logger = logging.getLogger(__name__)
# Characters of the text whose experts are shown: a screen of code.
_EXCERPT = 900
_SAMPLE_TOKENS = 128


@dataclasses.dataclass(frozen=True)
class Facts:
    """A run as its card shows it.

    Attributes:
      workdir: its folder, as the user wrote it.
      run: the run's newest weights.
      rows: of `metrics.jsonl`.
      evaluation: `evaluation.json`, by domain; empty before the end of the run.
      record: `run.json`.
      held_out: each domain's bits per byte beside those of compressors.
      routing: the experts of an excerpt of held-out text; None for a model without.
      sample: a text by the model, its prompt included.
      changed: (field, value of the config it is compared with, own value).
    """

    workdir: str
    run: Run
    rows: list[dict[str, Any]]
    evaluation: dict[str, dict[str, Any]]
    record: Record
    held_out: list[Compared]
    routing: TextRouting | None
    sample: str
    changed: list[tuple[str, Any, Any]]

    @property
    def experts_per_token(self) -> float | None:
        """Routed experts per held-out token, mean over layers and all domains; None if unknown."""
        measured = [row for row in self.evaluation.values() if "experts_per_token" in row]
        tokens = sum(row["tokens"] for row in measured)
        total = sum(row["experts_per_token"] * row["tokens"] for row in measured)
        return total / tokens if tokens else None

    @property
    def tokens(self) -> int:
        """Tokens that the weights were trained on, padding included."""
        return self.run.loaded.meta.tokens

    @property
    def pace(self) -> tuple[float | None, float]:
        """Tokens per second and seconds of training, see `train.metrics.pace`."""
        return pace(self.rows)

    @property
    def training_flops(self) -> float:
        """FLOPs that the model needed for its training."""
        plan, total = Plan.of(self.run.config), 0.0
        for segment in plan.segments:
            tokens = min(max(self.tokens - segment.first_token, 0), _tokens(segment))
            total += tokens * accounting.flops_per_token(
                self.run.config.model,
                seq_len=segment.seq_len,
                experts_per_token=self.experts_per_token,
            )
        return total

    def summary(self) -> dict[str, Any]:
        """The numbers of the card, for JSON."""
        speed, seconds = self.pace
        return {
            "step": self.run.step,
            "tokens": self.tokens,
            "seconds": seconds,
            "tokens_per_second": speed,
            "training_flops": self.training_flops,
            "experts_per_token": self.experts_per_token,
            "held_out": {
                text.domain: {"bytes": text.num_bytes, "this model": text.model, **text.compressors}
                for text in self.held_out
            },
        }


def is_run(workdir: StrPath) -> bool:
    """Whether a folder is that of a run (and not, say, of a sweep)."""
    return (Path(workdir) / "config.json").exists()


def read(workdir: StrPath, *, base: RunConfig | None = None, sample: str | None = None) -> Facts:
    """Reads a run's folder and its held-out text, and lets the newest weights read and write text.

    Args:
      workdir: folder of the run, which may still be training.
      base: the config whose differences from the run's the card lists.
      sample: a text by the model; None: it writes `sample_tokens` tokens after `sample_prompt`.

    Raises:
      UserError: no checkpoint, a damaged file, or text that is not where the config says.
    """
    folder = Path(workdir)
    run = load_run(folder)
    config = run.config
    evaluation = read_json(folder / "evaluation.json", missing_ok=True)
    sources = Sources.open(config.data)
    bits = {name: row.get("bits_per_byte") for name, row in evaluation.items()}
    if sample is None:
        logger.info("card: writing a sample ...")
        length = config.sample_tokens or _SAMPLE_TOKENS
        prompt = config.sample_prompt
        sample = prompt + run.generate(prompt, max_new_tokens=length, seed=config.seed)
    logger.info("card: compressing the held-out text ...")
    held_out = compare(sources, bits)
    routing = None
    if run.model.moe.num_experts:
        logger.info("card: counting the experts of an excerpt ...")
        name = next(iter(sources.eval))
        routing = run.routing(excerpt(run, list(sources.eval[name].texts())))
    own, other = to_dict(config), to_dict(base or config)
    return Facts(
        workdir=str(workdir),
        run=run,
        rows=read_rows(folder / "metrics.jsonl"),
        evaluation=evaluation,
        record=Record.read(folder),
        held_out=held_out,
        routing=routing,
        sample=sample,
        changed=list(changes(other, own)),
    )


def excerpt(run: Run, texts: list[str]) -> str:
    """Returns a part of the first long text, no longer than the rows that the run was trained on.

    It begins after the first empty line in the second half of the text: at a definition, if it is
    code, and not at a licence.
    """
    text = next((text for text in texts if len(text) > 3 * _EXCERPT), max(texts, key=len))
    half = text[len(text) // 2 :]
    text = (half.partition("\n\n")[2] or half).lstrip("\n")[:_EXCERPT].rstrip()
    limit, tokens = run.loaded.meta.seq_len, len(run.encode(text))
    return text[: max(1, len(text) * limit // tokens)] if tokens > limit else text


def _tokens(segment: Segment) -> int:
    return segment.steps * segment.step_tokens
