"""Text to token ids and back: UTF-8 bytes, Hugging Face `tokenizer.json`, SentencePiece `*.model`.

Ids never carry specials: `encode` adds none (text that spells one is ordinary text) and `decode`
drops them. `bos_id` and `eos_id` are always usable, and equal where a model has only one of them.
"""

from __future__ import annotations

import codecs
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from lightning_jax.config import DataConfig
from lightning_jax.data import sources
from lightning_jax.data.files import optional_import
from lightning_jax.errors import UserError

BOS, EOS = "<|bos|>", "<|eos|>"
_BOS_NAMES = (BOS, "<s>", "<bos>", "<|begin_of_text|>")
_EOS_NAMES = (EOS, "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>")
_SMALLEST_BPE = 256 + 2
_SAMPLE_BYTES = 16 * 2**20


class StreamDecoder(Protocol):
    """Turns generated ids into text one by one; what it has given is never taken back."""

    def push(self, token_id: int) -> str:
        """Returns the characters that `token_id` completes, often one, sometimes none."""

    def flush(self) -> str:
        """Returns what is still held back; an unfinished character becomes U+FFFD."""


class Tokenizer(Protocol):
    """What the framework asks of a tokenizer. Ids are `0 <= id < vocab_size`."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Raises `UserError` where `text` is no valid Unicode (an unpaired surrogate)."""

    def decode(self, ids: Sequence[int]) -> str:
        """Drops specials and ids outside the vocabulary; bytes that are no UTF-8 become U+FFFD."""

    def stream_decoder(self) -> StreamDecoder: ...


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """One token a UTF-8 byte: ids 0 to 255 are the bytes, then bos, then eos."""

    vocab_size: int = 258
    bos_id: int = 256
    eos_id: int = 257

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        return _ByteStream()


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A `tokenizer.json`, run by the `tokenizers` library without its post-processing."""

    model: Any
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self.model.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        return _WindowStream(self)


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A SentencePiece `*.model`; whether text round-trips exactly is up to the model."""

    model: Any
    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        return self.model.encode(text, out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        return self.model.decode([int(i) for i in ids if i < self.vocab_size])

    def stream_decoder(self) -> StreamDecoder:
        return _WindowStream(self)


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

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
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


def load_tokenizer(spec: str) -> Tokenizer:
    """Returns the tokenizer that `spec` names: `bytes`, a `*.json` path or a `*.model` path.

    Raises:
      UserError: no such file, a corrupt one, a model without any bos or eos token, or a missing
        library. `bpe:<size>` needs a run's text: see `resolve_tokenizer`.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    loaders = {".json": _load_hugging_face, ".model": _load_sentencepiece}
    if path.suffix not in loaders:
        raise UserError(
            f"data.tokenizer = {spec!r}: must be bytes, bpe:<size>, or a path to a "
            "tokenizer.json or a SentencePiece *.model"
        )
    if not path.is_file():
        raise UserError(f"data.tokenizer = {spec!r}: no such file")
    return loaders[path.suffix](path)


def train_bpe(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, writes it to `path` as `tokenizer.json`, and returns it.

    Digits are split singly. All 256 bytes are tokens, so every text round-trips exactly. The same
    texts give the same file, which appears whole or not at all.

    Raises:
      UserError: `vocab_size` below 258 (bytes, bos, eos), more than `texts` has merges for, or
        a `path` that does not end in `.json`.
    """
    if vocab_size < _SMALLEST_BPE:
        raise UserError(f"BPE vocab_size = {vocab_size}: must be at least {_SMALLEST_BPE}")
    if Path(path).suffix != ".json":
        raise UserError(f"path of a BPE tokenizer = {str(path)!r}: must end in .json")
    tokenizers = optional_import("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() != vocab_size:
        raise UserError(
            f"BPE vocab_size = {vocab_size}: must be at most {model.get_vocab_size()}, "
            "all that this text has merges for"
        )
    _write_atomically(Path(path), model.to_str().encode("utf-8"))
    return load_tokenizer(str(path))


def resolve_tokenizer(data: DataConfig, workdir: str | Path) -> Tokenizer:
    """Returns the run's tokenizer, and leaves it in `workdir` so that the folder is complete.

    `bpe:<size>` is trained once on at most 16 MB of the train split, an equal part from each
    source, its documents in hash order; the result is `workdir/tokenizer.json`. A path is copied to
    `workdir/tokenizer.json` or `workdir/tokenizer.model`. A later call reuses what it finds there.

    Raises:
      UserError: as `load_tokenizer` and `train_bpe`, and where `workdir` holds another tokenizer.
    """
    spec = data.tokenizer
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("bpe:"):
        return _resolve_bpe(data, Path(workdir) / "tokenizer.json")
    given = Path(spec).expanduser()
    kept = Path(workdir) / f"tokenizer{given.suffix}"
    if not kept.exists():
        load_tokenizer(spec)
        _write_atomically(kept, given.read_bytes())
    elif given.is_file() and given.read_bytes() != kept.read_bytes():
        raise UserError(
            f"data.tokenizer = {spec!r}: differs from {kept}, which this run was started with"
        )
    return load_tokenizer(str(kept))


def _resolve_bpe(data: DataConfig, path: Path) -> Tokenizer:
    size = data.tokenizer.removeprefix("bpe:")
    if not size.isdecimal() or int(size) < _SMALLEST_BPE:
        raise UserError(
            f"data.tokenizer = {data.tokenizer!r}: must be bpe:<size> with a size of at least "
            f"{_SMALLEST_BPE}"
        )
    if not path.exists():
        return train_bpe(_sample(data), int(size), path)
    tokenizer = load_tokenizer(str(path))
    if tokenizer.vocab_size != int(size):
        raise UserError(
            f"data.tokenizer = {data.tokenizer!r}: {path} has {tokenizer.vocab_size} tokens; give "
            "the run another workdir, or that size"
        )
    return tokenizer


def _sample(data: DataConfig) -> Iterator[str]:
    for config in data.sources:
        source = sources.open_source(
            config, split="train", text_field=data.text_field, eval_fraction=data.eval_fraction
        )
        left = _SAMPLE_BYTES // len(data.sources)
        for index in source.hash_order():
            if left <= 0:
                break
            text = source[index]["text"][:left]
            left -= len(text.encode("utf-8"))
            yield text


def _load_hugging_face(path: Path) -> HuggingFaceTokenizer:
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
    bos_id, eos_id = _specials(
        path, *(map(model.token_to_id, names) for names in (_BOS_NAMES, _EOS_NAMES))
    )
    vocab_size = max(model.get_vocab(with_added_tokens=True).values()) + 1
    return HuggingFaceTokenizer(model, vocab_size, bos_id, eos_id)


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    sentencepiece = optional_import("sentencepiece")
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
        vocab_size = model.vocab_size()
    except Exception as error:  # The library raises RuntimeErrors and OSErrors of all kinds.
        raise UserError(
            f"data.tokenizer = {str(path)!r}: not a SentencePiece model ({_one_line(error)})"
        ) from error
    ids = ([i if i >= 0 else None] for i in (model.bos_id(), model.eos_id()))
    bos_id, eos_id = _specials(path, *ids)
    return SentencePieceTokenizer(model, vocab_size, bos_id, eos_id)


def _specials(path: Path, bos: Iterable[int | None], eos: Iterable[int | None]) -> tuple[int, int]:
    bos_id = next((i for i in bos if i is not None), None)
    eos_id = next((i for i in eos if i is not None), None)
    if bos_id is None and eos_id is None:
        raise UserError(
            f"data.tokenizer = {str(path)!r}: must have a token that begins or ends a text, one of "
            f"{', '.join(_BOS_NAMES + _EOS_NAMES)}"
        )
    return (eos_id if bos_id is None else bos_id), (bos_id if eos_id is None else eos_id)


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
