"""Which factors an arm changes: an ablation compares arms that differ in one."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

from lightning_jax.config import RunConfig
from lightning_jax.config.fields import changes, to_dict


def changed(
    baseline: RunConfig, arm: RunConfig, factors: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Returns the factors in which two configs differ, each with its fields that differ.

    Args:
      baseline: the config to compare with.
      arm: the config of an arm.
      factors: by name of a factor, the dotted fields that make it up; `*` stands for any text, as
        in `stages.*.learning_rate`. A field that is in none is a factor of its own. A source that
        an arm adds or removes is one factor with its places in the mixtures.
    """
    found: dict[str, list[str]] = {}
    for field, _, _ in changes(to_dict(baseline), to_dict(arm)):
        found.setdefault(_factor(field, factors), []).append(field)
    sources = [name for name in found if name.startswith("data.sources.") and name.count(".") == 2]
    for source in sources:
        place = f"stages.*.mixture.{source.removeprefix('data.sources.')}"
        for name in fnmatch.filter([*found], place):
            found[source] += found.pop(name)
    return found


def _factor(field: str, factors: Mapping[str, Sequence[str]]) -> str:
    for name, patterns in factors.items():
        if any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns):
            return name
    return field
