"""Tokenizers from the files of their vocabularies: `tokenizer.json`, SentencePiece `*.model`."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lightning_jax.config.errors import UserError
from lightning_jax.config.kinds import LARGEST_INDEX, OBJECT, check, integer, list_of, shorten
from lightning_jax.data import ends
from lightning_jax.data.files import optional_import
from lightning_jax.data.tokenizer_folder import Settings
from lightning_jax.data.tokenizer_kinds import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    library_errors,
)
from lightning_jax.runtime.files import read_json

# Every id is a row of the embedding, so ids without a token cost memory. Published vocabularies
# leave out some thousands at the most.
_MOST_UNUSED = 2**16
# Two threads that both put stderr aside would put the wrong one back.
_quieting = threading.RLock()


def load_hugging_face(path: Path, settings: Settings) -> HuggingFaceTokenizer:
    """Reads a `tokenizer.json`. In a folder, its post-processor says whether texts begin with bos.

    Raises:
      UserError: a corrupt file, a vocabulary with holes, no bos and no eos token, or a special
        token that it does not have.
    """
    tokenizers = optional_import("tokenizers")
    with _one_line(path, "tokenizer.json"):
        model = tokenizers.Tokenizer.from_file(str(path))
        model.no_truncation()
        model.no_padding()
        # Text that spells a special token must not become one.
        model.encode_special_tokens = True
    _check_added_ids(path, model)
    vocab_size = _size(path, model.get_vocab(with_added_tokens=True).values())
    added = model.get_added_tokens_decoder()
    bos_id, stop_ids = ends.find(
        path,
        settings,
        special={index for index, token in added.items() if token.special},
        added=added.keys(),
        vocab_size=vocab_size,
        lookup=model.token_to_id,
        own_bos=[*map(model.token_to_id, ends.BOS_NAMES)],
        own_eos=[*map(model.token_to_id, ends.EOS_NAMES)],
    )
    for index in (bos_id, *stop_ids):
        if index in added and not added[index].special:
            model.add_special_tokens([_special(tokenizers, added[index])])
    added = model.get_added_tokens_decoder()
    return HuggingFaceTokenizer(
        name=str(path),
        model=model,
        vocab_size=vocab_size,
        bos_id=bos_id,
        stop_ids=stop_ids,
        stop_strings=settings.stop_strings,
        adds_bos=settings.alone or _adds_bos(path, model, bos_id),
        specials={token.content: index for index, token in added.items() if token.special},
        chat_template=settings.chat_template,
        added={token.content: index for index, token in added.items() if not token.special},
    )


def _check_added_ids(path: Path, model: Any) -> None:
    """The library numbers added tokens itself, whatever ids the file gives them."""
    described = read_json(path)
    check(described, {"added_tokens": list_of(OBJECT)}, path, required=())
    for token in described.get("added_tokens", []):
        where = f"{path}: added token {shorten(token.get('content'))}"
        check(token, {"id": integer(0)}, where, required=("id",))
        index = model.token_to_id(token["content"])
        if index != token["id"]:
            raise UserError(f"{where}: id = {token['id']}: must be {index}, the next unused id")


def _special(tokenizers: Any, token: Any) -> Any:
    flags = {
        name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")
    }
    return tokenizers.AddedToken(token.content, special=True, **flags)


def _adds_bos(path: Path, model: Any, bos_id: int) -> bool:
    with _one_line(path, "tokenizer.json"):
        plain = model.encode("a", add_special_tokens=False).ids
        whole = model.encode("a", add_special_tokens=True).ids
    return whole[: len(plain) + 1] == [bos_id, *plain]


def load_sentencepiece(path: Path, settings: Settings) -> SentencePieceTokenizer:
    """Reads a SentencePiece model. A text begins with bos unless `settings` say otherwise.

    Raises:
      UserError: as `load_hugging_face`.
    """
    sentencepiece = optional_import("sentencepiece")
    model = sentencepiece.SentencePieceProcessor()
    with _one_line(path, "SentencePiece model"):
        model.LoadFromSerializedProto(path.read_bytes())
        size = model.vocab_size()
    ids = settings.added.items()
    own = (model.bos_id(), model.eos_id())
    controls = {model.id_to_piece(i): i for i in range(size) if model.is_control(i)}
    spelled = {text: index for text, (index, _) in ids}
    vocab_size = _size(path, {*range(size), *spelled.values()})

    def lookup(text: str) -> int | None:
        if text in controls or text in spelled:
            return {**spelled, **controls}[text]
        index = model.piece_to_id(text)
        return None if model.is_unknown(index) and text != model.id_to_piece(index) else index

    bos_id, stop_ids = ends.find(
        path,
        settings,
        special={*controls.values(), *(index for _, (index, flag) in ids if flag)},
        added={*controls.values(), *spelled.values()},
        vocab_size=vocab_size,
        lookup=lookup,
        own_bos=[index if index >= 0 else None for index in own[:1]],
        own_eos=[index if index >= 0 else None for index in own[1:]],
    )
    special = {text: index for text, (index, flag) in ids if flag or index in (bos_id, *stop_ids)}
    return SentencePieceTokenizer(
        name=str(path),
        model=model,
        vocab_size=vocab_size,
        bos_id=bos_id,
        stop_ids=stop_ids,
        stop_strings=settings.stop_strings,
        adds_bos=settings.adds_bos is not False,
        specials={**controls, **special},
        chat_template=settings.chat_template,
        added={t: i for t, i in spelled.items() if i >= size and t not in {**controls, **special}},
        prefix_each=settings.prefix_each,
    )


def _size(path: Path, ids: Collection[int]) -> int:
    """Returns the highest id plus 1, which is the rows of an embedding."""
    if not ids:
        raise UserError(f"data.tokenizer = {str(path)!r}: its vocabulary is empty")
    size, used = max(ids) + 1, len(set(ids))
    if size > LARGEST_INDEX or size - used > max(_MOST_UNUSED, used):
        raise UserError(
            f"data.tokenizer = {str(path)!r}: has the id {size - 1}, but only {used} tokens: ids "
            "must follow one another, because each is a row of the embedding"
        )
    return size


@contextlib.contextmanager
def _one_line(path: Path, what: str) -> Iterator[None]:
    """What a library raises or panics about becomes one line, and what it prints is dropped."""
    with library_errors(f"data.tokenizer = {str(path)!r}: not a {what}"), quiet():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what native code writes to stderr: a Rust panic prints a backtrace."""
    with _quieting, contextlib.ExitStack() as stack:
        # Nothing to silence where stderr is closed.
        with contextlib.suppress(OSError):
            saved = os.dup(2)
            stack.callback(os.close, saved)
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), 2)
            stack.callback(os.dup2, saved, 2)
        yield
