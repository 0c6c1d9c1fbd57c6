from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config import CheckpointMeta
from lightning_jax.config.errors import UserError
from lightning_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from tests import tiny
from tests.data import hf_folders, hf_vocabularies

pytest.importorskip("lm_eval", reason="needs the lm-eval extra")

from lm_eval.api.instance import Instance

from lightning_jax.infer.buckets import length_bucket
from lightning_jax.interop.lm_eval.adapter import Generation, LightningAdapter
from lightning_jax.interop.lm_eval.tasks import without_lost

VOCAB, MAX_LENGTH, ROPE_BASE = 304, 40, 500.0
GREEDY = Sampling(temperature=0.0)


@functools.cache
def loaded() -> LoadedRun:
    config = tiny.tiny_run("unread", model__compute_dtype="float32", model__head_chunk=7)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=VOCAB))
    generator = np.random.default_rng(0)

    def draw(leaf):
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        return noise * 0.4 if leaf.ndim > 1 else 1 + 0.3 * noise

    params = jax.tree.map(draw, lm.abstract_params(config.model))
    router = lm.init_router(config.model)
    stage = config.stages[-1]
    position = dict(step=3, tokens=0, stage=stage.name, seq_len=stage.seq_len)
    meta = CheckpointMeta(config, **position, rope_base_global=ROPE_BASE)
    return LoadedRun(meta, params, router)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("tokenizers")
    hf_folders.qwen(home / "qwen")
    hf_folders.llama3(home / "llama3")
    return home


@pytest.fixture(scope="module")
def llama3(folders):
    return load_tokenizer(str(folders / "llama3"))


def adapter(tokenizer, batch_size=3, **options):
    options = {"max_length": MAX_LENGTH, "batch_size": batch_size} | options
    return LightningAdapter(loaded(), tokenizer, **options)


def instances(kind, arguments):
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


@jax.jit
def forward(params, tokens_BT):
    return lm.LightningLM(loaded().model).apply({"params": params}, tokens_BT).logits()


def oracle(context, continuation):
    """Log-probability and greediness from one row alone; causality hides the zeros after it."""
    ids = [*context, *continuation][-MAX_LENGTH - 1 :][:-1]
    tokens_BT = np.array([ids + [0] * (MAX_LENGTH - len(ids))], np.int32)
    logits = np.asarray(forward(loaded().params, tokens_BT)[0, : len(ids)], np.float64)
    logits = logits[-len(continuation) :]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = logprobs[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logits.argmax(-1) == continuation).all())


PAIRS = [
    ("def f(x):", " return x + 1"),
    ("def f(x): ", "return"),
    ("", "the cat"),
    ("the cat sat on a mat, the rat ran " * 5, "the cat"),
    (" ", "x"),
    ("caf\u00e9", " \u6f22\u5b57"),
]


@pytest.mark.slow
def test_loglikelihood_is_that_of_a_plain_forward(llama3):
    ours = adapter(llama3)
    found = ours.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    for pair, score in zip(PAIRS, found, strict=True):
        logprob, greedy = oracle(*ours.encode_pair(*pair))
        assert score == (pytest.approx(logprob, abs=2e-4), greedy)
    assert all(type(logprob) is float and type(greedy) is bool for logprob, greedy in found)


@pytest.mark.slow
def test_neither_order_nor_batch_changes_a_score(llama3):
    first = adapter(llama3).loglikelihood(instances("loglikelihood", PAIRS), True)
    requests = instances("loglikelihood", PAIRS[::-1])
    again = adapter(llama3, batch_size=1).loglikelihood(requests, True)[::-1]
    np.testing.assert_allclose([s for s, _ in again], [s for s, _ in first], atol=2e-4)
    assert [g for _, g in again] == [g for _, g in first]


