"""The object that a trained run is, and how its folder becomes one."""

from __future__ import annotations

import pytest

import lightning_jax
from lightning_jax.config.errors import UserError
from lightning_jax.data.tokenizer import ByteTokenizer
from lightning_jax.train import loop
from tests import tiny
from tests.infer.random_run import random_run

TEXT = "def \u6f22 return"


def test_every_token_takes_all_it_may_at_p_1_and_one_at_a_tiny_p():
    run = random_run()
    assert (run.with_top_p(1.0).routing(TEXT).count_RT == run.model.moe.max_experts).all()
    assert (run.with_top_p(1e-6).routing(TEXT).count_RT == 1).all()
    with pytest.raises(UserError, match=r"top_p = 0: must be in \(0, 1\]"):
        run.with_top_p(0)


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
