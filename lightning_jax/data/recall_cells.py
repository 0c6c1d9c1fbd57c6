"""Examples of a recall task by length and depth, in tokens: what an exact match is measured on."""

from __future__ import annotations

import dataclasses

import numpy as np

from lightning_jax.data.index import key_of
from lightning_jax.data.recall import Documents, Task, Text
from lightning_jax.data.tokenizer import Tokenizer

# Lengths of texts in windows of the model's local layers, and depths of a passkey in its text.
WINDOWS = (0.5, 1, 2, 4, 8, 16)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Texts of each cell: at most, where tokens allow, and the fewest that are worth a cell.
EXAMPLES, _FEWEST = 32, 4
# Draws for each text that is wanted: most texts of few symbols are documents.
_DRAWS = 50
# A text that fills less of a length than this is of no such length.
_FILLED = 0.75
# Draws that a size must fit, so that few are drawn in vain.
_PROBES = 4


@dataclasses.dataclass(frozen=True)
class Example:
    """A text in tokens.

    Attributes:
      tokens: int32 [T + 1], bos first and no eos.
      answers: ranges of `tokens` that are to be predicted.
    """

    tokens: np.ndarray
    answers: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """Examples of equal length.

    Attributes:
      length: tokens that a text has at the most; it has three quarters of them or more.
      windows: the length in windows.
      depth: where the answer stands in the text, from 0 to 1; None where that is not chosen.
      size: of the texts, see `recall.Task.draw`.
      examples: texts that are no documents of the source, the same for every model.
    """

    length: int
    windows: float
    depth: float | None
    size: int
    examples: tuple[Example, ...]


def make_cells(
    documents: Documents, tokenizer: Tokenizer, *, window: int, max_tokens: int = 0
) -> list[Cell]:
    """Returns the cells of a task in order of length, then depth.

    Lengths too short for any text of the task, or too long for its keys, have none; nor have those
    whose few texts are all documents.

    Args:
      documents: of the source, whose texts are left out.
      tokenizer: of the model.
      window: of the model's local layers, in tokens.
      max_tokens: of all examples; 0: no limit. Fewer tokens are fewer examples, down to four; then
        the longest lengths are left out, but not the shortest that has a text.
    """
    depths = DEPTHS if documents.task.by_depth else (None,)
    makers = [
        (windows, _Maker(documents.task, tokenizer, round(windows * window))) for windows in WINDOWS
    ]
    makers = [(windows, maker) for windows, maker in makers if maker.size]
    most = EXAMPLES
    while max_tokens and makers:
        each = len(depths) * sum(maker.length for _, maker in makers)
        most = min(EXAMPLES, max_tokens // each)
        if most >= _FEWEST or len(makers) == 1:
            break
        makers.pop()
    keys = set(documents.key.tolist())
    cells = [
        Cell(
            length=maker.length,
            windows=windows,
            depth=depth,
            size=maker.size,
            examples=tuple(maker.examples(depth or 0.0, max(most, _FEWEST), keys)),
        )
        for windows, maker in makers
        for depth in depths
    ]
    return [cell for cell in cells if len(cell.examples) >= _FEWEST]


class _Maker:
    """Makes the examples of one length.

    Attributes:
      length: in tokens.
      size: the largest whose texts are not longer; 0 if there is none.
    """

    def __init__(self, task: Task, tokenizer: Tokenizer, length: int) -> None:
        self._task, self._tokenizer, self.length = task, tokenizer, length
        self.size = self._largest()

    def examples(self, depth: float, most: int, keys: set[int]) -> list[Example]:
        """Returns `most` examples, or fewer; of different texts whose keys are none of `keys`."""
        found: dict[int, Example] = {}
        for number in range(_DRAWS * most):
            text = self._draw(self.size, depth, number)
            key = int(key_of(text.text.encode()))
            ids = self._tokenizer.encode(text.text)
            if len(ids) <= self.length and key not in keys and key not in found:
                tokens = np.array([self._tokenizer.bos_id, *ids], np.int32)
                found[key] = Example(tokens, _in_tokens(text, ids, self._tokenizer))
            if len(found) == most:
                break
        return [*found.values()]

    def _draw(self, size: int, depth: float, number: int) -> Text:
        return self._task.draw(size, depth, "cell", self.length, depth, number)

    def _tokens(self, size: int) -> int:
        """Tokens of the longest of a few texts of a size."""
        texts = (self._draw(size, 0.0, number).text for number in range(_PROBES))
        return max(len(self._tokenizer.encode(text)) for text in texts)

    def _largest(self) -> int:
        low, high = 0, 1
        while high <= self._task.largest and self._tokens(high) <= self.length:
            low, high = high, 2 * high
        high = min(high, self._task.largest + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._tokens(middle) <= self.length else (low, middle)
        return low if low and self._tokens(low) >= _FILLED * self.length else 0


def _in_tokens(text: Text, ids: list[int], tokenizer: Tokenizer) -> tuple[tuple[int, int], ...]:
    """The answers as ranges of `[bos, *ids]`: every token with a character of the answer."""
    stream = tokenizer.stream_decoder()
    ends = np.cumsum([len(stream.push(index)) for index in ids])
    return tuple(
        (
            1 + int(np.searchsorted(ends, start, side="right")),
            2 + int(np.searchsorted(ends, end, side="left")),
        )
        for start, end in text.answers
    )