def test_what_is_context_and_what_continuation(llama3, folders):
    ours, bos = adapter(llama3), llama3.bos_id
    # Spaces that end a context belong to the continuation, as they would in running text.
    assert ours.encode_pair("def f(x): ", "return") == ours.encode_pair("def f(x):", " return")
    context, tail = ours.encode_pair("def f(x):", " return")
    assert context == [bos, *llama3.encode("def f(x):")]
    assert context[1:] + tail == llama3.encode("def f(x): return")
    # Characters that merge over the boundary: the context stays what it is.
    text = "def f(x): return x + 1"
    whole, heads = llama3.encode(text), [llama3.encode(text[:cut]) for cut in range(len(text))]
    merged = [cut for cut, ids in enumerate(heads) if whole[: len(ids)] != ids]
    merged = [cut for cut in merged if text[cut - 1] != " "]
    assert merged
    for cut in merged:
        context, tail = ours.encode_pair(text[:cut], text[cut:])
        assert context == [bos, *heads[cut]] and tail == llama3.encode(text[cut:])
    assert ours.encode_pair("", "the") == ([bos], llama3.encode("the"))
    assert ours.encode_pair("  ", "x") == ([bos], llama3.encode("  x"))
    # A tokenizer whose texts begin without bos: only where there would be no context at all.
    qwen = load_tokenizer(str(folders / "qwen"))
    assert adapter(qwen).encode_pair("the", " cat")[0] == qwen.encode("the")
    assert adapter(qwen).encode_pair("", "cat")[0] == [qwen.bos_id]


@pytest.mark.slow
def test_rolling_sums_over_windows(llama3):
    ours = adapter(llama3)
    texts = ["def f(x): return x + 1\n" * 9, "", "the cat"]
    found = ours.loglikelihood_rolling(
        instances("loglikelihood_rolling", [(text,) for text in texts]), disable_tqdm=True
    )
    for text, total in zip(texts, found, strict=True):
        ids = llama3.encode(text)
        expected = 0.0
        for start in range(0, len(ids), MAX_LENGTH):
            window = ids[start : start + MAX_LENGTH]
            # After bos; then after the token before it; the last one after all that fits.
            before = [llama3.bos_id, *ids[:start]][start + len(window) - MAX_LENGTH :]
            expected += oracle(before if start else [llama3.bos_id], window)[0]
        assert total == pytest.approx(expected, abs=5e-4)
    assert len(llama3.encode(texts[0])) > 2 * MAX_LENGTH and found[1] == 0


# All tests generate with one shape: the longest prompt decides, and is in each of them.
LONGEST = "the cat sat on a mat, the rat ran"
PROMPTS = ["def f(x)", LONGEST, "x", "caf\u00e9 \u6f22"]


NEW = 12


def engine_says(tokenizer, prompt, *stop_ids):
    run = loaded()
    engine = Engine(
        run.model,
        run.params,
        run.router,
        max_length=length_bucket(len(tokenizer.encode(LONGEST)) + 1 + NEW),
        valid_vocab=tokenizer.vocab_size,
    )
    key = jax.random.key(0)
    return engine.generate([prompt] * 3, GREEDY, max_new_tokens=NEW, key=key, stop_ids=stop_ids)[0]


@pytest.mark.slow
def test_generation_is_greedy_and_cut_at_what_ends_it(llama3):
    ours = adapter(llama3)

    def say(until, prompts=PROMPTS):
        asked = [(prompt, {"until": until, "max_gen_toks": NEW}) for prompt in prompts]
        return ours.generate_until(instances("generate_until", asked), disable_tqdm=True)

    whole = say([])
    for prompt, text in zip(PROMPTS, whole, strict=True):
        ids = engine_says(llama3, ours.encode_context(prompt), llama3.eos_id)
        assert text == llama3.decode(ids)
    assert len(set(whole)) == len(PROMPTS)
    # Other neighbours in the batch.
    assert say([], [*PROMPTS[::-1], LONGEST, LONGEST])[:4] == whole[::-1]
    # A string over several tokens ends every answer that has it, before it.
    end = whole[0][3:6]
    assert say([end, ""]) == [text.split(end)[0] for text in whole]
    assert say(end) == say([end])


