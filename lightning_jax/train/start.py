"""How a run starts in its folder: what is there is read and compared before anything is written."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config import CheckpointMeta, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.data import epochs, mixture
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.runtime.files import write_json
from lightning_jax.runtime.phases import phase
from lightning_jax.train import changes
from lightning_jax.train import workdir as folder
from lightning_jax.train.plan import Plan
from lightning_jax.train.resolve import Resolved, digest, kept_files, resolve

logger = logging.getLogger(__name__)

Rows = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Start:
    """A run that fits its folder, in which nothing is written yet.

    Attributes:
      past: what the folder holds of the run.
      data: rows of `Sources.fingerprint`.
      epochs: by source with weight, about how often the stages read all of it.
      changed: fields that the config changes of the run that is resumed.
    """

    past: folder.Past
    resolved: Resolved
    sources: Sources
    plan: Plan
    data: Rows
    epochs: Mapping[str, float]
    changed: list[tuple[str, Any, Any]]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.resolved.tokenizer

    @property
    def saved(self) -> CheckpointMeta | None:
        """Description of the checkpoint to start from; None without one."""
        return self.past.saved

    def digests(self) -> dict[str, str]:
        """Returns what must be the same in all processes of the run, by name."""
        data = {name: row["fingerprint"] for name, row in self.data.items()}
        return {
            "config": repr(self.resolved.config),
            "data": json.dumps(data),
            "tokenizer": self.resolved.digest,
        }

    def write(self, claim: folder.Claim) -> None:
        """Records the session in `run.json` and `config.json`, and keeps the tokenizer.

        UserError: disk.
        """
        if not claim.writes:
            return
        record, first_step = self.past.record, self.past.steps + 1
        if self.past.has_trained:
            record.go_on(self.resolved.digest, self.data, first_step)
        else:
            origin = record.origin if self.saved else None
            record.begin(self.resolved.digest, data=self.data, origin=origin)
        record.add_session(
            first_step,
            checkpoint=self.saved and self.saved.step,
            changed={field: [old, new] for field, old, new in self.changed},
        )
        _write(claim.path, record, self.resolved)


def look(config: RunConfig, path: Path, *, allow_changed_data: bool = False) -> Start:
    """Reads everything on which a run depends, cheap things first, and writes nothing.

    Args:
      config: the run; `model.vocab_size = 0` is resolved from the tokenizer.
      path: its folder, claimed.
      allow_changed_data: go on with text that is not the text that the run began with.

    Raises:
      UserError: `config` is another run than the folder's, its text or its tokenizer is not the
        folder's, or any of them cannot be read.
    """
    for name in config.forgotten_sources:
        logger.warning(
            "data.sources.%s: no stage trains on it, so it is evaluated only; "
            "stages.%s.mixture.%s = 0.1 would",
            *(name, config.stages[-1].name, name),
        )
    with phase(f"reading {path}"):
        past = folder.Past.read(path)
    changed = _changed(past, config)
    sources = Sources.open(config.data)
    with phase("comparing the text with what is known of it"):
        mixture.require_streams(sources, config.stages)
        data = sources.fingerprint()
    if past.has_trained:
        _compare_data(past, data, changed, allow_changed_data)
    resolved = _resolve(past, config, path, sources)
    if past.config is not None:
        changed = changes.check(past.config, to_dict(resolved.config), past.saved)
    planned = epochs.planned_epochs(sources, resolved.config.stages, resolved.tokenizer)
    return Start(past, resolved, sources, Plan.of(resolved.config), data, planned, changed)


def write_start(
    workdir: str | os.PathLike[str] | folder.Claim,
    config: RunConfig,
    params: Any,
    router: lm.Router,
    *,
    origin: dict[str, Any],
    tokenizer_of: Path | None = None,
) -> Resolved:
    """Makes a folder that can be evaluated and generate text at once, and from which to train.

    Args:
      workdir: a folder without a run, or the claim on it.
      config: the run; `experiments.train` with the same model and tokenizer goes on from here.
      params, router: the weights, float32 as every run keeps them.
      origin: where the weights came from, for `run.json`.
      tokenizer_of: folder of the run whose tokenizer the weights were trained with; None: that of
        `config`.

    Returns:
      The run and its tokenizer, as the folder has them.

    Raises:
      UserError: the folder has a run or cannot be written, or the tokenizer has more ids than the
        model.
    """
    with folder.claim(workdir) as claim:
        past = require_unused(claim.path)
        sources = Sources.open(config.data)
        resolved = _resolve(past, config, claim.path, sources, tokenizer_of)
        past.record.begin(resolved.digest, origin=origin)
        past.record.add_session(1, checkpoint=0)
        _write(claim.path, past.record, resolved)
        # Last, because the folder has a run from then on.
        with Checkpointer(claim.path, keep=resolved.config.keep_checkpoints) as checkpointer:
            items: dict[str, Any] = dict(zip(folder.START_ITEMS, (params, router), strict=True))
            checkpointer.save(0, items, None, to_dict(Plan.of(resolved.config).meta(0)))
        return resolved


def require_unused(path: Path) -> folder.Past:
    """Returns what a claimed folder holds, if that is no run.

    Raises:
      UserError: it holds a run, or files of something else.
    """
    past = folder.Past.read(path)
    if past.config is not None:
        what = "checkpoints" if past.saved else "the steps of a run"
        raise UserError(
            f"workdir = {str(path)!r}: has {what} already; give the weights another one"
        )
    return past


def _write(path: Path, record: Any, resolved: Resolved) -> None:
    # The record first: it says that the other files are this run's.
    record.write(path)
    write_json(path / folder.CONFIG, to_dict(resolved.config))
    resolved.keep(path)


def _changed(past: folder.Past, config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Returns the changes of the run that is resumed, all allowed; the vocabulary may be open."""
    if past.config is None:
        return []
    now = to_dict(config)
    now["model"]["vocab_size"] = now["model"]["vocab_size"] or past.config["model"]["vocab_size"]
    return changes.check(past.config, now, past.saved)


