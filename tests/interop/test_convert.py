"""Folders of Hugging Face become runs that evaluate and train on, and runs become such folders."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import imported
from lightning_jax import model as lm
from lightning_jax.checkpoint import load_run
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.interop import convert, hf
from lightning_jax.interop.upcycle_run import upcycle_run
from lightning_jax.train import loop
from lightning_jax.train.evaluation import EvalOptions, evaluate_run
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.plan import Plan
from tests.tiny import tiny_model, tiny_run, write_corpus

VOCAB = 272


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, a dense model in a Hugging Face folder, and its parameters."""
    folder = tmp_path_factory.mktemp("convert")
    corpus = write_corpus(folder / "text")
    model = tiny_model(VOCAB, unit="G", num_units=2, moe__num_experts=0, attention__qk_norm="none")
    params = lm.init_params(model, jax.random.key(3))
    assert hf.save(folder / "hf", model, params) == "llama"
    return folder, corpus, params


def run_config(home):
    """A tiny run of the folder's model."""
    folder, corpus, _ = home
    return dataclasses.replace(tiny_run(corpus), model=convert.describe(folder / "hf")[0])


@pytest.mark.slow
def test_from_hugging_face_to_training_and_back(home, tmp_path):
    folder, _, params = home
    config = run_config(home)
    summary = convert.from_hugging_face(folder / "hf", tmp_path / "run", config)
    assert summary["model_type"] == "llama" and summary["layers"] == "GG"
    run = load_run(tmp_path / "run")
    assert run.meta.step == 0
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    before = evaluate_run(str(tmp_path / "run"), EvalOptions(max_tokens=256))["domains"]["a"][
        "loss"
    ]

    back = convert.to_hugging_face(tmp_path / "run", tmp_path / "back")
    assert back["model_type"] == "llama" and back["step"] == 0
    assert back["weights"] == "params"
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "back").params, params)

    assert convert.describe(tmp_path / "run")[0] == config.model
    loop.run(config, tmp_path / "run")
    first = next(row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    # A fresh model would start elsewhere: its loss is near log(vocabulary).
    assert abs(first["loss"] - before) < 0.5
    assert load_run(tmp_path / "run").meta.step == Plan.of(config).total_steps
    with pytest.raises(UserError, match="has checkpoints already"):
        convert.from_hugging_face(folder / "hf", tmp_path / "run", config)


def test_another_model_does_not_begin_with_these_weights(home, tmp_path):
    folder, corpus, _ = home
    convert.from_hugging_face(folder / "hf", tmp_path, run_config(home))
    with pytest.raises(UserError, match="model.vocab_size = 272|model.unit = 'LG'"):
        loop.run(tiny_run(corpus), tmp_path)


def test_the_config_of_a_folder(home, tmp_path):
    folder, _, _ = home
    config = build(RunConfig, imported.get_config(str(folder / "hf")))
    assert config.model.unit == "G" and config.model.num_units == 2
    convert.from_hugging_face(folder / "hf", tmp_path, run_config(home))
    assert build(RunConfig, imported.get_config(str(tmp_path))).model == config.model
    with pytest.raises(UserError, match="imported.py:FOLDER"):
        imported.get_config()
    with pytest.raises(UserError, match="no such file"):
        imported.get_config(str(tmp_path / "nothing"))


def test_bfloat16_files_are_half_as_large(home, tmp_path):
    folder, _, _ = home
    convert.from_hugging_face(folder / "hf", tmp_path / "run", run_config(home))
    convert.to_hugging_face(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    sizes = [
        (path / "model.safetensors").stat().st_size for path in (folder / "hf", tmp_path / "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    with pytest.raises(UserError, match="not the folder of a run"):
        convert.to_hugging_face(tmp_path / "half", tmp_path / "x")


@pytest.mark.slow
def test_upcycling_prints_the_loss_of_both(home, tmp_path):
    folder, corpus, _ = home
    config = tiny_run(
        corpus,
        model__unit="G",
        model__num_units=2,
        model__attention__qk_norm="none",
        model__moe__num_experts=6,
        model__moe__num_groups=1,
        model__moe__top_k=3,
        model__moe__max_experts=3,
        model__moe__num_shared_experts=0,
        model__moe__target_experts=0.0,
        model__moe__train_routing="top_k",
        model__moe__eval_routing="top_k",
        model__moe__renormalize_gates=True,
    )
    result = upcycle_run(folder / "hf", tmp_path / "up", config, eval_tokens=512)
    assert result["exact"]
    assert set(result["loss"]) == {"a", "b"}
    for row in result["loss"].values():
        assert abs(row["jump"]) < 1e-4 and row["before"] > 3
    origin = json.loads((tmp_path / "up" / "run.json").read_text())["origin"]
    assert origin["pool"] == "mean"
    loop.run(config, tmp_path / "up")
    first = next(row for row in read_rows(tmp_path / "up" / "metrics.jsonl") if "loss" in row)
    assert abs(first["loss"] - result["loss"]["a"]["after"]) < 0.5