@pytest.mark.slow
def test_an_answer_ends_with_any_token_that_ends_a_text(llama3):
    made = engine_says(llama3, adapter(llama3).encode_context(LONGEST))
    stop = made[4]
    ended = dataclasses.replace(llama3, stop_ids=(*llama3.stop_ids, stop))
    asked = instances("generate_until", [(LONGEST, {"max_gen_toks": NEW})])
    assert adapter(ended).generate_until(asked, True) == [llama3.decode(made[: made.index(stop)])]


@pytest.mark.slow
def test_sampling_depends_on_the_seed_alone(llama3):
    def say(seed):
        asked = [(LONGEST, {"do_sample": True, "max_gen_toks": NEW})] * 4
        return adapter(llama3, seed=seed).generate_until(instances("generate_until", asked), True)

    assert say(0) == say(0) != say(1)
    assert len(set(say(0))) > 1


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, Generation(GREEDY, 9, ())),
        ({"until": "\n", "temperature": 0.0}, Generation(GREEDY, 9, ("\n",))),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, Generation(GREEDY, 9, ())),
        ({"temperature": 0.7, "top_k": 5}, Generation(Sampling(0.7, 5), 9, ())),
        ({"do_sample": True, "top_p": 0.9}, Generation(Sampling(1.0, 0, 0.9), 9, ())),
        ({"do_sample": True, "temperature": 0.0}, Generation(GREEDY, 9, ())),
        ({"max_new_tokens": 3, "num_beams": 1}, Generation(GREEDY, 3, ())),
        (
            {"max_gen_toks": 4, "max_tokens": 3, "until": ["a", "b"]},
            Generation(GREEDY, 4, ("a", "b")),
        ),
    ],
)
def test_generation_kwargs(kwargs, expected):
    assert Generation.parse(kwargs, 9) == expected


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs = {'num_beams': 4}"),
        ({"repetition_penalty": 1.1}, "generation_kwargs = {'repetition_penalty': 1.1}"),
        ({"temperature": -1}, "temperature = -1: must be a finite number in [0, inf]"),
        ({"until": [3]}, "generation_kwargs: until = [3]: must be a string"),
        ({"top_k": "5"}, "generation_kwargs: top_k = '5': must be a whole number"),
        ({"max_gen_toks": True}, "max_gen_toks = True: must be a whole number"),
        ({"max_gen_toks": MAX_LENGTH}, f"max_gen_toks = {MAX_LENGTH}: must be below max_length"),
    ],
)
def test_what_we_cannot_do_is_refused(kwargs, message):
    asked = instances("generate_until", [("x", kwargs)])
    with pytest.raises(UserError, match=re.escape(message)):
        adapter(ByteTokenizer()).generate_until(asked, True)


def test_the_stage_of_the_checkpoint_gives_the_length():
    assert adapter(ByteTokenizer(), max_length=None).max_length == 32
    assert adapter(ByteTokenizer(), max_length=None).batch_size == 3


def test_bytes_of_texts_that_the_tokenizer_changes_are_counted(tmp_path, monkeypatch):
    # Case D12
    path = hf_vocabularies.write_kind(tmp_path / "t.json", "unigram")
    ours = adapter(load_tokenizer(str(path)))
    monkeypatch.setattr(ours, "_scored", lambda pairs, disable_tqdm: [(0.0, True)] * len(pairs))
    asked = instances("loglikelihood_rolling", [("the cat",), ("The dog",)])
    for request, task in zip(asked, ("kept", "changed"), strict=True):
        request.task_name = task
    ours.loglikelihood_rolling(asked, True)
    assert ours.lost_bytes == {"kept": (0, 7), "changed": (7, 7)}
    results, groups = (
        {
            name: {"bits_per_byte,none": 0.1, "word_perplexity_stderr,none": 2.0, "acc,none": 1.0}
            for name in names
        }
        for names in (("kept", "changed"), ("all", "some"))
    )
    inside = {"all": ["some"], "some": ["kept", "changed"]}
    without_lost({"results": results, "groups": groups}, ours.lost_bytes, inside)
    for row in groups.values():
        assert row["bits_per_byte,none"] is None and "50.0%" in row["no_bits_per_byte"]
    assert (
        results["kept"]["bits_per_byte,none"] == 0.1 and "no_bits_per_byte" not in results["kept"]
    )
    assert results["changed"] == {
        "bits_per_byte,none": None,
        "word_perplexity_stderr,none": None,
        "acc,none": 1.0,
        "no_bits_per_byte": "no bits/byte: the tokenizer changes texts with 100.0% of the bytes",
    }


CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


def test_chat_templates(folders, llama3, caplog):
    qwen = adapter(load_tokenizer(str(folders / "qwen")))
    text = qwen.apply_chat_template(CHAT)
    assert text.endswith("hi<|im_end|>\n<|im_start|>assistant\n")
    opened = [*CHAT, {"role": "assistant", "content": "Well"}]
    assert qwen.apply_chat_template(opened, add_generation_prompt=False) == text + "Well"
    specials = load_tokenizer(str(folders / "qwen")).specials
    assert qwen.encode_context(text).count(specials["<|im_start|>"]) == 3
    assert qwen.chat_template(True) == hf_folders.CHATML and qwen.chat_template(False) is None
    with pytest.raises(UserError, match="chat template 'rag'"):
        qwen.chat_template("rag")

    # A template that writes bos itself, and refuses system messages.
    other = adapter(llama3)
    assert not caplog.messages
    text = other.apply_chat_template(CHAT)
    assert "system message is left out" in caplog.text and "be kind" not in text
    assert other.encode_context(text)[:2] == [llama3.bos_id, *llama3.encode("[")]
    with pytest.raises(UserError, match="roles must be"):
        other.apply_chat_template([{"role": "tool", "content": "x"}])
    assert other.tokenizer_name != qwen.tokenizer_name == qwen.tokenizer_name

    plain = adapter(ByteTokenizer())
    for ask in (lambda: plain.apply_chat_template(CHAT), lambda: plain.chat_template(True)):
        with pytest.raises(UserError, match="has no chat template"):
            ask()


@pytest.mark.slow
def test_numbers_are_those_of_the_harness_itself(llama3, folders, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the harness's adapter for transformers needs it")
    from lm_eval.models.huggingface import HFLM

    from lightning_jax.interop import hf

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ids = dict(
        vocab_size=llama3.vocab_size,
        bos_token_id=llama3.bos_id,
        eos_token_id=llama3.eos_id,
        pad_token_id=0,
    )
    config = transformers.LlamaConfig(
        **shape, **ids, num_key_value_heads=2, initializer_range=0.35, attn_implementation="eager"
    )
    model = transformers.LlamaForCausalLM(config).float().eval()
    model.save_pretrained(tmp_path)
    read = hf.load(tmp_path)
    run = dataclasses.replace(loaded().config, model=read.config)
    base = read.config.attention.rope_base_global
    meta = dataclasses.replace(loaded().meta, config=run, rope_base_global=base)
    ours = LightningAdapter(
        LoadedRun(meta, read.params, read.router),
        llama3,
        max_length=MAX_LENGTH,
        batch_size=3,
    )
    theirs = HFLM(
        pretrained=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(str(folders / "llama3")),
        max_length=MAX_LENGTH,
        batch_size=3,
        device="cpu",
    )
    pairs = instances("loglikelihood", [pair for pair in PAIRS if pair[0].strip() or not pair[0]])
    for mine, yours in zip(
        ours.loglikelihood(pairs, True), theirs.loglikelihood(pairs, True), strict=True
    ):
        assert mine == (pytest.approx(yours[0], abs=1e-4), bool(yours[1]))
    asked = [(prompt, {"until": ["e"], "max_gen_toks": NEW}) for prompt in PROMPTS]
    generations = instances("generate_until", asked)
    assert ours.generate_until(generations, True) == theirs.generate_until(generations, True)
    # Their rolling texts would predict their own bos. No text here repeats itself: they take two
    # windows of the same tokens for one, wherever it begins to be scored.
    theirs.add_bos_token = False
    text = " ".join(str(number**3) for number in range(30))
    rolling = instances("loglikelihood_rolling", [(text,), ("x",)])
    found = ours.loglikelihood_rolling(rolling, True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(rolling, True), abs=5e-4)
