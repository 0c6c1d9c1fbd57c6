"""What begins and ends a text, by every file that may say so; and answers cut at their ends."""

from __future__ import annotations

import itertools

import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data.chat import ChatTemplate
from lightning_jax.data.ends import Answer
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer, resolve_tokenizer
from tests.data import hf_folders, hf_vocabularies
from tests.data.hf_vocabularies import bpe, token, vocab

# a, b: ordinary pieces; <|x|>: an ordinary added token; <|y|>: a special one.
NAMES = vocab("<|endoftext|>", "a", "b")
ADDED = [token(0, "<|endoftext|>"), token(3, "<|im_end|>", special=False), token(4, "<|y|>")]


def folder(path, *, generation=None, config=None, tokenizer=None, added=ADDED, names=NAMES):
    hf_vocabularies.write(path / "tokenizer.json", bpe(names), added_tokens=added)
    files = {"generation_config": generation, "config": config, "tokenizer_config": tokenizer}
    for name, content in files.items():
        if content is not None:
            hf_folders.write_json(path / f"{name}.json", content)
    return str(path)


# (generation_config.json, config.json, tokenizer_config.json) -> stop ids
RULE = {
    "C1: an ordinary token that generation_config lists": (
        ({"eos_token_id": [3, 0]}, None, None),
        (0, 3),
    ),
    "one id": (({"eos_token_id": 3}, None, {"eos_token": "<|y|>"}), (4, 3)),
    "a piece of the vocabulary": (({"eos_token_id": [2, 4]}, None, None), (4, 2)),
    "generation_config before config": (({"eos_token_id": 4}, {"eos_token_id": 3}, None), (4,)),
    "an added token of config": ((None, {"eos_token_id": [3]}, None), (0, 3)),
    "a default of config": ((None, {"eos_token_id": 2, "bos_token_id": 1}, None), (0,)),
    "a generation_config made of config": (
        ({"eos_token_id": [2, 4], "_from_model_config": True}, None, None),
        (4,),
    ),
    "an empty list": (({"eos_token_id": []}, {"eos_token_id": 4}, None), (4,)),
    "null": (({"eos_token_id": None}, None, {"eos_token": None}), (0,)),
    "spelled": ((None, None, {"eos_token": {"content": "<|y|>"}}), (4,)),
    "spelled goes before ids": (
        ({"eos_token_id": 0, "bos_token_id": 4}, None, {"eos_token": "<|y|>", "bos_token": "a"}),
        (4, 0),
    ),
}
BOS = {
    "spelled": (({"bos_token_id": 4}, None, {"bos_token": "a"}), 1),
    "by id": (({"bos_token_id": 4}, {"bos_token_id": 0}, None), 4),
    "by the id of config": ((None, {"bos_token_id": 4}, None), 4),
    "a default of config": ((None, {"bos_token_id": 1}, None), 0),
    "eos": ((None, None, {"eos_token": "<|y|>"}), 4),
}


@pytest.mark.parametrize("name", BOS)
def test_what_begins_a_text(name, tmp_path):
    (generation, config, tokenizer), expected = BOS[name]
    made = folder(tmp_path, generation=generation, config=config, tokenizer=tokenizer)
    assert load_tokenizer(made).bos_id == expected


@pytest.mark.parametrize("name", RULE)
def test_the_rule(name, tmp_path):
    (generation, config, tokenizer), expected = RULE[name]
    found = load_tokenizer(
        folder(tmp_path, generation=generation, config=config, tokenizer=tokenizer)
    )
    assert found.stop_ids == expected and found.eos_id == expected[0]
    # A run that keeps the tokenizer follows the same rule.
    data = DataConfig(
        str(tmp_path), (SourceConfig("a", "no/*", "", 1.0),), "text", 0.1, "concat", 0, 1
    )
    kept = resolve_tokenizer(Sources.open(data), tmp_path / "run")
    assert (kept.bos_id, kept.stop_ids) == (found.bos_id, expected)


