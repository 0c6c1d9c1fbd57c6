"""Case D12: what a tokenizer loses is said, and has no bits per byte."""

from __future__ import annotations

import pytest

from lightning_jax.data import round_trip
from lightning_jax.data.mixture import eval_batches
from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from tests.data import hf_folders, hf_vocabularies
from tests.data.hf_vocabularies import ADDED, SPECIALS, bpe, vocab

FUSE = {"type": "Fuse"}


def drops(folder):
    """No bytes and no unknown token: characters without a token vanish."""
    return hf_vocabularies.write(
        folder / "t.json", bpe(vocab(*SPECIALS, *"aceg ")), added_tokens=ADDED, decoder=FUSE
    )


def normalized(folder, *kinds):
    parts = dict(hf_vocabularies.KINDS["byte level"])
    model = parts.pop("model")
    normalizer = {"type": "Sequence", "normalizers": [{"type": kind} for kind in kinds]}
    return hf_vocabularies.write(folder / "t.json", model, **{**parts, "normalizer": normalizer})


def no_bytes(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.model").write_bytes(hf_vocabularies.sentencepiece_model())
    return folder / "t.model"


def kind(name):
    return lambda folder: hf_vocabularies.write_kind(folder / "t.json", name)


LOSES = {
    "drops characters": drops,
    "lower case": lambda folder: normalized(folder, "Lowercase"),
    "without accents": lambda folder: normalized(folder, "NFD", "StripAccents"),
    "compatible forms": lambda folder: normalized(folder, "NFKC"),
    "unknown tokens": kind("unigram"),
    "word pieces": kind("word pieces"),
    "SentencePiece without bytes": no_bytes,
}
KEEPS = {
    **{name: kind(name) for name in hf_vocabularies.EXACT},
    "composed": lambda folder: normalized(folder, "NFC"),
    "bpe": lambda folder: (
        train_bpe(["hello world"] * 9, 262, folder / "b.json") and folder / "b.json"
    ),
    "SentencePiece": lambda folder: hf_folders.sentencepiece(folder) or folder,
}


class Documents(list):
    """A source of held-out texts."""

    def hash_order(self):
        return range(len(self))


def batches(tokenizer, *texts):
    documents = Documents({"text": text} for text in texts)
    return eval_batches(documents, tokenizer=tokenizer, seq_len=8, batch_size=1)


@pytest.mark.parametrize("name", LOSES)
def test_what_is_lost_is_a_warning_with_its_share(name, tmp_path, caplog):
    tokenizer = load_tokenizer(str(LOSES[name](tmp_path)))
    share = round_trip.lost_share(tokenizer)
    assert 0 < share <= 1
    assert f"loses {100 * share:.1f}% of the bytes of a sample text" in caplog.text
    found = batches(tokenizer, "caf\u00e9 Na\ufb01ve", "")
    assert found.lost_bytes == found.num_bytes == len("caf\u00e9 Na\ufb01ve".encode())


@pytest.mark.parametrize("name", KEEPS)
def test_what_keeps_everything_says_nothing(name, tmp_path, caplog):
    tokenizer = load_tokenizer(str(KEEPS[name](tmp_path)))
    assert round_trip.lost_share(tokenizer) == 0 and not caplog.messages
    assert batches(tokenizer, "caf\u00e9 Na\ufb01ve\n", "\0\ufffd", "cafe\u0301").lost_bytes == 0


def test_the_text_decides_and_not_the_sample(tmp_path):
    tokenizer = load_tokenizer(str(drops(tmp_path)))
    assert round_trip.lost_share(tokenizer) > 0.5
    assert batches(tokenizer, "acge a").lost_bytes == 0
    assert batches(tokenizer, "acge a", "acxge").lost_bytes == 5
    found = batches(ByteTokenizer(), "x", "\U0001f642")
    assert (found.lost_bytes, found.num_bytes) == (0, 5)


def test_the_reason_is_one_line():
    expected = "no bits/byte: the tokenizer changes texts with 25.0% of the bytes"
    assert round_trip.reason(1, 4) == expected