def _compare_data(
    past: folder.Past, data: Rows, changed: list[tuple[str, Any, Any]], allow: bool
) -> None:
    """Raises UserError where the text of a source is not that of the steps taken."""
    known = past.record.known_data()
    moved = {field.split(".")[2] for field, _, _ in changed if field.startswith("data.sources.")}
    for name, row in data.items():
        at, then = f"data.sources.{name}", known.get(name)
        if then and then["fingerprint"] == row["fingerprint"]:
            continue
        if then:
            problem = f"{at}: its text has changed: {_sizes(then)} before, {_sizes(row)} now"
        elif name in moved:
            problem = f"{at}: its path has changed, and run.json does not say what the text was"
        else:
            logger.warning("%s: run.json does not say what the text was before this session", at)
            continue
        if not allow:
            raise UserError(
                f"{problem}; restore it, use another --workdir, or go on with --allow_changed_data"
            )
        logger.warning("%s; allowed from step %d on", problem, past.steps + 1)


def _sizes(row: Mapping[str, Any]) -> str:
    train, held_out = (
        f"{row.get(f'{split}documents', '?')} documents ({row.get(f'{split}bytes', '?')} bytes)"
        for split in ("", "eval_")
    )
    return f"{train} and {held_out} held out"


def _resolve(
    past: folder.Past,
    config: RunConfig,
    path: Path,
    sources: Sources,
    tokenizer_of: Path | None = None,
) -> Resolved:
    """Resolves the tokenizer, and compares it with that in the folder."""
    has_begun = past.config is not None
    resolved = resolve(config, path if has_begun else tokenizer_of, sources)
    kept, known = kept_files(path), past.record.tokenizer
    field = f"data.tokenizer = {config.data.tokenizer!r}"
    if has_begun and known not in (None, resolved.digest):
        raise UserError(
            f"{field}: not the tokenizer with which this workdir's run began; restore its files "
            "in the workdir, or use another --workdir"
        )
    if has_begun and known is None and resolved.files and not kept:
        raise UserError(
            f"{field}: the files of this run's tokenizer are lost, and run.json does not say which "
            f"they were; restore them in {path}"
        )
    if not has_begun and kept and digest(kept) not in (known, resolved.digest):
        raise UserError(
            f"{field}: is not {path / min(kept)}; move that file away, or use another --workdir"
        )
    return resolved
