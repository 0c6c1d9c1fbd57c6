"""Text whose end can only be known by looking back: what a window loses and perplexity hides.

A path `recall:TASK` is a source of 10,000 documents that are made when they are read, by a fixed
seed. Options follow the task, such as `recall:passkey,longest=2000,digits=3`:

  passkey: a number stands in text that says nothing, and is asked for at the end (Mohtashami and
    Jaggi 2023, arXiv 2305.16300). The text before and after it is the same sentences again and
    again.
  mqar: pairs of a key and a value, then the keys in another order, each to be followed by its value
    (multi-query associative recall, Arora et al. 2023, arXiv 2312.04927).
  induction: pairs of symbols, of which the first is drawn again and again; what followed it the
    first time follows it every time (Olsson et al. 2022, arXiv 2209.11895).
  copy: symbols, then the same symbols again (Jelassi et al. 2024, arXiv 2402.01032).

  longest: characters of the longest document (a task's shortest text may have more). A fifth of the
    documents is longer than half of it, a fifth has between a quarter and half of it, and so on, so
    that short ones teach a model first.
  digits: of the number (passkey).
  symbols: how many different ones there are (the others). They are syllables after a space, " ba",
    which most tokenizers know as one token.

`Task.draw` makes one text of a given size, and says which characters of it are the answers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lightning_jax.config.fields import require, suggest
from lightning_jax.data.index import IndexStore, kept_name, keys_of

PREFIX = "recall:"
DOCUMENTS = 10_000
_LARGEST = 10**6
# Lengths of documents are drawn from so many octaves, the longest first.
_OCTAVES = 5
_CONSONANTS, _VOWELS = "bdfghjklmnprstvwz", "aeiou"
_SENTENCES = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
_OPEN = [consonant + vowel for vowel in _VOWELS for consonant in _CONSONANTS]
SYLLABLES = (*_OPEN, *(part + end for end in _CONSONANTS for part in _OPEN))


@dataclasses.dataclass(frozen=True)
class Text:
    """A text with answers: `answers` are ranges of its characters, without the space before."""

    text: str
    answers: tuple[tuple[int, int], ...]


class Draws:
    """Random numbers by a seed in words: the same on every machine and in every Python.

    Of `random` only `random()` itself has that promise.
    """

    def __init__(self, *seed: object) -> None:
        self._random = random.Random("\0".join(map(str, seed))).random

    def below(self, limit: int) -> int:
        """Returns a number from 0 to `limit - 1`."""
        return int(self._random() * limit)

    def several(self, count: int, limit: int) -> list[int]:
        """Returns `count` different numbers from 0 to `limit - 1`, in random order."""
        numbers = list(range(limit))
        for place in range(count):
            other = place + self.below(limit - place)
            numbers[place], numbers[other] = numbers[other], numbers[place]
        return numbers[:count]


def _passkey(draws: Draws, size: int, depth: float, digits: int) -> Text:
    number = "".join(str(draws.below(10)) for _ in range(digits))
    first = draws.below(len(_SENTENCES))
    sentences = [_SENTENCES[(first + i) % len(_SENTENCES)] for i in range(size)]
    sentences.insert(round(depth * size), f"The pass key is {number}.")
    text = " ".join([*sentences, f"The pass key is {number}"])
    return Text(text, ((len(text) - digits, len(text)),))


def _mqar(draws: Draws, size: int, depth: float, symbols: int) -> Text:
    keys = draws.several(size, symbols // 2)
    values = {key: symbols // 2 + draws.below(symbols - symbols // 2) for key in keys}
    asked = [keys[i] for i in draws.several(size, size)]
    pairs = "".join(_words(key, values[key]) for key in keys)
    text, answers = f"Pairs:{pairs}\nAsked:", []
    for key in asked:
        text += _words(key)
        start = len(text) + 1
        text += _words(values[key])
        answers.append((start, len(text)))
    return Text(text, tuple(answers))


def _induction(draws: Draws, size: int, depth: float, symbols: int) -> Text:
    keys = symbols // 2
    asked, place = draws.below(keys), min(round(depth * size), size - 1)
    values: dict[int, int] = {}
    words = []
    for i in range(size):
        # What is asked for at the end stands at one place alone.
        other = draws.below(keys - 1)
        key = asked if i == place else other + (other >= asked)
        values.setdefault(key, keys + draws.below(symbols - keys))
        words.append(_words(key, values[key]))
    question = "Pairs:" + "".join(words) + _words(asked)
    text = question + _words(values[asked])
    return Text(text, ((len(question) + 1, len(text)),))


def _copy(draws: Draws, size: int, depth: float, symbols: int) -> Text:
    words = _words(*(draws.below(symbols) for _ in range(size)))
    text = f"Text:{words}\nCopy:{words}"
    return Text(text, ((len(text) - len(words) + 1, len(text)),))


def _words(*symbols: int) -> str:
    return "".join(" " + SYLLABLES[symbol] for symbol in symbols)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A task without its options.

    Attributes:
      draw: makes a text of (draws, size, depth, its own option).
      option, default, low, high: its option besides `longest`.
      characters: of a text, (those of any, and those for each step of its size), at the most.
      by_depth: whether it is measured by the depth of the answer.
    """

    draw: Callable[[Draws, int, float, int], Text]
    option: str
    default: int
    low: int
    high: int
    characters: Callable[[int], tuple[int, int]]
    by_depth: bool = False


