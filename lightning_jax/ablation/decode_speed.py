"""How fast the arms of a sweep read a prompt and write text, measured side by side."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import time
from pathlib import Path
from typing import Any

import jax

from lightning_jax.ablation.results import Run, is_finished, read_by_arm
from lightning_jax.ablation.sweep import Sweep
from lightning_jax.config import kinds
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.infer import run as trained
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from lightning_jax.runtime.files import write_json

logger = logging.getLogger(__name__)

FILE = "decode.json"
# Tokens that are written after each prompt.
_NEW = 64
# What `read` needs of an arm.
_RECORD = {
    "tokens_per_second": kinds.number(0, above=True),
    "prefill_seconds": kinds.number(0),
    "context": kinds.integer(1),
    "rounds": kinds.integer(1),
    "device": kinds.TEXT,
}
_GREEDY = Sampling(temperature=0.0)


@dataclasses.dataclass
class _Arm:
    """One arm's engine and prompt, and what was measured: a number for each round."""

    seed: int
    engine: Engine
    prompt: list[int]
    prefills: list[float] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)

    def measure(self) -> None:
        """Reads the prompt and writes after it; the first token ends the prefill."""
        begun = time.perf_counter()
        stream = self.engine.stream(
            [self.prompt], _GREEDY, max_new_tokens=_NEW, key=jax.random.key(0)
        )
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        self.prefills.append(first - begun)
        self.rates.append((_NEW - 1) / (time.perf_counter() - first))


def measure(
    sweep: Sweep, root: Path, *, context: int = 1024, rounds: int = 5
) -> dict[str, dict[str, Any]]:
    """Times one finished run of each arm, batch 1, and writes `decode.json` into the folder.

    Each round takes all arms in turn and begins with another one, so that other work on the machine
    slows them alike; one round before the first compiles. The weights of all arms are in memory at
    once. A prompt is held-out text of the run, as often as its length needs; its tokens count, so
    arms with other tokenizers read other lengths of text.

    Args:
      sweep: whose arms are measured, each by the first of its seeds that has finished.
      root: the sweep's folder.
      context: tokens of the prompt.
      rounds: the results are medians over as many.

    Returns:
      By arm: `tokens_per_second` of decoding after the prompt, `prefill_seconds`, the
      `experts_per_token` that were used (None without experts), `seed`, `context`, `new_tokens`,
      `rounds` and `device`. Arms without a finished run are left out.

    Raises:
      UserError: a number below 1, no finished run, or a run that cannot be read.
    """
    require(context >= 1, "context", context, "at least 1")
    require(rounds >= 1, "rounds", rounds, "at least 1")
    arms: dict[str, _Arm] = {}
    for name in sweep.arms:
        for seed in sweep.seeds:
            folder = Run(name, seed).folder(root)
            if is_finished(folder):
                logger.info("decoding: loading %s seed %d", name, seed)
                arms[name] = _load(folder, seed, context)
                break
    if not arms:
        raise UserError(f"workdir = {str(root)!r}: no run of the sweep has finished")
    order = list(arms)
    for index in range(rounds + 1):
        logger.info("decoding: %s", f"round {index} of {rounds}" if index else "compiling")
        first = index % len(order)
        for name in order[first:] + order[:first]:
            arms[name].measure()
    found = {
        name: {
            "tokens_per_second": statistics.median(arm.rates[1:]),
            "prefill_seconds": statistics.median(arm.prefills[1:]),
            "experts_per_token": arm.engine.experts_per_token,
            "seed": arm.seed,
            "context": context,
            "new_tokens": _NEW,
            "rounds": rounds,
            "device": jax.devices()[0].device_kind,
        }
        for name, arm in arms.items()
    }
    write_json(root / FILE, found)
    return found


def read(root: Path) -> dict[str, dict[str, Any]]:
    """Returns the result of `measure` that a sweep's folder has; empty without any.

    Raises:
      UserError: `decode.json` is damaged.
    """
    return read_by_arm(root / FILE, _RECORD, required=[*_RECORD])


def _load(folder: Path, seed: int, context: int) -> _Arm:
    run = trained.load_run(folder)
    ids: list[int] = []
    for text in itertools.chain.from_iterable(map(run.held_out, run.config.data.source_names)):
        ids += run.tokenizer.encode(text)
        if len(ids) >= context:
            break
    if not ids:
        raise UserError(f"{folder}: its sources hold out no text to read")
    prompt = (ids * -(-context // len(ids)))[:context]
    engine = Engine(
        run.model,
        run.params,
        run.router,
        max_length=context + _NEW,
        valid_vocab=run.tokenizer.vocab_size,
    )
    return _Arm(seed, engine, prompt)
