"""The kinds of tokenizers: UTF-8 bytes, a Hugging Face `tokenizer.json`, a SentencePiece model."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lightning_jax.config.errors import UserError
from lightning_jax.data.chat import ChatTemplate
from lightning_jax.data.files import optional_import
from lightning_jax.data.tokenizer_folder import Settings

BOS, EOS = "<|bos|>", "<|eos|>"
_BOS_NAMES = (BOS, "<s>", "<bos>", "<|begin_of_text|>")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")
# Ids of a prompt that can change how the next one decodes, with room to spare.
_CONTEXT = 16


class StreamDecoder(Protocol):
    """Turns generated ids into text one by one; text once given is never taken back."""

    def push(self, token_id: int) -> str:
        """Returns the characters that `token_id` completes, often one, sometimes none."""

    def flush(self) -> str:
        """Returns the text still held back; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """The interface of all tokenizers. Ids are `0 <= id < vocab_size`.

    `stop_ids` are all ids that end an answer, `eos_id` first. `adds_bos` is whether the model was
    taught with `bos_id` before its prompts. `specials` are ids by their spelling.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    adds_bos: bool
    specials: Mapping[str, int]
    chat_template: ChatTemplate | None

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """With `specials`, text that spells a special token is that token, else it is text.

        Raises `UserError` where `text` is no valid Unicode (an unpaired surrogate).
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Drops specials and ids outside the vocabulary; bytes that are no UTF-8 become U+FFFD."""

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        """Returns a decoder of the ids after `before`, which are not decoded themselves."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per UTF-8 byte: ids 0 to 255 are the bytes, then bos, then eos."""

    vocab_size: int = 258
    bos_id: int = 256
    eos_id: int = 257
    stop_ids: ClassVar[tuple[int, ...]] = (257,)
    adds_bos: ClassVar[bool] = True
    specials: ClassVar[Mapping[str, int]] = {}
    chat_template: ClassVar[ChatTemplate | None] = None

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _ByteStream()


