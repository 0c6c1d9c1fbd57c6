"""configs/own_text.py: any text by one argument, with what fits its size."""

import logging

import pytest

from configs import own_text, quickstart
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.data.sources import Sources

LINE = "The quick brown fox jumps over the lazy dog. 敏捷的棕狐狸。\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, size):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LINE * (size // len(LINE.encode())), encoding="utf-8")

    return write


def run_of(argument):
    return build(RunConfig, own_text.get_config(argument))


def tokens(run):
    return sum(stage.tokens for stage in run.stages)


def test_one_file_is_a_source_named_after_it_and_its_end_is_held_out(write, caplog):
    caplog.set_level(logging.INFO)
    write("input.txt", 300_000)
    run = run_of("input.txt")
    assert run.data.source_names == ("input",) and run.data.tokenizer == "bpe:512"
    assert all(run.data.weights(stage) == {"input": 1.0} for stage in run.stages)
    sources = Sources.open(run.data)
    assert sources.eval["input"].num_bytes == pytest.approx(30_000, rel=0.3)
    line = "text     0.3 MB in 1 file (1 .txt): bpe:512, about 0.16 M tokens an epoch, "
    assert caplog.messages[0].startswith(line)
    assert run.sample_prompt == "The quick brown fox"
    assert run.model == build(RunConfig, quickstart.get_config()).model


# The recipe's time is the most that a text gets, and four epochs are the most that it is worth.
@pytest.mark.parametrize(
    ("size", "tokenizer", "epochs"),
    [(20_000, "bytes", 4), (80_000, "bytes", 4), (1_100_000, "bpe:2048", None)],
)
def test_vocabulary_and_tokens_follow_the_size(write, size, tokenizer, epochs):
    write("a.txt", size)
    run, recipe = run_of("a.txt"), build(RunConfig, quickstart.get_config())
    assert run.data.tokenizer == tokenizer
    expected = epochs * 0.9 * size if epochs else tokens(recipe)
    assert tokens(run) == pytest.approx(expected, rel=0.03)
    assert [stage.name for stage in run.stages] == [stage.name for stage in recipe.stages]


def test_a_text_that_grows_by_a_line_is_the_same_run(write):
    write("a.txt", 100_000)
    before = run_of("a.txt")
    with open("a.txt", "a") as file:
        file.write("One more.\n")
    assert run_of("a.txt") == before


def test_several_paths_are_several_sources_with_shares_by_size(write, caplog):
    caplog.set_level(logging.INFO)
    write("poems/a.txt", 10_000)
    write("poems/deep/b.md", 20_000)
    write("more poems/notes v1.txt", 60_000)
    write("x/poems.txt", 10_000)
    run = run_of("poems,more poems/*.txt,x/poems.txt")
    assert run.data.source_names == ("poems", "more_poems", "poems_2")
    assert [source.weight for source in run.data.sources] == pytest.approx(
        [0.3, 0.6, 0.1], abs=0.01
    )
    assert "0.0999 MB in 4 files (3 .txt, 1 .md): bytes" in caplog.text
    assert run.sample_prompt == ""
    # A comma in the name of what is there is no separator.
    write("a,b.txt", 5_000)
    assert run_of("a,b.txt").data.source_names == ("a_b",)


def test_tokens_can_be_asked_for(write):
    write("a.txt", 50_000)
    for text, number in (("5e4", 50_000), ("3_000_000", 3_000_000), ("1.5e6", 1_500_000)):
        assert tokens(run_of(f"a.txt,tokens={text}")) == pytest.approx(number, rel=0.03)
    run_of("a.txt,tokens=1")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "needs a text: --config=configs/own_text.py:PATH"),
        (",", "needs a text"),
        ("tokens=5", "needs a text"),
        ("a.txt,tokens=", "tokens = : must be a number like 5e6"),
        ("a.txt,tokens=nan", "tokens = nan: must be a number like 5e6"),
        ("a.txt,tokens=0", "tokens = 0: must be a number"),
        ("a.txt,tokens=1,tokens=2", "is given twice"),
        ("a.txt,a.txt", "a.txt,a.txt: a path, or tokens, is given twice"),
        ("none.txt", "PATH = 'none.txt': must be a path or a glob"),
        ("a.txt,none", "PATH = 'none': must be a path or a glob"),
        ("a.bin", "a.bin is of no known kind"),
        ("empty", "must be a folder with files of a known kind"),
    ],
)
def test_a_bad_argument_is_one_line(write, tmp_path, argument, message):
    write("a.txt", 1000)
    write("a.bin", 1000)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        run_of(argument)
    assert "\n" not in str(caught.value)


def test_an_empty_text_is_refused_where_all_are(write):
    write("a.txt", 0)
    with pytest.raises(UserError, match="a.txt': has no text in it"):
        Sources.open(run_of("a.txt").data).fingerprint()
