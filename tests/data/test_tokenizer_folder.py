"""Tokenizers of Hugging Face folders."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest

from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import load_tokenizer, resolve_tokenizer
from tests.data import hf_folders

TEXTS = [
    *hf_folders.TEXTS,
    "",
    "<|im_start|>user\nhi<|im_end|>",
    "<s>[INST] the cat [/INST] sat</s> the",
    "a</s><s> x<|turn|> the",
    "<|begin|><|begin|>the<|eot|>",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return hf_folders.write_all(tmp_path_factory.mktemp("folders"))


def rewrite(folder, file, **changes):
    path = folder / file
    config = json.loads(path.read_text()) | changes
    hf_folders.write_json(path, config)


def test_the_configs_say_what_begins_and_ends_a_text(tmp_path):
    ids = hf_folders.qwen(tmp_path / "q")
    tokenizer = load_tokenizer(str(tmp_path / "q"))
    # No bos in the tokenizer's config: the model's has one. The answer's end is not the document's.
    assert tokenizer.bos_id == ids["<|endoftext|>"] and tokenizer.eos_id == ids["<|im_end|>"]
    assert tokenizer.stop_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert not tokenizer.adds_bos and tokenizer.specials == ids
    (tmp_path / "q" / "generation_config.json").unlink()
    rewrite(tmp_path / "q", "config.json", eos_token_id=ids["<|endoftext|>"])
    rewrite(tmp_path / "q", "tokenizer_config.json", eos_token=None)
    tokenizer = load_tokenizer(str(tmp_path / "q"))
    assert tokenizer.stop_ids == (ids["<|endoftext|>"],)
    # The defaults of a config class, which are ordinary tokens here, say nothing.
    rewrite(tmp_path / "q", "config.json", bos_token_id=1, eos_token_id=2)
    # Nothing says: the names that end a text elsewhere.
    tokenizer = load_tokenizer(str(tmp_path / "q"))
    assert tokenizer.bos_id == tokenizer.eos_id == ids["<|endoftext|>"]

    ids = hf_folders.llama3(tmp_path / "l")
    tokenizer = load_tokenizer(str(tmp_path / "l"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids["<|begin|>"], ids["<|eot|>"])
    assert tokenizer.adds_bos and tokenizer.stop_ids[1:] == (ids["<|stop|>"],)

    hf_folders.sentencepiece(tmp_path / "s")
    tokenizer = load_tokenizer(str(tmp_path / "s"))
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.adds_bos) == (1, (2,), True)
    assert tokenizer.specials["<|turn|>"] == tokenizer.vocab_size - 1
    rewrite(tmp_path / "s", "tokenizer_config.json", add_bos_token=False)
    assert not load_tokenizer(str(tmp_path / "s")).adds_bos


@pytest.mark.parametrize("kind", hf_folders.KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_specials_are_text_unless_asked_for(folders, kind, text):
    tokenizer = load_tokenizer(str(folders / kind))
    special = set(tokenizer.specials.values())
    ids = tokenizer.encode(text)
    assert not special & set(ids) and tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    spelled = [name for name in tokenizer.specials if name in text]
    read = tokenizer.encode(text, specials=True)
    assert {i for i in read if i in special} == {tokenizer.specials[name] for name in spelled}
    if not spelled:
        assert read == ids


@pytest.mark.slow
@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_as_transformers_tokenizes(folders, kind):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer(str(folders / kind))
    theirs = transformers.AutoTokenizer.from_pretrained(str(folders / kind))
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_token_id, len(theirs))
    assert theirs.bos_token_id in (ours.bos_id, None)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, specials=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        begin = [ours.bos_id] if ours.adds_bos else []
        assert theirs.encode(text) == begin + ids


def test_ordinary_added_tokens(tmp_path):
    hf_folders.sentencepiece(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["added_tokens_decoder"]
    hf_folders.write_json(path, config | {"additional_special_tokens": ["<|turn|>"]})
    size = load_tokenizer(str(tmp_path)).vocab_size
    added = {"<|turn|>": size, "<tab>": size + 1}
    hf_folders.write_json(tmp_path / "added_tokens.json", added)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.vocab_size == size + 2
    ids = tokenizer.encode("the<tab><|turn|>cat")
    assert size + 1 in ids and size not in ids
    assert tokenizer.decode(ids) == "the<tab><|turn|>cat"
    ids = tokenizer.encode("the<tab><|turn|>cat", specials=True)
    assert size in ids and tokenizer.decode(ids) == "the<tab>cat"


@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_a_copy_in_another_process_is_the_same(folders, kind):
    tokenizer = load_tokenizer(str(folders / kind))
    expected = [(tokenizer.encode(t), tokenizer.encode(t, specials=True)) for t in TEXTS]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert [(copy.encode(t), copy.encode(t, specials=True)) for t in TEXTS] == expected


@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_a_stream_goes_on_where_its_prompt_ends(folders, kind):
    tokenizer = load_tokenizer(str(folders / kind))
    text = "the cat sat on a mat, the rat \u6f22\u5b57"
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut])
        stream = tokenizer.stream_decoder(ids[:cut])
        after = "".join(map(stream.push, ids[cut:])) + stream.flush()
        # A cut inside of a character cannot be mended.
        assert before + after == text or before.endswith("\ufffd")


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "\ud800"}, "eos_token = '\\ud800': must be"),
        ("tokenizer_config.json", {"bos_token": {}}, "bos_token = {}: must be a string"),
        ("tokenizer_config.json", {"legacy": 1}, "legacy = 1: must be true or false"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "a"}}},
            "['x']: its key must be the id",
        ),
        ("tokenizer_config.json", {"eos_token": "<|end|>"}, "no token '<|end|>', its config's eos"),
        ("tokenizer_config.json", {"bos_token": "<|end|>"}, "no token '<|end|>', its config's bos"),
        (
            "generation_config.json",
            {"eos_token_id": [297, 5000]},
            "eos_token_id = 5000: must be below",
        ),
    ],
)
def test_configs_that_do_not_fit_are_one_line(tmp_path, file, changes, message):
    hf_folders.qwen(tmp_path)
    rewrite(tmp_path, file, **changes)
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(tmp_path))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    hf_folders.write_json(tmp_path / "config.json", {"eos_token_id": 2})
    with pytest.raises(UserError, match="has no tokenizer.json and no tokenizer.model"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="config.json: not JSON"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_a_run_keeps_its_tokenizer_whole(kind, tmp_path):
    given, run = tmp_path / "given", tmp_path / "run"
    hf_folders.KINDS[kind](given)
    source = SourceConfig("unread", "nowhere/*.txt", "", 1.0)
    data = DataConfig(str(given), (source,), "text", 0.1, "concat", 0, 1)
    first = resolve_tokenizer(Sources.open(data), run)
    assert [path.name for path in run.iterdir()] == ["tokenizer"]
    (given / "model.safetensors").write_bytes(b"not ours")
    again = resolve_tokenizer(Sources.open(data), run)
    rewrite(given, "tokenizer_config.json", chat_template="another")
    (given / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match="differs from"):
        resolve_tokenizer(Sources.open(data), run)
    given.rename(tmp_path / "gone")
    third = resolve_tokenizer(Sources.open(data), run)
    for tokenizer in (again, third):
        for name in ("vocab_size", "bos_id", "stop_ids", "adds_bos", "specials", "chat_template"):
            assert getattr(tokenizer, name) == getattr(first, name)
    assert first.chat_template is not None
    # Laid over a model's folder, it must not describe another model.
    assert not (run / "tokenizer" / "config.json").exists()
    with pytest.raises(UserError, match="must be bytes"):
        resolve_tokenizer(
            Sources.open(dataclasses.replace(data, tokenizer=str(given))), tmp_path / "new"
        )


ODD = [
    None,
    True,
    -1,
    3,
    2**31,
    10**400,
    1.5,
    "",
    "3",
    "\ud800",
    "\0" * 3,
    "a" * 10**5,
    [],
    {},
    [None],
    [[["a"]]],
    {"content": None},
    {"": {}},
    {"1": "a", "-1": {"content": "b"}, "9" * 9999: {"content": "c"}},
    {"content": "<s>", "special": "yes"},
]
DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[" + content + b"]",
    "latin-1": lambda content: content + b"\xe9",
    "utf-16": lambda content: content.decode().encode("utf-16"),
    "deep": lambda content: b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "NaN": lambda content: content.replace(b"{", b'{"x": NaN, ', 1),
    "a huge number": lambda content: content.replace(b"{", b'{"x": 1e999, ', 1),
    "digits": lambda content: content.replace(b"{", b'{"x": ' + b"9" * 10**5 + b", ", 1),
    "zeros": lambda content: bytes(64),
}


def use(folder):
    """Loads a tokenizer and does with it what a run does; UserErrors are right."""
    try:
        tokenizer = load_tokenizer(str(folder))
        ids = tokenizer.encode("the cat <s>", specials=True)
        tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a"), *ids, *tokenizer.stop_ids])
        assert 0 <= tokenizer.bos_id < tokenizer.vocab_size
        assert all(0 <= index < tokenizer.vocab_size for index in (*tokenizer.stop_ids, *ids))
        assert tokenizer.vocab_size < 10**5
        if tokenizer.chat_template is not None:
            tokenizer.chat_template.encode(tokenizer, [{"role": "user", "content": "hi"}])
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
        return str(error)
    return ""


def json_files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".jinja"))


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_damaged_files_are_one_line(kind, damage, tmp_path):
    hf_folders.KINDS[kind](tmp_path)
    for path in json_files(tmp_path):
        content = path.read_bytes()
        path.write_bytes(DAMAGE[damage](content))
        said = use(tmp_path)
        # The library that reads the vocabulary lets keys pass that it does not know.
        assert path.name in said or path.suffix == ".jinja" or path.name == "tokenizer.json"
        path.write_bytes(content)
    assert use(tmp_path) == ""


def changed(value, generator):
    """A copy of a JSON value with one value somewhere in it replaced, removed or renamed."""
    if isinstance(value, (dict, list)) and value and generator.random() < 0.7:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key, copy = keys[generator.integers(len(keys))], value.copy()
        if isinstance(value, dict) and generator.random() < 0.1:
            del copy[key]
        elif isinstance(value, dict) and generator.random() < 0.1:
            copy[f"{key}x"] = copy.pop(key)
        else:
            copy[key] = changed(value[key], generator)
        return copy
    return ODD[generator.integers(len(ODD))]


@pytest.mark.parametrize("kind", hf_folders.KINDS)
def test_any_value_in_any_file_is_used_or_one_line(kind, tmp_path):
    hf_folders.KINDS[kind](tmp_path)
    generator = np.random.default_rng(0)
    hf_folders.write_json(tmp_path / "added_tokens.json", {"<tab>": 400, "<s>": 1})
    paths = [path for path in json_files(tmp_path) if path.suffix == ".json"]
    for path in paths:
        content = path.read_bytes()
        for _ in range(60):
            path.write_text(json.dumps(changed(json.loads(content), generator)))
            use(tmp_path)
        path.write_bytes(content)
