"""A whole run whose vocabulary, heads and MLP two devices share: trains, evaluates, samples."""

import dataclasses

import jax
import numpy as np
import pytest

from lightning_jax import sharding
from lightning_jax.infer.text import sample
from lightning_jax.train import loop
from lightning_jax.train.metrics import read_rows
from tests.tiny import tiny_run, write_corpus


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_two_devices_that_share_every_layer_train_evaluate_and_sample_as_one(tmp_path, monkeypatch):
    corpus, make_mesh, runs = write_corpus(tmp_path), sharding.make_mesh, []
    for tensor in (1, 2):
        monkeypatch.setattr(
            sharding,
            "make_mesh",
            lambda config, devices=None, n=tensor: make_mesh(config, jax.devices()[:n]),
        )
        config = tiny_run(
            corpus,
            model__unit="G",
            model__num_units=1,
            model__moe__num_experts=0,
            model__vocab_size=0,
            data__tokenizer="bytes",
            mesh__tensor=tensor,
            sample_tokens=6,
            eval_every=2,
        )
        stage = dataclasses.replace(config.stages[0], tokens=4 * 32 * 3, learning_rate=0.01)
        texts = []

        def keep(*given, texts=texts):
            texts.append(sample(*given))
            return texts[-1]

        workdir = tmp_path / str(tensor)
        results = loop.run(dataclasses.replace(config, stages=(stage,)), workdir, sampler=keep)
        losses = [row["loss"] for row in read_rows(workdir / "metrics.jsonl") if "loss" in row]
        runs.append((texts, losses, results["a"]["loss"], results["a"]["tokens"]))
    (texts, *expected), (same, *found) = runs
    assert same == texts and len(texts) >= 1
    assert found[2] == expected[2] > 0 and len(found[0]) == 3
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)
