"""From a list of layers to prefix and unit: the shortest equivalent stack of parameters.

Published configs name every layer by itself; here a model is `prefix` + `num_units` x `unit`, and a
unit is the body of a scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_jax.config.errors import UserError
from lightning_jax.config.pattern import DENSE, EXPERTS, parse_pattern


@dataclasses.dataclass(frozen=True)
class Stack:
    """The fields of `ModelConfig` that define the layers."""

    prefix: str
    unit: str
    unit_mlp: str
    num_units: int


def with_borrowers(kinds: str, kv_source: Sequence[int] | None) -> str:
    """Returns the letters of layers of `kinds` (L or G) where layer i reads layer `kv_source[i]`.

    None: every layer owns its keys and values.

    Raises:
      UserError: a source that is not the last owner of the same kind before the layer; lower-case
        letters can express no other.
    """
    if kv_source is None:
        return kinds
    if len(kv_source) != len(kinds):
        raise UserError(
            f"kv_source = {list(kv_source)}: must have {len(kinds)} entries, one per layer"
        )
    letters, owners = "", {}
    for index, (kind, source) in enumerate(zip(kinds, kv_source, strict=True)):
        if source == index:
            owners[kind] = index
        elif owners.get(kind) != source:
            last = f"layer {owners[kind]}" if kind in owners else "none"
            raise UserError(
                f"kv_source[{index}] = {source}: must be {index} (its own) or the last owner of "
                f"kind {kind} before it, which is {last}"
            )
        letters += kind if source == index else kind.lower()
    return letters


def stack(letters: str, mlps: str) -> Stack:
    """Returns the stack with the fewest different layers; among equals the longest prefix.

    Args:
      letters: one per layer, as in a pattern.
      mlps: E (experts) or D (dense) for each layer. A prefix has dense layers only.
    """
    found = []
    for start in range(len(letters)):
        rest, rest_mlps = letters[start:], mlps[start:]
        sizes = range(1, len(rest) + 1)
        size = next((n for n in sizes if _repeats(rest, rest_mlps, n)), None)
        if EXPERTS in mlps[:start] or size is None or not _closed(letters[:start]):
            continue
        # An empty string means all experts, or all dense in a model without experts.
        plain = EXPERTS if EXPERTS in mlps else DENSE
        unit_mlp = "" if set(rest_mlps) == {plain} else rest_mlps[:size]
        cost = (start + size, -start)
        found.append((cost, Stack(letters[:start], rest[:size], unit_mlp, len(rest) // size)))
    return min(found, key=lambda entry: entry[0])[1]


def _repeats(letters: str, mlps: str, size: int) -> bool:
    times, rest = divmod(len(letters), size)
    whole = letters == letters[:size] * times and mlps == mlps[:size] * times
    return not rest and whole and _closed(letters[:size])


def _closed(letters: str) -> bool:
    """Whether no layer borrows from outside."""
    try:
        parse_pattern(letters, "layers")
    except UserError:
        return False
    return True


def mlp_letters(routed: Sequence[bool]) -> str:
    """Returns E where a layer has experts and D where its MLP is dense."""
    return "".join(EXPERTS if flag else DENSE for flag in routed)
