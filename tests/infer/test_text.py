from __future__ import annotations

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from lightning_jax import checkpoint, sharding
from lightning_jax import model as lm
from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config import CheckpointMeta
from lightning_jax.config.errors import UserError
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from lightning_jax.data.tokenizer_stream import BYTE_OF_CHARACTER
from lightning_jax.infer import text
from lightning_jax.infer.sampling import Sampling
from lightning_jax.infer.text import GenerateOptions
from tests import tiny
from tests.data import hf_folders, hf_vocabularies

BYTES = ByteTokenizer()


class _Scripted:
    """An engine whose first row says `ids`, and whose others are still going."""

    def __init__(self, ids):
        self.ids, self.prompts = ids, None

    def stream(self, prompts, sampling, *, max_new_tokens, key, stop_ids):
        self.prompts = prompts
        for token in self.ids:
            yield np.array([token] + [7] * (len(prompts) - 1), np.int32)


def _pieces(ids, rows=1):
    engine = _Scripted(ids)
    prompt = text.encode_prompt(BYTES, "ab")
    pieces = text.stream_text(
        engine, BYTES, prompt, Sampling(), max_new_tokens=9, key=jax.random.key(0), rows=rows
    )
    return list(pieces), engine


def test_pieces_are_whole_characters():
    pieces, engine = _pieces([*"a\u00e9\u6f22".encode(), BYTES.eos_id])
    assert pieces == ["a", "", "\u00e9", "", "", "\u6f22", "", ""]
    assert engine.prompts == [[BYTES.bos_id, *b"ab"]]


def test_a_character_cut_by_the_end_is_replaced():
    assert "".join(_pieces([*b"x\xe6\xbc"])[0]) == "x\ufffd"


def test_only_the_first_of_several_rows_is_read():
    pieces, engine = _pieces([*b"hi", BYTES.eos_id, -1, -1], rows=3)
    assert "".join(pieces) == "hi"
    assert len(engine.prompts) == 3


def test_any_token_that_ends_a_text_ends_it():
    class TwoEnds(ByteTokenizer):
        stop_ids = (BYTES.eos_id, ord("!"))

    pieces = text.stream_text(
        _Scripted([*b"hi!no"]), TwoEnds(), [1], Sampling(), max_new_tokens=9, key=jax.random.key(0)
    )
    assert "".join(pieces) == "hi"


def test_a_string_that_ends_a_text_is_not_written():
    class Turns(ByteTokenizer):
        stop_strings = ("\nUser:", "<end>")

    def say(ids, tokenizer):
        made = text.stream_text(
            _Scripted(ids), tokenizer, [1], Sampling(), max_new_tokens=9, key=jax.random.key(0)
        )
        return list(made)

    pieces = say([*b"hi\nUs, no\nUser: x"], Turns())
    assert "".join(pieces) == "hi\nUs, no"
    # What may be the beginning of it waits, and nothing else.
    assert pieces[:6] == ["h", "i", "", "", "", "\nUs,"]
    assert "".join(say([*b"a<en", BYTES.eos_id], Turns())) == "a<en"


def test_a_token_that_ends_a_text_is_not_written_in_a_chat(tmp_path):
    # Case C1
    added = [
        hf_vocabularies.token(256, "<|endoftext|>"),
        hf_vocabularies.token(257, "<|im_end|>", special=False),
    ]
    parts = hf_vocabularies.KINDS["byte level"] | {"added_tokens": added}
    parts["model"] = hf_vocabularies.bpe(BYTE_OF_CHARACTER)
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 256]}')
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.stop_ids == (256, 257)
    prompt = text.encode_chat(tokenizer, "hi<|im_end|>")
    assert prompt.count(257) == 1 and prompt[-1] == 257
    engine = _Scripted([*b"yes", 257, 257, 257])
    pieces = text.stream_text(
        engine,
        tokenizer,
        prompt,
        Sampling(),
        max_new_tokens=9,
        key=jax.random.key(0),
        answer=True,
    )
    assert "".join(pieces) == "yes"


def test_prompts_begin_as_the_tokenizer_says(tmp_path):
    hf_folders.llama3(tmp_path / "llama3")
    hf_folders.qwen(tmp_path / "qwen")
    with_bos, without = (load_tokenizer(str(tmp_path / name)) for name in ("llama3", "qwen"))
    assert text.encode_prompt(with_bos, "the") == [with_bos.bos_id, *with_bos.encode("the")]
    assert text.encode_prompt(without, "the") == without.encode("the")
    assert text.encode_prompt(without, "") == [without.bos_id]