@dataclasses.dataclass(frozen=True, eq=False)
class _ModelTokenizer:
    """The common part of both kinds that are read from files."""

    model: Any
    vocab_size: int
    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    adds_bos: bool
    specials: Mapping[str, int]
    chat_template: ChatTemplate | None

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _WindowStream(self, before)


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer(_ModelTokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library without its post-processing."""

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        _utf8(text)
        model = self._with_specials if specials else self.model
        return model.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)

    @functools.cached_property
    def _with_specials(self) -> Any:
        # A second copy, because the switch is state of the model, which threads share.
        return type(self.model).from_str(self.model.to_str())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library leaves this switch out of its pickles.
        self.model.encode_special_tokens = True


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePieceTokenizer(_ModelTokenizer):
    """A SentencePiece `*.model`; whether text round-trips exactly is up to the model.

    `added` are ordinary tokens beyond the model. See `Settings` for `prefix_each`.
    """

    added: Mapping[str, int]
    prefix_each: bool

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        _utf8(text)
        tokens = {**self.added, **self.specials} if specials else self.added
        if not tokens:
            return self.model.encode(text, out_type=int)
        names = sorted(tokens, key=len, reverse=True)
        ids: list[int] = []
        for index, part in enumerate(re.split(f"({'|'.join(map(re.escape, names))})", text)):
            if index % 2:
                ids.append(tokens[part])
            elif part:
                prefix = not ids or (self.prefix_each and not part.startswith(" "))
                model = self.model if prefix else self._without_prefix
                ids += model.encode(part, out_type=int)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        texts, dropped = self._texts, self._dropped
        size = self.model.vocab_size()
        pieces: list[str | list[int]] = [[]]
        for index in map(int, ids):
            if index in texts:
                pieces += [texts[index], []]
            elif index < size and index not in dropped:
                pieces[-1].append(index)
        return "".join(p if isinstance(p, str) else self.model.decode(p) for p in pieces)

    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        return {index: text for text, index in self.added.items()}

    @functools.cached_property
    def _dropped(self) -> set[int]:
        return set(self.specials.values())

    @functools.cached_property
    def _without_prefix(self) -> Any:
        """The model without the space that it puts before a text."""
        protos = optional_import("sentencepiece.sentencepiece_model_pb2")
        proto = protos.ModelProto.FromString(self.model.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        model = type(self.model)()
        model.LoadFromSerializedProto(proto.SerializeToString())
        return model


class _ByteStream:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Decodes the last emitted ids together with the new ones and emits the difference.

    The earlier ids are needed because a piece may decode differently at the start of a text
    (SentencePiece drops its leading space there).
    """

    def __init__(self, tokenizer: _ModelTokenizer, before: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._context = list(before)[-_CONTEXT:]
        self._pending: list[int] = []

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _emit(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text

    def push(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._text()
        return "" if not text or text.endswith("\ufffd") else self._emit(text)

    def flush(self) -> str:
        return self._emit(self._text())


def load_hugging_face(path: Path, settings: Settings) -> HuggingFaceTokenizer:
    """Reads a `tokenizer.json`. In a folder, its post-processor says whether texts begin with bos.

    Raises:
      UserError: a corrupt file, no bos and no eos token, or a special token that it does not have.
    """
    tokenizers = optional_import("tokenizers")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises bare Exceptions.
        raise UserError(
            f"data.tokenizer = {str(path)!r}: not a tokenizer.json ({_one_line(error)})"
        ) from error
    model.no_truncation()
    model.no_padding()
    # Text that spells a special token must not become one.
    model.encode_special_tokens = True
    vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    bos_ids, eos_ids = (map(model.token_to_id, names) for names in (_BOS_NAMES, _EOS_NAMES))
    added = model.get_added_tokens_decoder()
    specials = {token.content: index for index, token in added.items() if token.special}
    bos_id, stop_ids = _special_ids(
        path, settings, specials, vocab_size, model.token_to_id, [*bos_ids], [*eos_ids]
    )
    return HuggingFaceTokenizer(
        model,
        vocab_size,
        bos_id,
        stop_ids[0],
        stop_ids,
        settings.alone or _adds_bos(model, bos_id),
        specials,
        settings.chat_template,
    )


def _adds_bos(model: Any, bos_id: int) -> bool:
    plain = model.encode("a", add_special_tokens=False).ids
    return model.encode("a", add_special_tokens=True).ids[: len(plain) + 1] == [bos_id, *plain]


def load_sentencepiece(path: Path, settings: Settings) -> SentencePieceTokenizer:
    """Reads a SentencePiece model. A text begins with bos unless `settings` say otherwise.

    Raises:
      UserError: as `load_hugging_face`.
    """
    sentencepiece = optional_import("sentencepiece")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
        size = model.vocab_size()
    except Exception as error:  # The library raises RuntimeErrors and OSErrors of all kinds.
        raise UserError(
            f"data.tokenizer = {str(path)!r}: not a SentencePiece model ({_one_line(error)})"
        ) from error
    specials = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    specials |= {text: index for text, (index, special) in settings.added.items() if special}
    added = {text: index for text, (index, _) in settings.added.items() if index >= size}
    added = {text: index for text, index in added.items() if text not in specials}
    vocab_size = max(size - 1, *specials.values(), *added.values(), 0) + 1

    def lookup(text: str) -> int | None:
        if text in specials or text in added:
            return {**added, **specials}[text]
        index = model.piece_to_id(text)
        return None if model.is_unknown(index) and text != model.id_to_piece(index) else index

    ids = ([i if i >= 0 else None] for i in (model.bos_id(), model.eos_id()))
    bos_id, stop_ids = _special_ids(path, settings, specials, vocab_size, lookup, *ids)
    return SentencePieceTokenizer(
        model,
        vocab_size,
        bos_id,
        stop_ids[0],
        stop_ids,
        settings.adds_bos is not False,
        specials,
        settings.chat_template,
        added,
        settings.prefix_each,
    )


def _special_ids(
    path: Path,
    settings: Settings,
    specials: Mapping[str, int],
    vocab_size: int,
    lookup: Callable[[str], int | None],
    bos_ids: Sequence[int | None],
    eos_ids: Sequence[int | None],
) -> tuple[int, tuple[int, ...]]:
    """Returns bos, and all ids that end a text, eos first.

    Spellings of `settings` take precedence over its ids, and these over the vocabulary's own
    (`bos_ids`, `eos_ids`); if only one of bos and eos is found, it serves as both.
    """
    known = [*settings.eos_ids] + ([] if settings.bos_id is None else [settings.bos_id])
    for index in known:
        if not 0 <= index < vocab_size:
            raise UserError(f"{path}: token id {index} of its config: must be in [0, {vocab_size})")
    # Configs of models that never had these tokens hold the ids 1 and 2, those of ordinary tokens.
    special = set(specials.values())
    stop_ids = [index for index in settings.eos_ids if index in special]
    found = []
    for key, spelled, ids, own in (
        ("bos", settings.bos_token, [i for i in [settings.bos_id] if i in special], bos_ids),
        ("eos", settings.eos_token, stop_ids, eos_ids),
    ):
        index = None if spelled is None else lookup(spelled)
        if spelled is not None and index is None:
            raise UserError(f"{path}: has no token {spelled!r}, its config's {key}_token")
        found.append(next((i for i in (index, *ids, *own) if i is not None), None))
    bos_id, eos_id = found
    if bos_id is None and eos_id is None:
        raise UserError(
            f"data.tokenizer = {str(path)!r}: must have a token that begins or ends a text, one of "
            f"{', '.join(_BOS_NAMES + _EOS_NAMES)}"
        )
    eos_id = bos_id if eos_id is None else eos_id
    return eos_id if bos_id is None else bos_id, tuple(dict.fromkeys((eos_id, *stop_ids)))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text has an unpaired surrogate {text[error.start]!r} at character {error.start}: "
            "it must be valid Unicode"
        ) from error
