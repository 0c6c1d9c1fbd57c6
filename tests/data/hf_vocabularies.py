"""Small vocabularies: `tokenizer.json` files of every kind, part by part, and SentencePiece."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_jax.data.tokenizer_stream import BYTE_OF_CHARACTER

WORDS = ["the", "cat", "sat", "on", "a", "mat", "def", "f", "x", "return", "\u6f22", "\u00e9", "."]
SPACE = "\u2581"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def token(index: int, content: str, *, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": special, **flags}


def described(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The content of a `tokenizer.json`."""
    empty = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [], **dict.fromkeys(empty), **parts, "model": model}


def write(path: Path, model: dict[str, Any], **parts: Any) -> Path:
    """Writes a `tokenizer.json`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described(model, **parts)), encoding="utf-8")
    return path


def vocab(*names: str) -> dict[str, int]:
    return {name: index for index, name in enumerate(names)}


def bpe(names: dict[str, int], **changes: Any) -> dict[str, Any]:
    return {"type": "BPE", "vocab": names, "merges": [], **changes}


def unigram(*names: str, **changes: Any) -> dict[str, Any]:
    entries = [[name, -float(index + 1)] for index, name in enumerate(names)]
    return {"type": "Unigram", "vocab": entries, "unk_id": 0, **changes}


SPECIALS = ("<unk>", "<s>", "</s>")
ADDED = [token(index, name) for index, name in enumerate(SPECIALS)]
REPLACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FALLBACK = [REPLACE, {"type": "ByteFallback"}, {"type": "Fuse"}]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
PIECES = vocab(*SPECIALS, *BYTES, SPACE, *(SPACE + word for word in WORDS), *WORDS, "\ufffd")
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, TO_SPACE]}
FUSED = {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True, "ignore_merges": True}

KINDS: dict[str, dict[str, Any]] = {
    "byte level": described(
        bpe({**BYTE_OF_CHARACTER, "<s>": 256, "</s>": 257, "\u0120the": 258}),
        added_tokens=[token(256, "<s>"), token(257, "</s>"), token(259, "<turn>", special=False)],
        pre_tokenizer=BYTE_LEVEL,
        decoder=BYTE_LEVEL,
    ),
    "llama": described(
        bpe(PIECES, **FUSED),
        added_tokens=ADDED,
        normalizer=PREPEND,
        decoder={"type": "Sequence", "decoders": [*FALLBACK, STRIP]},
    ),
    "gemma": described(
        bpe(PIECES, **FUSED),
        added_tokens=ADDED,
        normalizer=TO_SPACE,
        decoder={"type": "Sequence", "decoders": FALLBACK},
    ),
    "unigram": described(
        unigram(*SPECIALS, SPACE, *(SPACE + word for word in WORDS), *WORDS, "\ufffd"),
        added_tokens=ADDED,
        pre_tokenizer=METASPACE,
        decoder=METASPACE,
    ),
    "word pieces": described(
        {
            "type": "WordPiece",
            "vocab": vocab(*SPECIALS, *WORDS, *(f"##{word}" for word in WORDS)),
            "unk_token": "<unk>",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        added_tokens=ADDED,
        normalizer={"type": "Lowercase"},
        pre_tokenizer={"type": "BertPreTokenizer"},
        decoder={"type": "WordPiece", "prefix": "##", "cleanup": True},
    ),
    "no decoder": described(
        {"type": "WordLevel", "vocab": vocab(*SPECIALS, *WORDS), "unk_token": "<unk>"},
        added_tokens=ADDED,
        pre_tokenizer={"type": "Whitespace"},
    ),
    "odd order": described(
        bpe(PIECES, **FUSED),
        added_tokens=ADDED,
        normalizer=PREPEND,
        decoder={"type": "Sequence", "decoders": [{"type": "ByteFallback"}, REPLACE, STRIP]},
    ),
}
# Those that keep every text.
EXACT = ("byte level", "llama", "gemma")


def write_kind(path: Path, kind: str) -> Path:
    """Writes one of `KINDS`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(KINDS[kind]), encoding="utf-8")
    return path


def sentencepiece_model() -> bytes:
    """A SentencePiece model of 40 pieces, without those of bytes; skips without the library."""
    library = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "a dog ran"] * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()
