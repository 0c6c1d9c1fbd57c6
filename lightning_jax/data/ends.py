"""What begins and ends a text: the one rule for import, generation, chat, lm-eval and export.

A text ends with a token of `stop_ids` or before a string of `stop_strings` (or of `until`, which a
task adds). Neither is part of the text. The files of a Hugging Face folder decide, first to last:

  bos: 1. the token that `bos_token` spells (of tokenizer_config.json, or of special_tokens_map.json
          where `chat.token_spellings` says that it counts);
       2. `bos_token_id` of generation_config.json, else of config.json, if it is a special token;
       3. the vocabulary's own: the bos of a SentencePiece model, or a token of a usual name;
       4. eos.
  eos: 1. the token that `eos_token` spells, in the same files;
       2. the first `eos_token_id` of generation_config.json, else of config.json, that is a
          special token;
       3. the vocabulary's own;
       4. the first of the ids below;
       5. bos.
  stop_ids: eos, then every `eos_token_id` of generation_config.json, whatever token it is. Those of
       config.json, or of a generation_config.json that was made from it (`_from_model_config`),
       count only where generation_config.json has none and they are added tokens: the classes of
       model configs have the defaults 1 and 2, which are ordinary tokens of many vocabularies.
  stop_strings: those of generation_config.json.
  adds_bos: whether a text begins with bos. tokenizer.json: its post-processor says so;
       tokenizer.model: `add_bos_token` of tokenizer_config.json, and true without one. A vocabulary
       file alone and the tokenizers made here begin every text with bos, as training does.

Added tokens that end a text are special tokens even if the vocabulary does not call them so: no
text and no message can spell one, and `decode` drops them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol

from lightning_jax.config.errors import UserError
from lightning_jax.config.kinds import shorten
from lightning_jax.data.tokenizer_folder import Settings

BOS, EOS = "<|bos|>", "<|eos|>"
BOS_NAMES = (BOS, "<s>", "<bos>", "<|begin_of_text|>")
EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")


def find(
    path: Path,
    settings: Settings,
    *,
    special: Collection[int],
    added: Collection[int],
    vocab_size: int,
    lookup: Callable[[str], int | None],
    own_bos: Sequence[int | None],
    own_eos: Sequence[int | None],
) -> tuple[int, tuple[int, ...]]:
    """Returns bos, and all ids that end a text, eos first.

    Args:
      path: the vocabulary, for the errors.
      settings: of its folder.
      special: ids of the tokens that the vocabulary calls special.
      added: ids of all tokens that were added to the vocabulary, special or not.
      vocab_size: ids are below it.
      lookup: from a spelling to its id.
      own_bos, own_eos: the vocabulary's own, best first.

    Raises:
      UserError: an id or a spelling that the vocabulary does not have, or neither bos nor eos.
    """
    for where, index in settings.named_ids:
        if index >= vocab_size:
            raise UserError(f"{where} = {index}: must be below {vocab_size}, the size of {path}")

    def spelled(key: str, text: str | None) -> list[int]:
        index = None if text is None else lookup(text)
        if text is not None and index is None:
            raise UserError(f"{path}: has no token {shorten(text)}, its config's {key}_token")
        return [] if index is None else [index]

    def first(*ids: int | None) -> int | None:
        return next((index for index in ids if index is not None), None)

    listed = [i for i in settings.eos_ids if settings.eos_ids_are_sure or i in added]
    known = [i for i in listed if i in special]
    bos = [i for i in (settings.bos_id,) if i in special]
    bos_id = first(*spelled("bos", settings.bos_token), *bos, *own_bos)
    eos_id = first(*spelled("eos", settings.eos_token), *known, *own_eos, *listed, bos_id)
    if eos_id is None:
        raise UserError(
            f"data.tokenizer = {str(path)!r}: must have a token that begins or ends a text, one of "
            f"{', '.join(BOS_NAMES + EOS_NAMES)}"
        )
    return eos_id if bos_id is None else bos_id, tuple(dict.fromkeys((eos_id, *listed)))


class _StreamDecoder(Protocol):
    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class _Tokenizer(Protocol):
    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    def stream_decoder(self, before: Sequence[int] = ()) -> _StreamDecoder: ...


class Answer:
    """The text of generated tokens, given piece by piece, up to what ends it.

    A piece that may be the beginning of a string that ends the text is held back until that is
    decided, so that no part of such a string is given, however the tokens cut it.
    """

    def __init__(
        self, tokenizer: _Tokenizer, before: Sequence[int] = (), until: Sequence[str] = ()
    ) -> None:
        """Args:
        tokenizer: of the tokens.
        before: the ids before the first token, which continue one text; see `stream_decoder`.
        until: strings that end the text, besides the tokenizer's own.
        """
        self._decoder, self._stop_ids = tokenizer.stream_decoder(before), tokenizer.stop_ids
        self._until = tuple(text for text in (*tokenizer.stop_strings, *until) if text)
        self._held = ""
        self.is_done = False

    def push(self, token: int) -> str:
        """Returns the text that is certain with this token; negative tokens end the text too."""
        if self.is_done:
            return ""
        if token < 0 or token in self._stop_ids:
            return self.end()
        return self._cut(self._decoder.push(token))

    def end(self) -> str:
        """Ends the text, and returns what was held back."""
        if self.is_done:
            return ""
        text = self._cut(self._decoder.flush())
        text, self._held, self.is_done = text + self._held, "", True
        return text

    def _cut(self, piece: str) -> str:
        text = self._held + piece
        found = [position for end in self._until if (position := text.find(end)) >= 0]
        if found:
            self._held, self.is_done = "", True
            return text[: min(found)]
        kept = len(text) - max((_overlap(text, end) for end in self._until), default=0)
        self._held = text[kept:]
        return text[:kept]


def _overlap(text: str, end: str) -> int:
    """Returns the length of the longest end of `text` that `end` begins with, below its own."""
    longest = min(len(text), len(end) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(end[:n])), 0)
