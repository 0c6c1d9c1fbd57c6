import dataclasses

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data import tokenizer as tokenizer_lib
from lightning_jax.data.sources import Sources
from tests.data.hf_vocabularies import sentencepiece_model

TRAIN = ["def f(x): return x + 1\n" * 5, "the cat sat on a mat, the rat ran", "café 漢字 漢字"]

TEXTS = [
    "",
    "\0",
    "plain ASCII text",
    "def f(x):\r\n\treturn  x  # 12345\n\n\n",
    "naïve Ünïcödé — 漢字 🙂👩‍👩‍👧 \u200b\ufeff\ufffd",
    "".join(map(chr, range(256))),
    "<|bos|> <|eos|> <s> </s>",
    "\U0010ffff\x80 \u2028 ' ''s 3.14e-10",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    return tokenizer_lib.train_bpe(TRAIN, 280, path), path


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sp") / "small.model"
    path.write_bytes(sentencepiece_model())
    return path


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_round_trip_is_exact_and_without_specials(kind, text, bpe):
    tokenizer = bpe[0] if kind == "bpe" else tokenizer_lib.load_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_stream_gives_the_same_text_in_whole_characters(kind, text, bpe):
    tokenizer = bpe[0] if kind == "bpe" else tokenizer_lib.load_tokenizer("bytes")
    stream = tokenizer.stream_decoder()
    pieces = [stream.push(i) for i in [tokenizer.bos_id, *tokenizer.encode(text)]]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_are_the_ids():
    tokenizer = tokenizer_lib.load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 65, 300]) == "\ufffdA"
    stream = tokenizer.stream_decoder()
    assert [stream.push(0xC3), stream.push(300), stream.flush()] == ["", "", "\ufffd"]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_unpaired_surrogate_is_a_user_error(kind, bpe):
    tokenizer = bpe[0] if kind == "bpe" else tokenizer_lib.load_tokenizer("bytes")
    with pytest.raises(UserError, match="unpaired surrogate.*character 2"):
        tokenizer.encode("ab\ud800")


def test_bpe_training_is_deterministic_and_splits_digits(bpe, tmp_path):
    tokenizer, path = bpe
    tokenizer_lib.train_bpe(iter(TRAIN), 280, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.json"]
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("return")) < len("return")


@pytest.mark.parametrize("size", [257, 5000])
def test_bpe_size_out_of_reach(size, tmp_path):
    with pytest.raises(UserError, match=f"vocab_size = {size}: must be at"):
        tokenizer_lib.train_bpe(["little text"], size, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_bpe_path_must_be_loadable_again(tmp_path):
    with pytest.raises(UserError, match="must end in .json"):
        tokenizer_lib.train_bpe(["text"], 300, tmp_path / "t")


def test_sentencepiece(sentencepiece_path):
    tokenizer = tokenizer_lib.load_tokenizer(str(sentencepiece_path))
    text = "the cat ran on a mat"
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 10**6]) == text
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == text


def test_one_special_serves_as_both_and_none_is_an_error(bpe, tmp_path):
    text = bpe[1].read_text()
    path = tmp_path / "one.json"
    path.write_text(text.replace("<|eos|>", "<|other|>"))
    tokenizer = tokenizer_lib.load_tokenizer(str(path))
    assert tokenizer.bos_id == tokenizer.eos_id == 0
    path.write_text(text.replace("<|eos|>", "<|other|>").replace("<|bos|>", "<|one|>"))
    with pytest.raises(UserError, match="begins or ends a text"):
        tokenizer_lib.load_tokenizer(str(path))


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_corrupt_and_missing_files_are_one_line(name, tmp_path):
    path = tmp_path / name
    with pytest.raises(UserError, match="no such file"):
        tokenizer_lib.load_tokenizer(str(path))
    path.write_text("{\n broken")
    with pytest.raises(UserError, match="not a") as caught:
        tokenizer_lib.load_tokenizer(str(path))
    assert "\n" not in str(caught.value)


def test_unknown_spec_is_a_user_error():
    with pytest.raises(UserError, match="data.tokenizer = 'byte': must be"):
        tokenizer_lib.load_tokenizer("byte")


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"words and words of document {i}\n" * 3)
    source = SourceConfig("words", f"{folder}/*.txt", "", 1.0)
    return DataConfig("bpe:270", (source,), "text", 0.1, "concat", 0, 1)


def resolve(data, workdir):
    return tokenizer_lib.resolve_tokenizer(Sources.open(data), workdir)


def test_resolve_trains_once_and_reuses(data, tmp_path):
    first = resolve(data, tmp_path / "run")
    path = tmp_path / "run" / "tokenizer.json"
    written = path.read_bytes()
    assert first.vocab_size == 270
    gone = dataclasses.replace(data, sources=(SourceConfig("words", "gone/*.txt", "", 1.0),))
    again = resolve(gone, tmp_path / "run")
    assert again.encode("words and") == first.encode("words and")
    resolve(data, tmp_path / "other")
    assert (tmp_path / "other" / "tokenizer.json").read_bytes() == written
    with pytest.raises(UserError, match="has 270 tokens"):
        resolve(dataclasses.replace(data, tokenizer="bpe:271"), tmp_path / "run")


@pytest.mark.parametrize("size", ["", "x", "12", "-300", "3e3"])
def test_resolve_bad_size(data, size, tmp_path):
    with pytest.raises(UserError, match="bpe:<size>"):
        resolve(dataclasses.replace(data, tokenizer=f"bpe:{size}"), tmp_path)


def test_resolve_keeps_a_copy_of_a_path(data, bpe, sentencepiece_path, tmp_path):
    given = tmp_path / "given.json"
    given.write_bytes(bpe[1].read_bytes())
    data = dataclasses.replace(data, tokenizer=str(given))
    resolve(data, tmp_path / "run")
    given.unlink()
    assert resolve(data, tmp_path / "run").vocab_size == 280
    given.write_text("another")
    with pytest.raises(UserError, match="differs from"):
        resolve(data, tmp_path / "run")
    data = dataclasses.replace(data, tokenizer=str(sentencepiece_path))
    resolve(data, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.model").exists()
    bytes_data = dataclasses.replace(data, tokenizer="bytes")
    assert resolve(bytes_data, tmp_path / "b").vocab_size == 258
    assert not (tmp_path / "b").exists()