def _width(symbols: int) -> int:
    return 1 + len(SYLLABLES[symbols - 1])


_DIGITS = ("digits", 5, 2, 50)
_SYMBOLS = ("symbols", 64, 4, len(SYLLABLES))
_KINDS = {
    "passkey": _Kind(_passkey, *_DIGITS, lambda digits: (2 * digits + 32, 22), by_depth=True),
    "mqar": _Kind(_mqar, *_SYMBOLS, lambda symbols: (13, 4 * _width(symbols))),
    "induction": _Kind(
        _induction, *_SYMBOLS, lambda symbols: (6 + 2 * _width(symbols), 2 * _width(symbols))
    ),
    "copy": _Kind(_copy, *_SYMBOLS, lambda symbols: (11, 2 * _width(symbols))),
}
_LONGEST = (1000, 100, 100_000)


@dataclasses.dataclass(frozen=True)
class Task:
    """A task with its options; `path` names it.

    Attributes:
      name: passkey, mqar, induction or copy.
      longest: characters of the longest document.
      option: digits or symbols.
    """

    name: str
    longest: int
    option: int

    @classmethod
    def parse(cls, field: str, path: str) -> Task:
        """Reads `recall:TASK,option=number,...`.

        Raises:
          UserError: another task or option, or a number out of its range; names `field`.
        """
        name, *parts = path.removeprefix(PREFIX).split(",")
        require(name in _KINDS, field, path, f"recall: and {suggest(name, _KINDS)}")
        kind = _KINDS[name]
        limits = {"longest": _LONGEST, kind.option: (kind.default, kind.low, kind.high)}
        given: dict[str, int] = {}
        for part in parts:
            option, _, value = part.partition("=")
            require(
                option in limits, field, path, f"with options of {name}: {suggest(option, limits)}"
            )
            require(option not in given, field, path, f"with {option} once")
            _, low, high = limits[option]
            fits = value.isdecimal() and len(value) < 10 and low <= int(value) <= high
            require(fits, field, path, f"with {option} = a number in [{low}, {high}]")
            given[option] = int(value)
        values = {option: default for option, (default, _, _) in limits.items()} | given
        return cls(name, values["longest"], values[kind.option])

    @property
    def path(self) -> str:
        return f"{PREFIX}{self.name},longest={self.longest},{self._kind.option}={self.option}"

    @property
    def by_depth(self) -> bool:
        """Whether exact matches are measured by the depth of the answer."""
        return self._kind.by_depth

    @property
    def largest(self) -> int:
        """The largest size that a text can have: mqar has each key once, and others no limit."""
        return self.option // 2 if self.name == "mqar" else _LARGEST

    def chance(self, size: int) -> float:
        """The chance of a blind guess at an answer, of those that the task can have."""
        if self.name == "passkey":
            return 10.0**-self.option
        if self.name == "copy":
            return float(self.option) ** -size
        return 1 / (self.option - self.option // 2)

    def draw(self, size: int, depth: float, *seed: object) -> Text:
        """Returns a text.

        Args:
          size: of passkey the sentences around the number, of mqar the pairs that are asked for,
            of induction the pairs, of copy the symbols.
          depth: of passkey and induction, where the answer stands: 0 is the beginning, 1 the end.
          seed: the same seed, size and depth give the same text.
        """
        return self._kind.draw(Draws(self.path, *seed), size, depth, self.option)

    def document(self, number: int) -> str:
        """Returns the text of a training document."""
        draws = Draws(self.path, "document", number)
        high = self.longest >> draws.below(_OCTAVES)
        characters = high // 2 + draws.below(high // 2 + 1)
        fixed, each = self._kind.characters(self.option)
        size = min(max(1, (characters - fixed) // each), self.largest)
        return self._kind.draw(draws, size, draws.below(101) / 100, self.option).text

    @property
    def _kind(self) -> _Kind:
        return _KINDS[self.name]


class Documents:
    """The documents of a task, as a file of records; see `files` for the attributes.

    Sizes and keys of long ones take seconds to compute, so they are kept in the store.
    """

    def __init__(self, task: Task, store: IndexStore | None = None) -> None:
        self.task = task
        store = store or IndexStore(None)
        this = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        name = kept_name("recall", this, task.path)
        arrays = store.load(name) or store.keep(name, _index(task))
        self.size, self.key = arrays["size"], arrays["key"]
        self.side = self.key
        self.has_text = np.ones(DOCUMENTS, bool)
        self.digest = arrays["digest"].tobytes()

    def __len__(self) -> int:
        return DOCUMENTS

    def label(self, record: int) -> str:
        return f"{PREFIX}{self.task.name}:{record + 1}"

    def read(self, record: int) -> str:
        return self.task.document(int(record))


def _index(task: Task) -> dict[str, np.ndarray]:
    """Sizes and keys of the documents of a task, and a digest of all."""
    size, keys, digest = array("q"), bytearray(), hashlib.sha256(task.path.encode())
    for number in range(DOCUMENTS):
        text = task.document(number).encode()
        content = hashlib.sha256(text).digest()
        size.append(len(text))
        keys += content[:8]
        digest.update(content)
    return {
        "size": np.frombuffer(size, np.int64),
        "key": keys_of(keys),
        "digest": np.frombuffer(digest.digest(), np.uint8),
    }
