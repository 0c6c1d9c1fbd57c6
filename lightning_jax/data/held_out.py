"""What is held out: the choice within a source, and that no source trains on it.

The content of a document decides its side: the first 8 bytes of the sha256 of its text, as a share
of 2^64, is below `eval_fraction` or not. So the same text is on the same side wherever it is found,
and neither a glob nor a new file moves an old one. (Of too few documents, the one with the smallest
share is held out, and the one with the largest is not.) Of a source that is one document, a tail is
held out.

Where sources choose differently (an `eval_path`, too few documents, modules of the standard
library, whose names decide), the evaluation wins: what any source of the run holds out, whole or in
part, no source trains on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from lightning_jax.data.index import BLANK, key_of

# A tail begins at a line end if there is one within this part of its length.
_NEAR = 0.25


def choose(sides: np.ndarray, keys: np.ndarray, eval_fraction: float) -> np.ndarray:
    """Returns bool [documents], which of them are held out: at least one, but not all.

    Args:
      sides: uint64 [documents], what decides.
      keys: uint64 [documents], of their contents, at least two different; blank ones are trained
        on.
    """
    has_content = keys != BLANK
    is_eval = sides < np.uint64(eval_fraction * 2.0**64)
    is_eval |= sides == sides[has_content].min()
    return is_eval & (sides != sides[has_content].max()) & has_content


def only_content(keys: np.ndarray) -> int | None:
    """Returns the first document that has content if all that have any have the same, else None."""
    (having,) = np.nonzero(keys != BLANK)
    return int(having[0]) if len(having) and (keys[having] == keys[having[0]]).all() else None


def tail_start(text: bytes, eval_fraction: float) -> int:
    """Returns where the held-out tail of a text begins, in bytes; 0 if it is too short for one.

    The tail is about `eval_fraction` of it, whole lines if it has lines of some such length.
    """
    length = max(1, round(eval_fraction * len(text)))
    start, near = len(text) - length, int(length * _NEAR)
    line = text.rfind(b"\n", max(0, start - near), start + near) + 1
    if line:
        start = line
    else:
        while 0 < start < len(text) and text[start] & 0xC0 == 0x80:  # inside a character
            start -= 1
    return start if text[:start].strip() and text[start:].strip() else 0


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Keys of what all sources of a run hold out.

    Attributes:
      whole: uint64 [documents] sorted, of whole documents and of tails.
      part: uint64 [documents] sorted, of the documents of which a tail is held out.
    """

    whole: np.ndarray
    part: np.ndarray

    @classmethod
    def of(cls, whole: Iterable[np.ndarray], part: Iterable[np.uint64]) -> HeldOut:
        """Collects the keys of all sources."""
        whole = np.unique(np.concatenate([*whole, np.empty(0, np.uint64)]))
        return cls(whole, np.unique(np.array([*part], np.uint64)))

    def has(self, keys: np.ndarray) -> np.ndarray:
        """Returns bool [documents], which documents are held out, whole or in part."""
        return _among(self.whole, keys) | _among(self.part, keys)

    def has_text(self, *texts: bytes) -> bool:
        """Whether one of these texts is held out as a whole."""
        return bool(_among(self.whole, np.array([key_of(text) for text in texts])).any())


def _among(members: np.ndarray, keys: np.ndarray) -> np.ndarray:
    if not len(members):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(members, keys), len(members) - 1)
    return members[at] == keys
