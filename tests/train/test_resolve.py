"""The vocabulary comes from the tokenizer, once, and must hold it; nothing is written meanwhile."""

import dataclasses

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.data.tokenizer import load_tokenizer
from lightning_jax.train.resolve import digest, kept_files, resolve
from tests.data import hf_folders
from tests.tiny import tiny_run, write_corpus


def test_zero_is_the_tokenizers_size_rounded_up():
    config = tiny_run("unread")
    resolved = resolve(config)
    assert resolved.tokenizer.vocab_size == 258 and resolved.config.model.vocab_size == 272
    assert dataclasses.replace(resolved.config, model=config.model) == config
    assert resolve(resolved.config).config == resolved.config
    assert not resolved.files


def test_a_larger_vocabulary_stays_and_a_smaller_one_is_refused():
    larger = tiny_run("unread", model__vocab_size=300)
    assert resolve(larger).config == larger
    with pytest.raises(UserError, match="^model.vocab_size = 257: the tokenizer has 258 ids .0: "):
        resolve(tiny_run("unread", model__vocab_size=257))
    # Its advice.
    assert resolve(tiny_run("unread", model__vocab_size=0)).config.model.vocab_size == 272


def test_a_padding_token_beyond_the_embedding_is_accepted(tmp_path, caplog):
    # Case C4
    hf_folders.byte_level(tmp_path / "hf", ["<s>", "</s>", "[PAD]"])
    rows = load_tokenizer(str(tmp_path / "hf")).vocab_size - 1
    spec = dict(data__tokenizer=str(tmp_path / "hf"))
    resolved = resolve(tiny_run("unread", model__vocab_size=rows, **spec))
    assert resolved.config.model.vocab_size == resolved.tokenizer.vocab_size == rows
    assert "[PAD]: beyond" in caplog.text
    with pytest.raises(UserError, match=f"^model.vocab_size = {rows - 1}: the tokenizer has"):
        resolve(tiny_run("unread", model__vocab_size=rows - 1, **spec))


def test_a_trained_tokenizer_is_kept_when_asked_for_and_then_read(tmp_path):
    config = tiny_run(write_corpus(tmp_path / "text"), data__tokenizer="bpe:270")
    run = tmp_path / "run"
    run.mkdir()
    resolved = resolve(config, run)
    assert resolved.config.model.vocab_size == 272 and resolved.tokenizer.vocab_size == 270
    assert [*resolved.files] == ["tokenizer.json"] and not list(run.iterdir())
    resolved.keep(run)
    assert [path.name for path in run.iterdir()] == ["tokenizer.json"]
    assert kept_files(run) == resolved.files
    (tmp_path / "text" / "corpus.jsonl").unlink()
    again = resolve(config, run)
    assert (again.config, again.digest) == (resolved.config, resolved.digest)
    with pytest.raises(UserError, match="corpus.jsonl"):
        resolve(config)


def test_a_folder_is_kept_whole_and_replaces_another_tokenizer(tmp_path):
    config = tiny_run(write_corpus(tmp_path / "text"), data__tokenizer="bpe:270")
    given, run = tmp_path / "given", tmp_path / "run"
    for path in (given, run):
        path.mkdir()
    resolve(config).keep(given)
    (given / "tokenizer_config.json").write_text('{"eos_token": "<|eos|>"}')
    data = dataclasses.replace(config.data, tokenizer=str(given))
    resolve(config).keep(run)
    resolved = resolve(dataclasses.replace(config, data=data))
    resolved.keep(run)
    assert [path.name for path in run.iterdir()] == ["tokenizer"]
    assert set(resolved.files) >= {"tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"}
    assert kept_files(run) == resolved.files
    assert load_tokenizer(str(run / "tokenizer")).vocab_size == 270
    resolve(tiny_run("unread")).keep(run)
    assert not list(run.iterdir())


def test_a_digest_is_of_names_and_contents():
    files = {"a": b"1", "b": b"2"}
    assert digest(files) == digest(dict(reversed(files.items())))
    others = ({"a": b"2", "b": b"1"}, {"a": b"1"}, {"a": b"1", "c": b"2"}, {"a": b"1b 1\n2"}, {})
    assert len({digest(files), *map(digest, others)}) == 6