def test_a_chat_prompt_ends_where_the_answer_begins(tmp_path):
    ids = hf_folders.qwen(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    made = text.encode_chat(tokenizer, "hi <|im_end|>")
    assert made[0] == ids["<|im_start|>"] and made.count(ids["<|im_end|>"]) == 1
    assert made[-len(tokenizer.encode("assistant\n")) :] == tokenizer.encode("assistant\n")
    with pytest.raises(UserError, match=r"^chat = True: .* has no chat template$"):
        text.encode_chat(BYTES, "hi")


@pytest.mark.parametrize("answer", [False, True])
def test_an_answer_begins_a_text_of_its_own(tmp_path, answer):
    hf_folders.sentencepiece(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    prompt, said = tokenizer.encode("the"), tokenizer.encode("the cat")[1:]
    pieces = text.stream_text(
        _Scripted(said),
        tokenizer,
        prompt,
        Sampling(),
        max_new_tokens=9,
        key=jax.random.key(0),
        answer=answer,
    )
    assert "".join(pieces) == ("cat" if answer else " cat")


def _options(**changes):
    fields = dict(
        prompt="def ",
        sampling=Sampling(),
        max_new_tokens=6,
        num_samples=2,
        seed=0,
        step=None,
        chat=False,
    )
    return GenerateOptions(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"num_samples": 0},
        {"seed": -1},
    ],
)
def test_bad_options_are_named(changes):
    with pytest.raises(UserError, match=f"^{next(iter(changes))} = "):
        _options(**changes)


@pytest.fixture
def run(tmp_path, monkeypatch):
    config = tiny.tiny_run(tiny.write_corpus(tmp_path), sample_tokens=6, sample_prompt="def ")
    model = dataclasses.replace(config.model, vocab_size=272)
    config = dataclasses.replace(config, model=model)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lm.abstract_params(model)
    )
    position = dict(step=3, tokens=0, stage="stable", seq_len=32, rope_base_global=100.0)
    loaded = LoadedRun(CheckpointMeta(config, **position), params, lm.init_router(model))
    monkeypatch.setattr(checkpoint, "load_run", lambda workdir, *, step: loaded)
    return loaded


@pytest.mark.slow
def test_a_run_is_continued_and_measured(run, tmp_path):
    written, reports = [], []
    options = _options(prompt="d\u00e9", routing=EvalRouting(top_p=1.0))
    text.generate_run(tmp_path, options, write=written.append, report=reports.append)
    samples = "".join(written).split("\nd\u00e9")
    assert len(samples) == 2 and samples[0].startswith("d\u00e9") and written[-1] == "\n"
    again = []
    text.generate_run(tmp_path, options, write=again.append, report=reports.append)
    assert again == written
    # top_p = 1 fills all of max_experts.
    line = r"\d tokens, \d+\.\d tokens/s, 4\.00 experts per token"
    assert len(reports) == 4 and all(re.fullmatch(line, report) for report in reports)


@pytest.mark.slow
def test_a_chat_writes_the_answer_alone(run, tmp_path, monkeypatch):
    hf_folders.qwen(tmp_path / "qwen")
    model = dataclasses.replace(run.config.model, vocab_size=304)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), lm.abstract_params(model)
    )
    data = dataclasses.replace(run.config.data, tokenizer=str(tmp_path / "qwen"))
    config = dataclasses.replace(run.config, model=model, data=data)
    meta = dataclasses.replace(run.meta, config=config)
    chatty = dataclasses.replace(run, meta=meta, params=params)
    monkeypatch.setattr(checkpoint, "load_run", lambda workdir, *, step: chatty)
    written = []
    options = _options(prompt="the cat", num_samples=1, chat=True)
    text.generate_run(tmp_path / "run", options, write=written.append, report=lambda line: None)
    answer = "".join(written)
    assert "the cat" not in answer and "<|im" not in answer and answer.endswith("\n")
    assert (tmp_path / "run" / "tokenizer" / "tokenizer_config.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_a_sample_in_training_is_the_same_on_any_mesh(run):
    args = (run.config, run.params, run.router, BYTES, 100.0)
    alone = text.sample(*args)
    assert alone.startswith("def ") and len(alone) > 4
    mesh_config = dataclasses.replace(run.config.mesh, data=2, fsdp=2)
    with jax.set_mesh(sharding.make_mesh(mesh_config, jax.devices()[:4])):
        assert text.sample(*args) == alone
