"""Vocabularies of others: what cannot be used is one line, before anything is done with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer, resolve_tokenizer
from tests.data import hf_folders, hf_vocabularies
from tests.data.hf_vocabularies import bpe, token, unigram, vocab

ENDS = [token(0, "<s>"), token(1, "</s>")]
NAMES = vocab("<s>", "</s>", "a", "b")


def precompiled(charsmap):
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap}}


WORD_PIECE = {"type": "WordPiece", "continuing_subword_prefix": "##"}
BROKEN = {
    # Case E7
    "an id of 2^31": (bpe({**NAMES, "c": 2**31}), {}, "has the id 2147483648, but only 5"),
    "an id of 2^32 - 1": (bpe({**NAMES, "c": 2**32 - 1}), {}, "has the id 4294967295"),
    "a gap of millions": (bpe({**NAMES, "c": 5 * 10**6}), {}, "has the id 5000000, but only 5"),
    "an added id of 2^31": (bpe(NAMES), [*ENDS, token(2**31, "c")], "id = 2147483648: must be a"),
    "a gap before an added id": (bpe(NAMES), [*ENDS, token(10**6, "c")], "id = 1000000: must be 4"),
    "an empty Unigram": (unigram(unk_id=None), {}, "its vocabulary is empty"),
    "a Unigram without unknown": (unigram("<s>", "a", unk_id=None), {}, "cannot encode this text"),
    "unk_id of no piece": (unigram("<s>", "a", unk_id=5), {}, "not a tokenizer.json"),
    "WordPiece without unknown": (
        {**WORD_PIECE, "vocab": NAMES, "unk_token": "[UNK]", "max_input_chars_per_word": 100},
        {},
        "cannot encode this text",
    ),
    "WordLevel without unknown": (
        {"type": "WordLevel", "vocab": NAMES, "unk_token": "[UNK]"},
        {},
        "cannot encode this text",
    ),
    "BPE without its unknown": (bpe(NAMES, unk_token="zz"), {}, "cannot encode this text"),
    # Case F10
    "a charsmap that panics when read": (bpe(NAMES), precompiled("AAAA"), "not a tokenizer.json"),
    "a charsmap that panics when used": (
        bpe(NAMES),
        precompiled("AAAAAAAAAAAAAAAA"),
        "cannot encode this text (index out of bounds",
    ),
    "another charsmap": (bpe(NAMES), precompiled("BAAAAAAAAAA="), "index out of bounds"),
}


def write(path, name):
    model, parts, _ = BROKEN[name]
    parts = parts if isinstance(parts, dict) else {"added_tokens": parts}
    return hf_vocabularies.write(path / "tokenizer.json", model, **{"added_tokens": ENDS, **parts})


@pytest.mark.parametrize("name", BROKEN)
def test_broken_vocabularies_are_one_line(name, tmp_path, capfd):
    if "Unigram" in name or "unk_id" in name:
        hf_vocabularies.write(tmp_path / "tokenizer.json", BROKEN[name][0])
    else:
        write(tmp_path, name)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert BROKEN[name][2] in str(caught.value) and "\n" not in str(caught.value)
    # No backtrace of a panic.
    assert capfd.readouterr().err == ""


def test_a_panic_later_on_is_one_line_too(tmp_path):
    path = hf_vocabularies.write(tmp_path / "t.json", unigram("<s>", *"ab"), added_tokens=ENDS[:1])
    tokenizer = load_tokenizer(str(path))

    class Panics:
        def encode_batch_fast(self, texts, **options):
            raise type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("no")

    tokenizer.__dict__["model"] = Panics()
    with pytest.raises(UserError, match=r"cannot encode this text \(no\)"):
        tokenizer.encode("a")
    tokenizer.__dict__["model"] = None
    with pytest.raises(UserError, match="cannot encode this text"):
        tokenizer.encode("a")


def test_small_gaps_are_no_harm(tmp_path):
    path = hf_vocabularies.write(tmp_path / "t.json", bpe({**NAMES, "c": 3000}), added_tokens=ENDS)
    assert load_tokenizer(str(path)).vocab_size == 3001


@pytest.fixture(scope="module")
def sentencepiece_model():
    return hf_vocabularies.sentencepiece_model()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:3],
        lambda content: bytes(100),
        lambda content: b"\x08\x96\x01",
        lambda content: b"{\n broken",
        lambda content: content[:40] + b"\xff" * 40 + content[80:],
    ],
    ids=["empty", "half", "three bytes", "zeros", "another protobuf", "text", "overwritten"],
)
def test_broken_sentencepiece_models_are_one_line(damage, tmp_path, sentencepiece_model, capfd):
    path = tmp_path / "t.model"
    path.write_bytes(damage(sentencepiece_model))
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(path))
    assert "not a SentencePiece model" in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_closed_stderr_is_no_harm(tmp_path):
    hf_folders.qwen(tmp_path)
    code = (
        "import os, sys; os.close(2); "
        "from lightning_jax.data.tokenizer import load_tokenizer; "
        "print(load_tokenizer(sys.argv[1]).decode([0, 1]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, '!"\n')


def add_tokens(folder, *names, special=True):
    """Adds tokens to a tokenizer.json, as `add_special_tokens` of other trainers does."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    first = load_tokenizer(str(folder)).vocab_size
    described["added_tokens"] += [
        token(first + index, name, special=special) for index, name in enumerate(names)
    ]
    path.write_text(json.dumps(described))
    return first


