"""What a model does with a text: the experts of each token, where it looks, how well it predicts.

Letters as everywhere; R counts layers with experts, L those whose attention was asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class TextRouting:
    """The experts that each token of a text took.

    pieces: text of each of the T tokens; joined, the text. Tokens that end inside a character, and
      the bos token, have an empty one.
    layers: indices, in the model, of the R layers that have experts.
    expert_index_RTC: int32 `[R, T, C]`, chosen experts in order; E marks an empty slot.
    num_experts: E, experts that a layer holds.
    """

    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    expert_index_RTC: np.ndarray
    num_experts: int

    @property
    def count_RT(self) -> np.ndarray:
        """int `[R, T]`: experts of each token in each layer."""
        return (self.expert_index_RTC < self.num_experts).sum(-1)

    @property
    def load_RE(self) -> np.ndarray:
        """int `[R, E]`: tokens of each expert of each layer."""
        return np.stack(
            [np.bincount(i.ravel(), minlength=self.num_experts + 1) for i in self.expert_index_RTC]
        )[:, : self.num_experts]

    @property
    def experts_per_token(self) -> float:
        """Mean over tokens and layers."""
        return float(self.count_RT.mean())

    @classmethod
    def joined(cls, routings: Sequence[TextRouting]) -> TextRouting:
        """Returns the routing of several texts as if they were one; all of the same model."""
        pieces = tuple(piece for routing in routings for piece in routing.pieces)
        index_RTC = np.concatenate([routing.expert_index_RTC for routing in routings], axis=1)
        return dataclasses.replace(routings[0], pieces=pieces, expert_index_RTC=index_RTC)


@dataclasses.dataclass(frozen=True)
class TextAttention:
    """Where each token of a text looks.

    pieces: text of each of the T tokens, as in `TextRouting`.
    layers: indices, in the model, of the L layers.
    probs_LNTS: float32 `[L, N, T, S]` with S = T, the weight of each key for each query. Keys that
      the query does not see have 0.
    """

    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    probs_LNTS: np.ndarray

    @property
    def sink_LNT(self) -> np.ndarray:
        """float32 `[L, N, T]`: the weight that a head gives to its sink; 0 for a model without."""
        return np.maximum(0, 1 - self.probs_LNTS.sum(-1))


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well a run predicts some texts, and with how many experts.

    bits_per_byte: over all tokens but the first of each text, per UTF-8 byte of them.
    experts_per_token: mean over tokens and layers; NaN for a model without experts.
    tokens: that were predicted.
    """

    bits_per_byte: float
    experts_per_token: float
    tokens: int
