"""The object that a trained run is, against the model's own forward pass."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import lightning_jax
from lightning_jax import model as lm
from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config import CheckpointMeta
from lightning_jax.config.errors import UserError
from lightning_jax.data.tokenizer import ByteTokenizer
from lightning_jax.infer.run import Run
from lightning_jax.train import loop
from tests import tiny

TEXT = "def \u6f22 return"


def _run(**changes):
    config = tiny.tiny_run("unread", model__vocab_size=272, **changes)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(np.float32),
        lm.abstract_params(config.model),
    )
    position = dict(step=3, tokens=0, stage="stable", seq_len=32, rope_base_global=100.0)
    loaded = LoadedRun(CheckpointMeta(config, **position), params, lm.init_router(config.model))
    return Run(loaded, ByteTokenizer())


@pytest.fixture(scope="module")
def run():
    return _run()


@pytest.fixture(scope="module")
def plain(run):
    """The model's own output on the ids of `TEXT`, all at once and without padding."""
    ids = np.asarray([run.encode(TEXT)], np.int32)
    model = lm.LightningLM(run.model)
    return ids[0], model.apply({"params": run.params}, ids, router=run.router)


def test_logits_are_those_of_one_forward_pass(run, plain):
    ids, output = plain
    logits_TV = run.logits(TEXT)
    assert logits_TV.shape == (len(ids), run.model.vocab_size) and logits_TV.dtype == np.float32
    np.testing.assert_allclose(logits_TV, output.logits()[0], atol=1e-5)


def test_losses_are_those_of_the_next_tokens(run):
    logits_TV = run.logits(TEXT).astype(np.float64)[:-1]
    ids = run.encode(TEXT)[1:]
    expected = np.log(np.exp(logits_TV).sum(-1)) - logits_TV[np.arange(len(ids)), ids]
    np.testing.assert_allclose(run.token_losses(TEXT), expected, atol=1e-5)


def test_routing_counts_the_experts_that_the_statistics_count(run, plain):
    ids, output = plain
    found = run.routing(TEXT)
    assert "".join(found.pieces) == TEXT and len(found.pieces) == len(ids)
    assert found.layers == (0, 1) and found.count_RT.shape == (2, len(ids))
    assigned_RE = np.asarray(output.stats.assigned_count_E).reshape(2, -1)
    np.testing.assert_array_equal(found.load_RE, assigned_RE)
    assert found.experts_per_token == assigned_RE.sum() / (2 * len(ids))


def test_every_token_takes_all_it_may_at_p_1_and_one_at_a_tiny_p(run):
    assert (run.with_top_p(1.0).routing(TEXT).count_RT == run.model.moe.max_experts).all()
    assert (run.with_top_p(1e-6).routing(TEXT).count_RT == 1).all()
    with pytest.raises(UserError, match=r"top_p = 0: must be in \(0, 1\]"):
        run.with_top_p(0)


def test_a_longer_text_begins_with_the_same_logits(run):
    longer = run.logits(TEXT + " yield" * 10)
    np.testing.assert_allclose(longer[: len(run.encode(TEXT))], run.logits(TEXT), atol=1e-5)


def test_the_same_seed_writes_the_same_text(run):
    texts = [run.generate("def ", max_new_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_without_experts_has_no_routing():
    run = _run(model__moe__num_experts=0)
    assert np.isfinite(run.logits("def ")).all()
    with pytest.raises(UserError, match="num_experts = 0: must be above 0"):
        run.routing("def ")


def test_a_score_is_over_all_tokens_of_all_texts(run):
    texts = [TEXT, "ab"]
    nats = sum(run.token_losses(text).sum() for text in texts)
    counts = np.concatenate([run.routing(text).count_RT for text in texts], axis=1)
    score = run.score(texts)
    # A token is a byte, and each text is predicted from its bos on.
    assert score.tokens == sum(len(text.encode()) for text in texts)
    assert score.bits_per_byte == pytest.approx(nats / np.log(2) / score.tokens)
    assert score.experts_per_token == pytest.approx(counts.mean())
    with pytest.raises(UserError, match="texts"):
        run.score([])


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_a_run_comes_back_from_its_folder(tmp_path):
    loop.run(tiny.tiny_run(tiny.write_corpus(tmp_path / "data")), tmp_path / "run")
    run = lightning_jax.load_run(tmp_path / "run")
    assert (run.step, run.tokenizer) == (10, ByteTokenizer())
    # The last stage's RoPE base, not the config's before any stage.
    assert run.model.attention.rope_base_global == 50_000.0
    early = lightning_jax.load_run(tmp_path / "run", step=6)
    assert early.step == 6 and early.token_losses(TEXT).mean() != run.token_losses(TEXT).mean()
    held_out = list(run.held_out("a"))
    assert held_out and set(" ".join(held_out).split()) <= set(tiny.WORDS)
    with pytest.raises(UserError, match="source = 'c'"):
        run.held_out("c")
