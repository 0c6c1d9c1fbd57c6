"""The layer pattern: one letter a layer."""

from __future__ import annotations

import dataclasses

from lightning_jax.fields import require

LOCAL, GLOBAL = "L", "G"


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What one letter of the pattern says. `owner` is the key of the layer that owns its K/V."""

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


def parse_pattern(pattern: str, field: str, *, routed: bool) -> tuple[LayerSpec, ...]:
    """Reads one letter a layer: `L` local, `G` global; lower case borrows the keys and values.

    A borrower reads those of the last owner of the same letter inside the pattern, so local layers
    never borrow from global ones and keys and values never leave a scan step. Layers are keyed
    `"<index>_<letter>"`.

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
        layers.append(LayerSpec(key, letter, owners[kind], routed))
    return tuple(layers)
