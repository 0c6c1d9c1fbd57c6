"""Exports read by `transformers`: the same ids, and the same ends."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config import DataConfig, SourceConfig
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import load_tokenizer, resolve_tokenizer, train_bpe
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from lightning_jax.interop import hf
from lightning_jax.interop.tokenizer_export import export_tokenizer
from lightning_jax.runtime.files import read_json
from tests.data import hf_folders, hf_vocabularies
from tests.tiny import tiny_model

TEXTS = [
    "",
    "hello world, def f(x): return x  # 12345\n\n\ttabs\r\n",
    " leading and trailing ",
    "\u6f22\u5b57\u3068\u4eee\u540d\uff0c\u4e2d\u6587 caf\u00e9 e\u0301",
    "\U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467 \ufffd\ufffd",
    "<|bos|> <|eos|> <s></s>",
    "".join(map(chr, range(256))),
]


def resolve(spec, workdir):
    source = SourceConfig("unread", "nowhere/*.txt", "", 1.0)
    data = DataConfig(spec, (source,), "text", 0.1, "concat", 0, 1)
    return resolve_tokenizer(Sources.open(data), workdir)


def bpe(workdir):
    train_bpe(["hello world, def f(x): return x\n" * 3], 275, workdir / "tokenizer.json")
    return resolve("bpe:275", workdir)


def imported(write):
    def make(workdir):
        write(workdir / "given")
        return resolve(str(workdir / "given"), workdir)

    return make


def given(workdir):
    """A tokenizer.json alone, with a post-processor that is not ours and unmarked bos and eos."""
    parts = dict(hf_vocabularies.KINDS["byte level"])
    model = parts.pop("model")
    added = [hf_vocabularies.token(259, "<turn>", special=False)]
    parts |= {"added_tokens": added, "truncation": None}
    hf_vocabularies.write(workdir / "given.json", model, **parts)
    return resolve(str(workdir / "given.json"), workdir)


MAKE = {
    "bytes": lambda workdir: resolve("bytes", workdir),
    "bpe": bpe,
    "given": given,
    "qwen": imported(hf_folders.qwen),
    "llama3": imported(hf_folders.llama3),
    "sentencepiece": imported(hf_folders.sentencepiece),
}
OURS = ("bytes", "bpe", "given")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """From kind to tokenizer and folder, as written beside any model's config."""
    made = {}
    for kind, make in MAKE.items():
        home = tmp_path_factory.mktemp(kind)
        tokenizer = make(home)
        folder = home / "out"
        folder.mkdir()
        described = {"model_type": "llama", "bos_token_id": None, "eos_token_id": None}
        hf_folders.write_json(folder / "config.json", described)
        rows = -(-tokenizer.vocab_size // 16) * 16
        said = export_tokenizer(tokenizer, home, folder, rows=rows)
        made[kind] = (tokenizer, folder, rows, said)
    return made


# Case C2
@pytest.mark.parametrize("kind", MAKE)
def test_the_ids_are_written_and_read_again(exported, kind):
    tokenizer, folder, rows, said = exported[kind]
    config, generation = (
        read_json(folder / f"{name}.json") for name in ("config", "generation_config")
    )
    stops = [*tokenizer.stop_ids] if len(tokenizer.stop_ids) > 1 else tokenizer.eos_id
    for written in (config, generation):
        assert (written["bos_token_id"], written["eos_token_id"]) == (tokenizer.bos_id, stops)
    outside = [*range(tokenizer.vocab_size, rows)]
    assert generation.get("suppress_tokens", []) == outside
    assert said.startswith("tokenizer.model" if kind == "sentencepiece" else "tokenizer.json")
    again = load_tokenizer(str(folder))
    for name in ("vocab_size", "bos_id", "stop_ids", "stop_strings", "adds_bos"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_transformers_makes_the_same_ids(exported, kind):
    transformers = pytest.importorskip("transformers", reason="extra: peers")
    tokenizer, folder, *_ = exported[kind]
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    assert (theirs.eos_token_id, len(theirs)) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert theirs.bos_token_id in (tokenizer.bos_id, None)
    # Theirs leaves out the space that SentencePiece puts before a text which begins with one.
    for text in TEXTS if kind != "sentencepiece" else [t for t in TEXTS if t[:1] != " "]:
        # As here, no text spells a special token, unless chats are made of them.
        ids = tokenizer.encode(text, specials=kind not in OURS)
        assert theirs.encode(text, add_special_tokens=False) == ids
        begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
        assert theirs.encode(text) == begin + ids
        if kind in OURS:
            assert theirs.encode(text, "hi") == begin + ids + begin + tokenizer.encode("hi")
        assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == tokenizer.decode(ids)
        if kind in ("bytes", "bpe"):
            assert tokenizer.decode(ids) == text
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": "the cat"}]
        assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
            tokenizer.chat_template.render(chat)
        )


def test_a_sentencepiece_file_alone_is_said_not_to_be_exported(tmp_path):
    hf_folders.sentencepiece(tmp_path / "given")
    tokenizer = resolve(str(tmp_path / "given" / "tokenizer.model"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    hf_folders.write_json(tmp_path / "out" / "config.json", {})
    said = export_tokenizer(tokenizer, tmp_path / "run", tmp_path / "out", rows=400)
    assert "not exported for AutoTokenizer" in said
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == 2
    assert load_tokenizer(str(tmp_path / "out")).encode("the cat") == tokenizer.encode("the cat")


def test_ends_are_exported_as_they_were_imported(tmp_path):
    # Case C1, on the way out.
    ids = hf_folders.qwen(tmp_path / "given")
    ends = {"eos_token_id": [5, ids["<|endoftext|>"]], "stop_strings": ["\n\n"]}
    hf_folders.write_json(tmp_path / "given" / "generation_config.json", ends)
    tokenizer = resolve(str(tmp_path / "given"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    hf_folders.write_json(tmp_path / "out" / "config.json", {})
    export_tokenizer(tokenizer, tmp_path / "run", tmp_path / "out", rows=tokenizer.vocab_size)
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.stop_ids == tokenizer.stop_ids == (ids["<|im_end|>"], 5, ids["<|endoftext|>"])
    assert again.stop_strings == tokenizer.stop_strings == ("\n\n",)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())[
        "stop_strings"
    ] == ["\n\n"]


def test_an_ordinary_token_that_ends_a_text_is_marked(tmp_path):
    # Case C1, on the way out.
    hf_folders.byte_level(tmp_path / "given", ["<|endoftext|>"])
    described = read_json(tmp_path / "given" / "tokenizer.json")
    index = load_tokenizer(str(tmp_path / "given")).vocab_size
    described["added_tokens"].append(hf_vocabularies.token(index, "<|im_end|>", special=False))
    hf_folders.write_json(tmp_path / "given" / "tokenizer.json", described)
    ends = {"eos_token_id": [index, index - 1]}
    hf_folders.write_json(tmp_path / "given" / "generation_config.json", ends)
    decoder = {str(index): hf_folders.special("<|im_end|>") | {"special": False}}
    names = {"added_tokens_decoder": decoder}
    hf_folders.write_json(tmp_path / "given" / "tokenizer_config.json", names)
    tokenizer = resolve(str(tmp_path / "given"), tmp_path / "run")
    assert tokenizer.stop_ids == (index - 1, index)
    out = tmp_path / "out"
    out.mkdir()
    hf_folders.write_json(out / "config.json", {})
    export_tokenizer(tokenizer, tmp_path / "run", out, rows=index + 1)
    assert read_json(out / "tokenizer.json")["added_tokens"][-1]["special"]
    config = read_json(out / "tokenizer_config.json")
    assert config["added_tokens_decoder"][str(index)]["special"]
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "<|endoftext|>" and "bos_token" not in config
    again = load_tokenizer(str(out))
    assert again.stop_ids == tokenizer.stop_ids and again.chat_template is None


LLAMA = dict(unit="G", num_units=2, moe__num_experts=0, attention__qk_norm="none")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "bpe", "qwen"])
def test_transformers_generates_the_same_and_stops(exported, kind, tmp_path):
    torch = pytest.importorskip("torch", reason="extra: peers")
    transformers = pytest.importorskip("transformers", reason="extra: peers")
    tokenizer, folder, rows, _ = exported[kind]
    config = tiny_model(rows, **LLAMA, tie_embeddings=False, compute_dtype="float32")
    params = jax.tree.map(lambda p: p * 1.5, lm.init_params(config, jax.random.key(0)))
    prompt = [tokenizer.bos_id, *tokenizer.encode("hello")]

    def ours(stop_ids=()):
        engine = Engine(
            config,
            params,
            lm.init_router(config),
            max_length=64,
            valid_vocab=tokenizer.vocab_size,
        )
        return engine.generate(
            [prompt],
            Sampling(temperature=0.0),
            max_new_tokens=24,
            key=jax.random.key(0),
            stop_ids=stop_ids,
        )[0]

    # The token that would be the twelfth is made to be the one that ends the text; and a row that
    # is no token is made the most probable of all.
    made, head = ours(), np.array(params["head"]["kernel_DV"])
    last = next(i for i in range(6, 24) if made[i] not in made[:i])
    pair = [made[last], tokenizer.stop_ids[-1]]
    head[:, pair] = head[:, pair[::-1]]
    if rows > tokenizer.vocab_size:
        head[:, -1] = 2 * head[:, made[0]]
    params["head"]["kernel_DV"] = jax.numpy.asarray(head)
    made = ours(tokenizer.stop_ids)
    assert made[-1] == tokenizer.stop_ids[-1] and len(made) <= 24

    hf.save(tmp_path, config, params, model_type="llama")
    home = folder.parent
    export_tokenizer(tokenizer, home, tmp_path, rows=rows)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        answer = theirs.generate(torch.tensor([prompt]), max_new_tokens=24)[0].tolist()
    assert answer == prompt + made