def resolve(folder, workdir, rows):
    source = SourceConfig("unread", "nowhere/*.txt", "", 1.0)
    data = DataConfig(str(folder), (source,), "text", 0.1, "concat", 0, 1)
    return resolve_tokenizer(Sources.open(data), workdir, rows=rows)


# Case C4
@pytest.mark.parametrize("special", [True, False])
def test_tokens_beyond_the_embedding_are_text(tmp_path, caplog, special):
    hf_folders.qwen(tmp_path / "hf")
    rows = add_tokens(tmp_path / "hf", "[PAD]", "[MORE]", special=special)
    tokenizer = resolve(tmp_path / "hf", tmp_path / "run", rows)
    assert f"[PAD], [MORE]: beyond the {rows} rows" in caplog.text
    assert tokenizer.vocab_size == rows
    for specials in (False, True):
        ids = tokenizer.encode("a[PAD]<|im_end|>", specials=specials)
        assert max(ids) < rows
        assert tokenizer.decode(ids) == "a[PAD]" + "<|im_end|>" * (not specials)
    assert tokenizer.decode([0, rows, rows + 1]) == "!"
    assert "[PAD]" not in {**tokenizer.specials, **tokenizer.added}
    # From the copy in the run's folder too.
    again = resolve(tmp_path / "hf", tmp_path / "run", rows)
    assert again.encode("[PAD]", specials=True) == tokenizer.encode("[PAD]")
    # With room for them they are tokens.
    wide = resolve(tmp_path / "hf", tmp_path / "run", rows + 2)
    assert wide.vocab_size == rows + 2 and wide.encode("[PAD]", specials=True) == [rows]


def test_a_sentencepiece_token_beyond_the_embedding(tmp_path, caplog):
    hf_folders.sentencepiece(tmp_path / "hf")
    size = load_tokenizer(str(tmp_path / "hf")).vocab_size
    tokenizer = resolve(tmp_path / "hf", tmp_path / "run", size - 1)
    assert "<|turn|>: beyond" in caplog.text
    assert max(tokenizer.encode("the<|turn|>", specials=True)) < size - 1


def test_a_tokenizer_that_does_not_fit_leaves_no_trace(tmp_path):
    ids = hf_folders.qwen(tmp_path / "hf")
    run = tmp_path / "run"
    # Ordinary tokens, and those that begin and end a text, are needed.
    for rows in (100, ids["<|im_end|>"]):
        with pytest.raises(UserError, match=f"model.vocab_size = {rows}: the tokenizer has"):
            resolve(tmp_path / "hf", run, rows)
    for spec in ("bytes", "bpe:300"):
        with pytest.raises(UserError, match="model.vocab_size = 200: the tokenizer has"):
            resolve(spec, run, 200)
    assert not run.exists()
    assert ByteTokenizer().within(258) == ByteTokenizer()
