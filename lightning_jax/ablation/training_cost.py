"""What a training costs: its tokens, FLOPs and seconds, from the config and what was measured.

Under a fixed top-p, how many experts a token uses is known only once a run has measured it. Under
the controller they are its target, or what was measured; elsewhere the config says it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lightning_jax import accounting
from lightning_jax.config import DataConfig, MoeConfig, RunConfig, kinds
from lightning_jax.config.fields import LARGEST_COUNT, require
from lightning_jax.train.plan import Plan
from lightning_jax.train.resolve import resolve

_ROW = {
    "mean_experts": kinds.list_of(kinds.number(0, LARGEST_COUNT)),
    "dropped_share": kinds.list_of(kinds.number(0, 1)),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a run has measured in one stage.

    Attributes:
      experts_per_token: routed experts that a token was computed by, mean over routed layers; None
        without experts.
      tokens_per_second: median over logged windows, so that compilation does not count.
    """

    experts_per_token: float | None
    tokens_per_second: float


def measured(rows: Sequence[Mapping[str, Any]], where: object) -> dict[str, Measured]:
    """Returns what the rows of a run's `metrics.jsonl` say of each stage that has any.

    Experts are weighted by the tokens since the row before.

    Args:
      rows: of `train.metrics.read_rows`.
      where: the file, for errors.

    Raises:
      UserError: a row's experts are no numbers by layer.
    """
    stages: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    last = 0
    for row in rows:
        if "tokens_per_second" in row:
            kinds.check(row, _ROW, where, required=["stage"])
            layers = {len(row[name]) for name in _ROW if name in row}
            right = "numbers of the same layers, one or more"
            require(len(layers) < 2 and 0 not in layers, f"{where}: {', '.join(_ROW)}", row, right)
            stages.setdefault(row["stage"], []).append((row["tokens"] - last, row))
            last = row["tokens"]
    return {stage: _of_stage(found) for stage, found in stages.items()}


def _of_stage(found: Sequence[tuple[int, Mapping[str, Any]]]) -> Measured:
    used = [(tokens, _experts(row)) for tokens, row in found if "mean_experts" in row]
    experts = None
    if used:
        tokens, means = zip(*used, strict=True)
        experts = float(np.average(means, weights=tokens if sum(tokens) else None))
    return Measured(experts, float(np.median([row["tokens_per_second"] for _, row in found])))


def _experts(row: Mapping[str, Any]) -> float:
    """Experts per token that were computed: the router's choices but those beyond a capacity."""
    chosen = np.asarray(row["mean_experts"], np.float64)
    return float(np.mean(chosen * (1 - np.asarray(row.get("dropped_share", 0.0), np.float64))))


def is_known(moe: MoeConfig) -> bool:
    """Whether the config alone says how many routed experts a token uses in training.

    A capacity drops some, and a fixed top-p takes as many as the router needs. Under the
    controller, tokens use its target in the mean.
    """
    fixed_p = moe.train_routing == "top_p" and not moe.target_experts
    return not moe.num_experts or not (fixed_p or moe.capacity_factor)


def tokens(config: RunConfig) -> int:
    """Returns the tokens that a run trains on, padding and the rest of its last steps included."""
    return Plan.of(config).total_tokens


def training_flops(config: RunConfig, stages: Mapping[str, Measured]) -> float | None:
    """Returns the FLOPs that a model needs for its training, windows and experts counted.

    Those of `accounting.flops_per_token` at each stage's sequence length; what devices repeat for
    rematerialisation or micro-batches is left out.

    Args:
      config: with the vocabulary's size.
      stages: what was measured in each; a stage without measured experts has those that the config
        says.

    Returns:
      None if the experts of a stage are neither measured nor known.
    """
    total, moe = 0.0, config.model.moe
    for segment in Plan.of(config).segments:
        of_stage = stages.get(segment.stage.name)
        used = of_stage.experts_per_token if of_stage else None
        if used is None and not is_known(moe):
            return None
        cost = accounting.flops_per_token(
            config.model, seq_len=segment.seq_len, experts_per_token=used
        )
        total += segment.steps * segment.step_tokens * cost
    return total


def expected_flops(config: RunConfig, calibration: Mapping[str, Measured]) -> float | None:
    """Returns the `training_flops` of a run that is still to be trained.

    Args:
      config: with the vocabulary's size.
      calibration: what the arm's calibration measured in each stage, if there was one. It is asked
        only for what the config does not say: it may have been too short for a controller.
    """
    return training_flops(config, {} if is_known(config.model.moe) else calibration)


def training_seconds(config: RunConfig, stages: Mapping[str, Measured]) -> float:
    """Returns the seconds of a training at the measured speed of each stage.

    Compilation, evaluations and checkpoints are left out. All stages have been measured.
    """
    segments = Plan.of(config).segments
    return sum(
        segment.steps * segment.step_tokens / stages[segment.stage.name].tokens_per_second
        for segment in segments
    )


def with_vocabularies(configs: Iterable[RunConfig]) -> list[RunConfig]:
    """Returns configs with the vocabulary's size, where it is left to the tokenizer.

    A tokenizer that is still to be trained is trained once for all configs of the same text.

    Raises:
      UserError: as `train.resolve.resolve`.
    """
    sizes: dict[DataConfig, int] = {}
    found = []
    for config in configs:
        if not config.model.vocab_size:
            if config.data not in sizes:
                sizes[config.data] = resolve(config).config.model.vocab_size
            model = dataclasses.replace(config.model, vocab_size=sizes[config.data])
            config = dataclasses.replace(config, model=model)
        found.append(config)
    return found
