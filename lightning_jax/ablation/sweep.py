"""A sweep: arms that change one base config, each trained with several seeds.

A sweep file has a function `get_sweep()` that returns a plain dict: `question`, `base` (what a
config file returns), `baseline` (the name of one arm), `arms` (by name, the config fields it
changes, `{"model.unit": "G"}`), `seeds`, and what else `Sweep` has. Arms of one seed see the same
text in the same order, so that their differences are paired.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation import factors
from lightning_jax.ablation.results import Run
from lightning_jax.config import RunConfig, StageConfig, kinds, overrides
from lightning_jax.config.errors import UserError, did_you_mean, suggest
from lightning_jax.config.fields import build, require, require_choice, to_dict
from lightning_jax.config.routing import EvalRouting
from lightning_jax.runtime import shipped

# Of a sweep's folder: the sweep that it holds.
FILE = "sweep.json"
BUDGETS = ("tokens", "flops", "time")
SEARCH = {"trials": 8, "low": 0.3, "high": 3.0, "tokens": 1.0}
_SEARCH_KINDS = {
    "trials": kinds.integer(3, 10_000),  # Fewer are no grid with a middle.
    "low": kinds.number(0, 1e6, above=True),
    "high": kinds.number(0, 1e6, above=True),
    "tokens": kinds.number(0, 1, above=True),
}
_SCALES = kinds.number(0, 1000, above=True)
_MAPPING = kinds.Kind("a mapping of names", lambda value: type(value) is dict)
_LIST = kinds.Kind("a list of numbers", lambda value: type(value) is list)
# Of the fields of a sweep file.
_KINDS = {
    "question": kinds.TEXT,
    "base": _MAPPING,
    "baseline": kinds.TEXT,
    "arms": _MAPPING,
    "seeds": _LIST,
    "factors": _MAPPING,
    "several": _MAPPING,
    "budget": kinds.TEXT,
    "scaling": _LIST,
    "search": _MAPPING,
    "inference": _MAPPING,
}
# Of the values in those that are mappings.
_VALUES = {
    "arms": kinds.Kind('what it changes, such as {"model.unit": "G"}', _MAPPING.accepts),
    "factors": kinds.Kind(
        'a list of fields, such as ["model.unit"]',
        lambda value: bool(value) and kinds.list_of(kinds.TEXT).accepts(value),
    ),
    "several": kinds.Kind("text that says why", kinds.TEXT.accepts),
    "inference": kinds.Kind(
        'a routing, such as {"top_p": 0.3}', lambda value: bool(value) and _MAPPING.accepts(value)
    ),
}
_ROUTING_KINDS = {
    "routing": kinds.TEXT,
    "top_k": kinds.integer(1),
    "top_p": kinds.number(0, 1, above=True),
}
# What a sweep's folder has besides the folders of its arms, in lower case: folders, and files.
_OWN_FOLDERS = ("calibration", "compiled", "search", "submitit")
_OWN_FILES = (".csv", ".html", ".json", ".jsonl", ".png")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A checked sweep: every arm's config has been built once, and changes one factor or says why.

    Attributes:
      question: what the sweep asks.
      base: a config, as a nested plain dict.
      baseline: name of the arm that the others are compared with.
      arms: by name, `{dotted config field: value}`, the changes of `base`.
      seeds: each arm runs with each of them.
      margin: the difference that matters, as a share of the baseline's bits per byte.
      factors: by name, fields that make up one factor, see `ablation.factors.changed`.
      several: by arm that changes several factors of the baseline, why it does. In a sweep file,
        `*` speaks for all such arms that are not named.
      budget: what arms have in common: `tokens`, training `flops` or `time`, see `ablation.budget`.
      scaling: shares of its tokens with which the baseline is trained too. These runs are arms
        named `<baseline>@<share>`; they measure the baseline's scaling and are not compared.
      search: of the learning rate of each arm, `SEARCH` with changes; empty: none. `trials` is
        their number per arm, `low` and `high` bound the factor on the rates of the config, and
        `tokens` is the share of the tokens that a trial has.
      inference: by name, other routings under which finished runs with experts are evaluated too,
        as fields of `EvalRouting`: `{"top_2": {"routing": "top_k", "top_k": 2}}`.
    """

    question: str
    base: dict[str, Any]
    baseline: str
    arms: dict[str, dict[str, Any]]
    seeds: tuple[int, ...]
    margin: float = 0.005
    factors: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    several: dict[str, str] = dataclasses.field(default_factory=dict)
    budget: str = "tokens"
    scaling: tuple[float, ...] = ()
    search: dict[str, Any] = dataclasses.field(default_factory=dict)
    inference: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.question.strip()), "question", self.question, "what the sweep asks")
        self._check_names()
        valid = self.seeds and all(type(seed) is int and seed >= 0 for seed in self.seeds)
        require(bool(valid), "seeds", self.seeds, "one or more numbers, 0 or above")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "different numbers")
        is_share = type(self.margin) in (int, float) and 0 < self.margin < 1
        require(is_share, "margin", self.margin, "a share of the baseline's score, in (0, 1)")
        require_choice("budget", self.budget, BUDGETS)
        self._check_scaling()
        for key in self.search:
            require(key in SEARCH, "search", key, suggest(key, SEARCH))
        kinds.check(self.search, _SEARCH_KINDS, "search", required=())
        if self.search:
            low, high = self.search["low"], self.search["high"]
            require(low < high, "search.high", high, f"above search.low = {low}")
        configs = {arm: self.config(Run(arm, self.seeds[0])) for arm in self.arms}
        self._check_inference(configs.values())
        self._check_factors(configs)

    def _check_names(self) -> None:
        require(bool(self.arms), "arms", self.arms, "at least one arm by name")
        for name in self.arms:
            right = "another name: the sweep's folder has a file or folder of its own like it"
            is_own = name.lower() in _OWN_FOLDERS or name.lower().endswith(_OWN_FILES)
            require(not is_own, "arms", name, right)
        _require_folders("arms", self.arms)
        require(
            self.baseline in self.arms,
            "baseline",
            self.baseline,
            suggest(self.baseline, [*self.arms]),
        )

    def _check_scaling(self) -> None:
        for share in self.scaling:
            fits = _SCALES.accepts(share) and f"{share:g}" != "1"
            right = "shares of the tokens, in (0, 1000], but not 1, which the baseline has"
            require(fits, "scaling", self.scaling, right)
        is_distinct = len(self.scaling_arms) == len(self.scaling)
        require(is_distinct, "scaling", self.scaling, "different numbers, in six digits")

    def _check_inference(self, configs: Iterable[RunConfig]) -> None:
        _require_folders("inference", self.inference)
        for name, values in self.inference.items():
            for key in values:
                require(
                    key in _ROUTING_KINDS, f"inference.{name}", key, suggest(key, _ROUTING_KINDS)
                )
            kinds.check(values, _ROUTING_KINDS, f"inference.{name}", required=())
        _ = self.routings  # They are checked as they are made.
        has_experts = any(config.model.moe.num_experts for config in configs)
        right = "left out: no arm has experts"
        require(has_experts or not self.inference, "inference", self.inference, right)

    def _check_factors(self, configs: Mapping[str, RunConfig]) -> None:
        """Refuses an arm that changes several factors without a word; gives each its own word."""
        known = {
            field for config in configs.values() for field in overrides.fields(to_dict(config))
        }
        for name, fields in self.factors.items():
            for field in fields:
                if not fnmatch.filter(known, field):
                    hint = did_you_mean(field, known)
                    raise UserError(f"factors.{name} = {field!r}: there is no such field{hint}")
        for arm in self.several:
            require(arm == "*" or arm in self.arms, "several", arm, suggest(arm, [*self.arms]))
        reasons = {}
        for arm, config in configs.items():
            found = factors.changed(configs[self.baseline], config, self.factors)
            reason = self.several.get(arm) or self.several.get("*") if len(found) > 1 else None
            if reason:
                reasons[arm] = reason
            elif len(found) > 1:
                raise UserError(
                    f"arm {arm!r}: differs from the baseline {self.baseline!r} in {len(found)} "
                    f"factors, {', '.join(found)}: name those that are one in `factors`, or say "
                    f'why in several = {{"{arm}": "why"}}'
                )
            elif arm in self.several:
                count = "one factor alone" if found else "nothing"
                right = f"left out: it differs from the baseline in {count}"
                require(False, f"several.{arm}", self.several[arm], right)
        object.__setattr__(self, "several", reasons)

    @property
    def routings(self) -> dict[str, EvalRouting]:
        """The routings of `inference`."""
        return {name: EvalRouting(**values) for name, values in self.inference.items()}

    @property
    def scaling_arms(self) -> dict[str, float]:
        """The arms that measure the baseline's scaling: by name, their share of its tokens."""
        return {f"{self.baseline}@{share:g}": share for share in self.scaling}

    def config(self, run: Run, tokens: float = 1.0, rate: float = 1.0) -> RunConfig:
        """Builds one run's config.

        Args:
          run: of an arm, or of one of the `scaling_arms`.
          tokens: factor on the tokens of every stage, of its warm-up and of its decay. Stages get
            whole steps.
          rate: factor on the learning rates of every stage.

        Raises:
          UserError: an unknown field, or a value that the config refuses; names the arm.
        """
        arm, share = run.arm, self.scaling_arms.get(run.arm)
        if share is not None:
            arm, tokens = self.baseline, tokens * share
        try:
            values = override({**self.base, "seed": run.seed}, self.arms[arm])
            config = build(RunConfig, values)
            stages = tuple(_scaled(stage, tokens, rate) for stage in config.stages)
            return dataclasses.replace(config, stages=stages)
        except UserError as error:
            raise UserError(f"arm {run.arm!r}: {error}") from error

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Run]:
        """Lists the runs of some arms and seeds (empty: all), those of `scaling_arms` last.

        Seeds are the outer loop: a sweep cut short still compares all arms on the seeds it has.

        Raises:
          UserError: an arm or a seed that the sweep does not have.
        """
        known = [*self.arms, *self.scaling_arms]
        for arm in only:
            require(arm in known, "only", arm, suggest(arm, known))
        for seed in seeds:
            require(seed in self.seeds, "seeds", seed, f"one of {', '.join(map(str, self.seeds))}")
        return [
            Run(arm, seed)
            for group in (self.arms, self.scaling_arms)
            for seed in self.seeds
            for arm in group
            if (not seeds or seed in seeds) and (not only or arm in only)
        ]


