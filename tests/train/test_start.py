"""Weights from elsewhere make a folder that loads and evaluates, and where training begins."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.checkpoint import load_run, read_meta
from lightning_jax.config.errors import UserError
from lightning_jax.train.plan import Plan
from lightning_jax.train.start import write_start
from tests.tiny import tiny_run

CONFIG = tiny_run("corpus.jsonl", model__vocab_size=272, model__moe__bias_update_rate=0.1)
ORIGIN = {"path": "elsewhere"}


@pytest.fixture(scope="module")
def weights():
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype),
        lm.abstract_params(CONFIG.model),
    )
    router = lm.init_router(CONFIG.model)
    return params, dataclasses.replace(router, top_p=np.float32(0.75))


def test_the_folder_holds_the_weights_as_checkpoint_0(weights, tmp_path):
    write_start(tmp_path / "run", CONFIG, *weights, origin=ORIGIN)
    run = load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, (run.params, run.router), weights)
    assert read_meta(tmp_path / "run") == run.meta == Plan.of(CONFIG).meta(0)
    assert (run.meta.step, run.meta.tokens, run.meta.stage) == (0, 0, "stable")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["origin"] == ORIGIN
    with pytest.raises(UserError, match="has checkpoints already; give the weights another one"):
        write_start(tmp_path / "run", CONFIG, *weights, origin=ORIGIN)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(weights, tmp_path):
    model = dataclasses.replace(CONFIG.model, vocab_size=256)
    config = dataclasses.replace(CONFIG, model=model)
    with pytest.raises(UserError, match="model.vocab_size = 256: the tokenizer has 258 ids"):
        write_start(tmp_path, config, *weights, origin=ORIGIN)


def test_a_folder_that_cannot_be_written_is_one_line(weights, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="workdir = .*cannot be written"):
        write_start(tmp_path / "file", CONFIG, *weights, origin=ORIGIN)
