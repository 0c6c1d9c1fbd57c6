"""A sweep: arms that change one base config, each trained with several seeds.

A sweep file has a function `get_sweep()` that returns a plain dict: `question`, `base` (what a
config file returns), `baseline` (the name of one arm), `arms` (by name, the config fields it
changes, `{"model.unit": "G"}`) and `seeds`. Arms of one seed see the same text in the same order,
so that their differences are paired.
"""

from __future__ import annotations

import dataclasses
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation.results import Run
from lightning_jax.config import RunConfig, overrides
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import build, require
from lightning_jax.runtime import shipped


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep: every arm's config has been built once.

    `base` is a nested plain dict; `arms` maps a name to `{dotted config field: value}`.
    `margin` is the difference that matters, as a share of the baseline's bits per byte.
    """

    question: str
    base: dict[str, Any]
    baseline: str
    arms: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    margin: float = 0.005

    def __post_init__(self) -> None:
        require(bool(self.question.strip()), "question", self.question, "what the sweep asks")
        require(bool(self.arms), "arms", self.arms, "at least one arm by name")
        for name in self.arms:
            require(
                re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) is not None,
                "arms",
                name,
                "named with letters, digits and _.+- (the name is a folder's)",
            )
        folders = [name.lower() for name in self.arms]
        require(
            len(set(folders)) == len(folders), "arms", list(self.arms), "different without case"
        )
        require(
            self.baseline in self.arms,
            "baseline",
            self.baseline,
            suggest(self.baseline, [*self.arms]),
        )
        valid = self.seeds and all(type(seed) is int and seed >= 0 for seed in self.seeds)
        require(bool(valid), "seeds", self.seeds, "one or more numbers, 0 or above")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different numbers")
        is_share = type(self.margin) in (int, float) and 0 < self.margin < 1
        require(is_share, "margin", self.margin, "a share of the baseline's score, in (0, 1)")
        for name in self.arms:
            self.config(Run(name, self.seeds[0]))

    def config(self, run: Run) -> RunConfig:
        """Builds one run's config.

        Raises:
          UserError: an unknown field, or a value that the config refuses; names the arm.
        """
        try:
            return build(RunConfig, override({**self.base, "seed": run.seed}, self.arms[run.arm]))
        except UserError as error:
            raise UserError(f"arm {run.arm!r}: {error}") from error

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
        """Lists the runs of some arms and seeds (empty: all).

        Seeds are the outer loop: a sweep cut short still compares all arms on the seeds it has.

        Raises:
          UserError: an arm or a seed that the sweep does not have.
        """
        for arm in only:
            require(arm in self.arms, "only", arm, suggest(arm, [*self.arms]))
        for seed in seeds:
            require(seed in self.seeds, "seeds", seed, f"one of {', '.join(map(str, self.seeds))}")
        return [
            Run(arm, seed)
            for seed in self.seeds
            for arm in self.arms
            if (not seeds or seed in seeds) and (not only or arm in only)
        ]


def build_sweep(values: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Sweep:
    """Builds a Sweep from the result of `get_sweep()`, or from a `sweep.json`.

    Args:
      values: the fields of Sweep; `base` may be a ConfigDict.
      changes: config fields changed in the base, and so in every arm, by flags `--config.x`.

    Raises:
      UserError: a field that is unknown, missing or refused.
    """
    require(hasattr(values, "items"), "get_sweep()", values, "a dict")
    fields = {key: overrides.plain(value) for key, value in values.items()}
    known = {field.name: field.default for field in dataclasses.fields(Sweep)}
    for key in fields:
        if key not in known:
            raise UserError(f"unknown sweep field {key}: {suggest(key, [*known])}")
    for key, default in known.items():
        if key not in fields and default is dataclasses.MISSING:
            raise UserError(f"sweep field {key} is missing")
    for key in ("question", "baseline"):
        require(isinstance(fields[key], str), key, fields[key], "text")
    for key in ("base", "arms"):
        require(isinstance(fields[key], dict), key, fields[key], "a mapping of names")
    for arm, changed in fields["arms"].items():
        right = 'what it changes, such as {"model.unit": "G"}'
        require(isinstance(changed, dict), f"arms.{arm}", changed, right)
    require(isinstance(fields["seeds"], list), "seeds", fields["seeds"], "a list of numbers")
    fields["seeds"] = tuple(fields["seeds"])
    fields["base"] = override(fields["base"], changes or {}, prefix="--config.")
    return Sweep(**fields)


def load_sweep(path: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Sweep:
    """Runs a sweep file and builds a Sweep from the result of its `get_sweep()`.

    Raises:
      UserError: no such file, a fault in it (with its line), a sweep that `build_sweep` refuses, or
        an arm that is not what it seems to be.
    """
    path = Path(shipped.find(os.fspath(path), shipped.SWEEPS, f"sweep = {os.fspath(path)!r}"))
    module: dict[str, Any] = {"__name__": path.stem, "__file__": str(path)}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module)
        if "get_sweep" not in module:
            raise UserError("it has no function get_sweep()")
        values = module["get_sweep"]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # it may even call sys.exit(0)
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
        raise UserError(f"{path}:{line}: {type(error).__name__}: {error}") from error
    sweep = build_sweep(values, changes)
    for arm, changed in sweep.arms.items():
        moe = sweep.config(Run(arm, sweep.seeds[0])).model.moe
        if note := overrides.misleading(moe, {**(changes or {}), **changed}):
            raise UserError(f"arm {arm!r}: {note}")
    return sweep


def override(
    values: Mapping[str, Any], changes: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """Returns a copy of nested `values` with dotted fields changed, as `config.overrides` does it.

    Raises:
      UserError: an unknown field, with a "did you mean"; the seed, which the sweep sets.
    """
    if "seed" in changes:
        raise UserError("config field seed cannot be changed here: it is what `seeds` are for")
    return overrides.override(values, changes, prefix=prefix)
