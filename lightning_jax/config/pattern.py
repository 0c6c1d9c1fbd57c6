"""The layer pattern: one letter per layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning_jax.config.fields import require

LOCAL, GLOBAL = "L", "G"
EXPERTS, DENSE = "E", "D"


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """The meaning of one letter of the pattern; `owner` is the key of the layer with its K/V."""

    key: str
    letter: str
    owner: str
    routed: bool

    @property
    def is_local(self) -> bool:
        return self.letter.upper() == LOCAL

    @property
    def owns_kv(self) -> bool:
        return self.owner == self.key


def parse_pattern(
    pattern: str, field: str, routed: Sequence[bool] | None = None
) -> tuple[LayerSpec, ...]:
    """Reads one letter per layer: `L` local, `G` global; lower case borrows the keys and values.

    A borrower reads those of the last owner of the same letter inside the pattern, so local layers
    never borrow from global ones and keys and values never leave a scan step. Layers are keyed
    `"<index>_<letter>"`. `routed` says which layers have experts; None: no layer has any.

    Raises:
      UserError: a letter that is not one of L, l, G, g, or a borrower without an owner before it.
    """
    owners: dict[str, str] = {}
    layers = []
    for index, letter in enumerate(pattern):
        require(
            letter.upper() in (LOCAL, GLOBAL),
            field,
            pattern,
            f"made of L, l, G, g (letter {index} is {letter!r})",
        )
        key = f"{index}_{letter}"
        if letter.isupper():
            owners[letter] = key
        kind = letter.upper()
        other = ", and a local layer cannot borrow from a global one" if letter == "l" else ""
        require(
            kind in owners,
            field,
            pattern,
            f"such that {letter!r} at {index} has an owner {kind!r} before it in it{other}",
        )
        has_experts = routed is not None and routed[index]
        layers.append(LayerSpec(key, letter, owners[kind], has_experts))
    return tuple(layers)


def parse_mlps(mlps: str, unit: str, *, experts: bool) -> tuple[bool, ...]:
    """Reads which layers of a unit have experts: one letter per layer, E (experts) or D (dense).

    An empty string means E for every layer of a model with `experts`, else D.

    Raises:
      UserError: another letter, another length than the unit's, or an E in a model without experts.
    """
    if not mlps:
        return (experts,) * len(unit)
    allowed = (EXPERTS, DENSE) if experts else (DENSE,)
    right = f"empty, or {len(unit)} letters out of {', '.join(allowed)}, one per layer of {unit!r}"
    fits = len(mlps) == len(unit) and all(letter in allowed for letter in mlps)
    require(fits, "model.unit_mlp", mlps, right)
    return tuple(letter == EXPERTS for letter in mlps)
