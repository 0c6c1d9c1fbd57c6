"""What is streamed is what is decoded, and nothing waits that need not."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from lightning_jax.data.tokenizer_stream import BYTE_OF_CHARACTER
from tests.data import hf_folders, hf_vocabularies

TEXTS = [
    "the cat sat on a mat.",
    " two  spaces",
    "\u6f22\u5b57\u00e9 \U0001f642\U0001f469\u200d\U0001f467",
    "\ufffd\ufffdx\ufffd",
    "\n\t\0\x7f",
]
KINDS = ("bytes", *hf_vocabularies.KINDS, "sentencepiece", "legacy", "added")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    home = tmp_path_factory.mktemp("kinds")
    made = {"bytes": ByteTokenizer()}
    for kind in hf_vocabularies.KINDS:
        path = hf_vocabularies.write_kind(home / f"{kind}.json", kind)
        made[kind] = load_tokenizer(str(path))
    hf_folders.sentencepiece(home / "sentencepiece")
    hf_folders.sentencepiece(home / "legacy", legacy=True)
    hf_folders.sentencepiece(home / "added")
    config = json.loads((home / "added" / "tokenizer_config.json").read_text())
    last = max(map(int, config["added_tokens_decoder"]))
    more = {**hf_folders.special("<tab>"), "special": False}
    config["added_tokens_decoder"][str(last + 1)] = more
    hf_folders.write_json(home / "added" / "tokenizer_config.json", config)
    for kind in ("sentencepiece", "legacy", "added"):
        made[kind] = load_tokenizer(str(home / kind))
    return made


def streamed(tokenizer, ids, before=()):
    """The text of a stream; after each id, no more than an unfinished character is missing."""
    stream, text = tokenizer.stream_decoder(before), ""
    for count, index in enumerate(ids, 1):
        text += stream.push(index)
        if count <= 50 and not before:
            missing = tokenizer.decode(ids[:count]).removeprefix(text)
            assert len(missing) <= 3
            # A decoder of another order takes all bytes of a run for broken if one is.
            assert not missing.strip("\ufffd") or "odd order" in getattr(tokenizer, "name", "")
    return text + stream.flush()


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_stream_as_they_decode(tokenizers, kind):
    tokenizer, generator = tokenizers[kind], np.random.default_rng(0)
    for length in (1, 2, 5, 40, 40, 40, 300):
        ids = generator.integers(-2, tokenizer.vocab_size + 5, length).tolist()
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        cut = int(generator.integers(0, length + 1))
        before = tokenizer.decode(ids[:cut])
        if not before.endswith("\ufffd"):
            assert before + streamed(tokenizer, ids[cut:], ids[:cut]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_stream_as_they_were(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        if kind in ("bytes", "sentencepiece", "legacy", "added", *hf_vocabularies.EXACT):
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", hf_vocabularies.KINDS)
def test_texts_decode_as_in_the_library(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in (*TEXTS, "the.cat . def"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.model.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["sentencepiece", "legacy"])
def test_texts_decode_as_in_sentencepiece(tokenizers, kind):
    tokenizer = tokenizers[kind]
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == tokenizer.model.decode(ids)


# Case C3
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram", *hf_vocabularies.EXACT])
def test_replacement_characters_are_text_like_any_other(tokenizers, kind):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode("\ufffd" * 2000)
    stream, given, began = tokenizer.stream_decoder(), 0, time.monotonic()
    for count, index in enumerate(ids, 1):
        given += len(stream.push(index))
        # Three bytes each, or a token of their own behind the prefix.
        assert given >= (count - 2) // 3
    assert given == 2000 and stream.flush() == ""
    # Quadratic cost would take minutes.
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_specials_costs_nothing_and_says_nothing(tokenizers, kind):
    tokenizer = tokenizers[kind]
    stream, began = tokenizer.stream_decoder(), time.monotonic()
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size + 7, -1] * 5000
    assert not any(map(stream.push, ids)) and not stream.flush()
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("kind", ["bytes", "llama", "sentencepiece", "byte level"])
def test_bytes_that_are_no_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    if kind in ("bytes", "byte level"):
        ids = BYTE_OF_CHARACTER if kind == "byte level" else {}
        of = (
            dict(zip(ids.values(), map(tokenizer.model.token_to_id, ids), strict=True))
            if ids
            else {}
        )
        byte_id = of.get if of else int
    else:
        model = tokenizer.model
        find = model.token_to_id if kind == "llama" else model.piece_to_id
        byte_id = lambda byte: find(f"<0x{byte:02X}>")  # noqa: E731
    for content in (
        b"a\xff\xe6\xbc\xa2",
        b"\xe6\xbc",
        b"\xe6\xbca",
        b"\xf0\x9f\x99\x82\x82",
        b"\xc0\x80",
    ):
        ids = [byte_id(byte) for byte in content]
        assert tokenizer.decode(ids) == content.decode("utf-8", errors="replace")
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_spaces_after_a_token_of_its_own_are_kept(tokenizers):
    tokenizer = tokenizers["added"]
    for text in ("the<tab>cat", "the<tab> cat", "the <tab>  cat", " the<tab>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