def _require_folders(field: str, names: Iterable[str]) -> None:
    """Names that any file system tells apart."""
    names = [*names]
    for name in names:
        fits = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}", name) is not None
        right = "named with at most 100 letters, digits and _.+- (it is the name of a file)"
        require(fits, field, name, right)
    is_distinct = len({name.lower() for name in names}) == len(names)
    require(is_distinct, field, names, "different without case")


def _scaled(stage: StageConfig, tokens: float, rate: float) -> StageConfig:
    """Returns a stage with its lengths times `tokens` and its learning rates times `rate`.

    A stage lasts whole steps: its own, rounded up, times `tokens`, are rounded to the nearest.
    """
    rates = {
        "learning_rate": stage.learning_rate * rate,
        "final_learning_rate": stage.final_learning_rate * rate,
    }
    if tokens == 1:
        return dataclasses.replace(stage, **rates)
    step = stage.batch_size * stage.seq_len
    length = max(round(-(-stage.tokens // step) * tokens), 1) * step
    warmup = round(stage.warmup_tokens * length / stage.tokens)
    decay = min(round(stage.decay_tokens * length / stage.tokens), length - warmup)
    lengths = {"tokens": length, "warmup_tokens": warmup, "decay_tokens": decay}
    return dataclasses.replace(stage, **lengths, **rates)


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
    known = [field.name for field in dataclasses.fields(Sweep)]
    for key in fields:
        if key not in known:
            raise UserError(f"unknown sweep field {key}: {suggest(key, known)}")
    for key in ("question", "base", "baseline", "arms", "seeds"):
        if key not in fields:
            raise UserError(f"sweep field {key} is missing")
    for key, kind in _KINDS.items():
        if key in fields:
            require(kind.accepts(fields[key]), key, fields[key], kind.right)
    for name, kind in _VALUES.items():
        for key, value in fields.get(name, {}).items():
            require(kind.accepts(value), f"{name}.{key}", value, kind.right)
    for key in ("seeds", "scaling"):
        fields[key] = tuple(fields.get(key, ()))
    if fields.get("search"):
        fields["search"] = SEARCH | fields["search"]
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