def test_an_ordinary_token_that_ends_a_text_is_special(tmp_path):
    # Case C1
    found = load_tokenizer(folder(tmp_path, generation={"eos_token_id": [3, 0]}))
    assert found.stop_ids == (0, 3) and found.specials["<|im_end|>"] == 3
    assert 3 not in found.encode("a<|im_end|>b")
    assert found.encode("a<|im_end|>", specials=True) == [1, 3]
    assert found.decode([1, 3, 2]).replace(" ", "") == "ab"
    # No message can end itself.
    template = ChatTemplate({"default": "{{ messages[0].content }}<|im_end|>"}, {})
    ids = template.encode(found, [{"role": "user", "content": "a<|im_end|>b"}])
    assert ids.count(3) == 1 and ids[-1] == 3


def test_without_any_end(tmp_path):
    names, added = vocab("x", "a", "b"), [token(3, "<|im_end|>", special=False)]
    with pytest.raises(UserError, match="begins or ends a text"):
        load_tokenizer(folder(tmp_path, names=names, added=added))
    made = folder(tmp_path, names=names, added=added, generation={"eos_token_id": [2]})
    found = load_tokenizer(made)
    assert found.stop_ids == (2,) and found.bos_id == 2


@pytest.mark.parametrize("file", ["generation", "config"])
@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize(
    "value", [-1, True, "3", 1.5, [[3]], [3, None], [True], {}, 5, [0, 5000], 2**31, 10**30]
)
def test_ids_that_are_none_name_file_and_key(file, key, value, tmp_path):
    made = folder(tmp_path, **{file: {key: value}})
    with pytest.raises(UserError, match=rf"config\.json: {key} = .*: must be "):
        load_tokenizer(made)


@pytest.mark.parametrize("value", [3, [3], [["a"]], True, {}])
def test_strings_that_are_none(value, tmp_path):
    with pytest.raises(UserError, match=r"generation_config\.json: stop_strings = .*: must be "):
        load_tokenizer(folder(tmp_path, generation={"stop_strings": value}))


def test_strings_that_end_a_text(tmp_path):
    for value, expected in (("ab", ("ab",)), (["a", "", "b"], ("a", "b")), (None, ())):
        path = tmp_path / str(len(expected))
        found = load_tokenizer(folder(path, generation={"stop_strings": value}))
        assert found.stop_strings == expected


class Stops(ByteTokenizer):
    stop_ids = (257, ord("!"))
    stop_strings = ("<end>", "\u6f22")


def answer(text, until=(), kind=Stops):
    made = Answer(kind(), until=until)
    pieces = [made.push(index) for index in text.encode()]
    return pieces, made.end()


@pytest.mark.parametrize(
    ("text", "until", "expected"),
    [
        ("abc", (), "abc"),
        ("abc!def", (), "abc"),
        ("ab<end>c", (), "ab"),
        ("ab<en>c", (), "ab<en>c"),
        ("ab<e", (), "ab<e"),
        ("ab<<end>", (), "ab<"),
        ("a\u6f22b", (), "a"),
        ("a\u6f23b", (), "a\u6f23b"),
        ("x\n\ny", ("\n\n",), "x"),
        ("x\ny", ("\n\n", ""), "x\ny"),
        ("aaab", ("aab",), "a"),
        ("abcd", ("bcd", "c"), "ab"),
        ("<end>", (), ""),
        ("ababac", ("abac",), "ab"),
    ],
)
def test_an_answer_ends_before_what_ends_it(text, until, expected):
    pieces, rest = answer(text, until)
    assert "".join(pieces) + rest == expected
    # Nothing that might be an end was given, and nothing else was held back.
    for count in range(len(pieces)):
        given = "".join(pieces[: count + 1])
        assert expected.startswith(given)


def test_an_answer_is_that_of_the_whole_text():
    """Against the plain rule: cut the text at the first end that is complete."""
    for letters in itertools.product("ab<", repeat=6):
        text = "".join(letters)
        pieces, rest = answer(text, ("ba", "aab<"), ByteTokenizer)
        found = [
            min(text[:stop].find(end) for end in ("ba", "aab<") if end in text[:stop])
            for stop in range(len(text) + 1)
            if any(end in text[:stop] for end in ("ba", "aab<"))
        ]
        assert "".join(pieces) + rest == (text[: found[0]] if found else text)


def test_after_its_end_an_answer_says_nothing():
    made = Answer(Stops())
    assert [made.push(index) for index in (97, 257, 98, -1)] == ["a", "", "", ""]
    assert made.is_done and made.end() == ""
    made = Answer(Stops())
    assert made.push(ord("<")) == "" and made.push(-1) == "<" and made.is_done
