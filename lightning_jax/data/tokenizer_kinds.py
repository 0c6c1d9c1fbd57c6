"""The kinds of tokenizers: UTF-8 bytes, a Hugging Face `tokenizer.json`, a SentencePiece model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from lightning_jax.config.errors import UserError, some_of
from lightning_jax.data import tokenizer_stream
from lightning_jax.data.chat import ChatTemplate
from lightning_jax.data.files import optional_import
from lightning_jax.data.tokenizer_stream import Pieces, StreamDecoder, WindowStream

logger = logging.getLogger(__name__)
_BYTES = Pieces(lambda token_id: bytes([token_id]) if 0 <= token_id < 256 else b"")


class Tokenizer(Protocol):
    """The interface of all tokenizers. Ids are `0 <= id < vocab_size`.

    `stop_ids` are all ids that end an answer, `eos_id` first, `stop_strings` the strings that do.
    `adds_bos` is whether the model was taught with `bos_id` before its prompts (`ends` has the rule
    for all of these). `specials` are ids by their spelling.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def stop_strings(self) -> tuple[str, ...]: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def specials(self) -> Mapping[str, int]: ...

    @property
    def chat_template(self) -> ChatTemplate | None: ...

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """With `specials`, text that spells a special token is that token, else it is text.

        Raises `UserError` where `text` is no valid Unicode (an unpaired surrogate), or the
        vocabulary has no way to express it.
        """
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Drops specials and ids outside the vocabulary; bytes that are no UTF-8 become U+FFFD."""
        raise NotImplementedError

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        """Returns a decoder of the ids after `before`, which are not decoded themselves."""
        raise NotImplementedError

    def within(self, rows: int) -> Tokenizer:
        """Returns the tokenizer for a model whose embedding has `rows` rows.

        Added tokens from there on are dropped, with a warning: text that spells one is text.

        Raises `UserError` where a token that is needed is among them.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token per UTF-8 byte: ids 0 to 255 are the bytes, then bos, then eos."""

    vocab_size: int = 258
    bos_id: int = 256
    eos_id: int = 257
    # Of the class, and so without annotations: no fields.
    stop_ids = (257,)
    stop_strings = ()
    adds_bos = True
    specials = {}
    chat_template = None

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        return _BYTES.decode(ids)

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        return _BYTES.stream(before)

    def within(self, rows: int) -> ByteTokenizer:
        if rows < self.vocab_size:
            raise too_small(rows, self.vocab_size)
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class _ModelTokenizer:
    """The common part of both kinds that are read from files.

    `name` is the file's, for errors; `added` are ordinary tokens beyond the vocabulary.
    """

    name: str
    model: Any
    vocab_size: int
    bos_id: int
    stop_ids: tuple[int, ...]
    stop_strings: tuple[str, ...]
    adds_bos: bool
    specials: Mapping[str, int]
    chat_template: ChatTemplate | None
    added: Mapping[str, int]

    @property
    def eos_id(self) -> int:
        return self.stop_ids[0]

    @functools.cached_property
    def _dropped(self) -> set[int]:
        return set(self.specials.values())

    @property
    def _base_size(self) -> int:
        """The size of the vocabulary without the tokens that were added to it."""
        raise NotImplementedError

    def _without(self, names: Sequence[str]) -> Any:
        """Returns the model without these added tokens."""
        raise NotImplementedError

    def within(self, rows: int) -> Any:
        needed = max(self._base_size, self.bos_id + 1, self.eos_id + 1)
        if rows < needed:
            raise too_small(rows, needed)
        if rows >= self.vocab_size:
            return self
        added, specials = (
            {name: index for name, index in tokens.items() if index < rows}
            for tokens in (self.added, self.specials)
        )
        outside = [name for name in (*self.added, *self.specials) if name not in added | specials]
        logger.warning(
            "%s: %s: beyond the %d rows of the model's embedding, so never generated, and text",
            self.name,
            some_of(outside, 5),
            rows,
        )
        return dataclasses.replace(
            self,
            model=self._without(outside),
            vocab_size=rows,
            stop_ids=tuple(index for index in self.stop_ids if index < rows),
            added=added,
            specials=specials,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer(_ModelTokenizer):
    """A `tokenizer.json`, run by the `tokenizers` library without its post-processing."""

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        _utf8(text)
        model = self._with_specials if specials else self.model
        with library_errors(f"tokenizer {self.name}: cannot encode this text"):
            return model.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        if self._pieces is not None:
            return self._pieces.decode(ids)
        if not tokenizer_stream.may_cut_characters(self.model):
            return self._decode_all([i for i in map(int, ids) if not self._is_dropped(i)])
        # What broken characters become depends on what follows them: a stream cannot wait for it.
        stream = self.stream_decoder()
        return "".join([stream.push(int(index)) for index in ids]) + stream.flush()

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        if self._pieces is not None:
            return self._pieces.stream(before)
        may_cut = tokenizer_stream.may_cut_characters(self.model)
        return WindowStream(self._decode_all, before, is_dropped=self._is_dropped, may_cut=may_cut)

    def _decode_all(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)

    def _is_dropped(self, index: int) -> bool:
        return index < 0 or index in self._dropped or self.model.id_to_token(index) is None

    @functools.cached_property
    def _pieces(self) -> Pieces | None:
        return tokenizer_stream.hugging_face_pieces(self.model, self._dropped)

    @functools.cached_property
    def _with_specials(self) -> Any:
        # A second copy, because the switch is state of the model, which threads share.
        return type(self.model).from_str(self.model.to_str())

    @property
    def _base_size(self) -> int:
        ids = self.model.get_vocab(with_added_tokens=False).values()
        return max(set(ids) - {*self.added.values(), *self.specials.values()}, default=-1) + 1

    def _without(self, names: Sequence[str]) -> Any:
        described = json.loads(self.model.to_str())
        described["added_tokens"] = [
            token for token in described["added_tokens"] if token["content"] not in names
        ]
        vocab = described["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = {token: index for token, index in vocab.items() if token not in names}
        else:  # A list of [token, score].
            vocab = [entry for entry in vocab if entry[0] not in names]
        described["model"]["vocab"] = vocab
        with library_errors(f"tokenizer {self.name}: cannot be without {', '.join(names)}"):
            model = type(self.model).from_str(json.dumps(described))
        model.encode_special_tokens = True
        return model

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The library leaves this switch out of its pickles.
        self.model.encode_special_tokens = True


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePieceTokenizer(_ModelTokenizer):
    """A SentencePiece `*.model`; whether text round-trips exactly is up to the model.

    See `Settings` for `prefix_each`.
    """

    prefix_each: bool

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        _utf8(text)
        tokens = {**self.added, **self.specials} if specials else self.added
        with library_errors(f"tokenizer {self.name}: cannot encode this text"):
            return self._encode(text, tokens)

    def _encode(self, text: str, tokens: Mapping[str, int]) -> list[int]:
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
        return self._pieces.decode(ids)

    def stream_decoder(self, before: Sequence[int] = ()) -> StreamDecoder:
        return self._pieces.stream(before)

    @functools.cached_property
    def _pieces(self) -> Pieces:
        normalizer = self._proto().normalizer_spec
        return tokenizer_stream.sentencepiece_pieces(
            self.model,
            {index: text for text, index in self.added.items()},
            self._dropped,
            strips_all=normalizer.remove_extra_whitespaces,
            strips_one=normalizer.add_dummy_prefix,
            restarts=self.added.values() if self.prefix_each else (),
        )

    def _proto(self) -> Any:
        protos = optional_import("sentencepiece.sentencepiece_model_pb2")
        return protos.ModelProto.FromString(self.model.serialized_model_proto())

    @functools.cached_property
    def _without_prefix(self) -> Any:
        """The model without the space that it puts before a text."""
        proto = self._proto()
        proto.normalizer_spec.add_dummy_prefix = False
        model = type(self.model)()
        model.LoadFromSerializedProto(proto.SerializeToString())
        return model

    @property
    def _base_size(self) -> int:
        return self.model.vocab_size()

    def _without(self, names: Sequence[str]) -> Any:
        return self.model


def too_small(rows: int, needed: int) -> UserError:
    """The error of an embedding with fewer rows than the tokenizer needs."""
    return UserError(f"model.vocab_size = {rows}: the tokenizer has {needed} ids (0: take those)")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns whatever the library of a tokenizer raises into the line `what (reason)`.

    The libraries raise bare Exceptions, and Rust panics, which are no Exceptions.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} ({reason[:200]})") from error


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text has an unpaired surrogate {text[error.start]!r} at character {error.start}: "
            "it must be valid Unicode"
        ) from error
