"""Arms of a sweep from groups of arms: all pairs, pairs in order, or one after another.

A group is what a sweep file has as `arms`: by name, the config fields that the arm changes. So is
the result, whose names are those of the groups joined by `_`:

    pattern = {"G": {"model.unit": "G"}, "LG": {"model.unit": "LG"}}
    window = {"w16": {"model.attention.window": 16}, "w64": {"model.attention.window": 64}}
    product(pattern, window)  # G_w16, G_w64, LG_w16, LG_w64
    zipped(pattern, window)   # G_w16, LG_w64
    chain(pattern, window)    # G, LG, w16, w64

An arm of `product` or `zipped` may differ from the baseline in several factors, which the sweep
must say: `several={"*": "every pattern at every window"}`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require

Arms = dict[str, dict[str, Any]]
Group = Mapping[str, Mapping[str, Any]]


def product(*groups: Group) -> Arms:
    """Returns an arm for each choice of one arm from every group; the last group varies fastest.

    Raises:
      UserError: two groups change the same field, or two choices have the same name.
    """
    return _joined(groups, itertools.product(*(group.items() for group in groups)))


def zipped(*groups: Group) -> Arms:
    """Returns the groups' first arms as one arm, then the second ones, and so on.

    Raises:
      UserError: as `product`, or the groups differ in length.
    """
    sizes = [len(group) for group in groups]
    require(len(set(sizes)) < 2, "groups of zipped()", sizes, "equally many arms each")
    return _joined(groups, zip(*(group.items() for group in groups), strict=True))


def chain(*groups: Group) -> Arms:
    """Returns the arms of all groups, one group after another.

    Raises:
      UserError: two groups have an arm of the same name.
    """
    return _named((name, dict(arm)) for group in groups for name, arm in group.items())


def _joined(
    groups: Sequence[Group], choices: Iterable[tuple[tuple[str, Mapping[str, Any]], ...]]
) -> Arms:
    fields = [{field for arm in group.values() for field in arm} for group in groups]
    for one, other in itertools.combinations(fields, 2):
        if shared := sorted(one & other):
            raise UserError(
                f"two groups change {shared[0]}: which of the values would an arm have?"
            )
    return _named(
        (
            "_".join(name for name, _ in choice),
            {field: value for _, arm in choice for field, value in arm.items()},
        )
        for choice in choices
    )


def _named(arms: Iterable[tuple[str, dict[str, Any]]]) -> Arms:
    found: Arms = {}
    for name, arm in arms:
        if name in found:
            raise UserError(f"two arms are named {name!r}: rename one in its group")
        found[name] = arm
    return found
