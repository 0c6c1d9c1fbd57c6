"""The vocabulary comes from the tokenizer, once, and must hold it."""

import dataclasses

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.train.resolve import resolve
from tests.tiny import tiny_run, write_corpus


def test_zero_is_the_tokenizers_size_rounded_up(tmp_path):
    config = tiny_run("unread")
    resolved, tokenizer = resolve(config, tmp_path)
    assert tokenizer.vocab_size == 258 and resolved.model.vocab_size == 272
    assert dataclasses.replace(resolved, model=config.model) == config
    assert resolve(resolved, tmp_path)[0] == resolved


def test_a_larger_vocabulary_stays_and_a_smaller_one_is_refused(tmp_path):
    larger = tiny_run("unread", model__vocab_size=300)
    assert resolve(larger, tmp_path)[0] == larger
    with pytest.raises(UserError, match="^model.vocab_size = 257: the tokenizer has 258 ids"):
        resolve(tiny_run("unread", model__vocab_size=257), tmp_path)


def test_a_tokenizer_trained_on_the_runs_text_is_left_in_its_folder(tmp_path):
    config = tiny_run(write_corpus(tmp_path / "text"), data__tokenizer="bpe:270")
    resolved, tokenizer = resolve(config, tmp_path / "run")
    assert resolved.model.vocab_size == 272 and tokenizer.vocab_size == 270
    assert (tmp_path / "run" / "tokenizer.json").exists()
    (tmp_path / "text" / "corpus.jsonl").unlink()
    assert resolve(config, tmp_path / "run")[0] == resolved
