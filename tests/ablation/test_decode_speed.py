"""Decoding speed is measured for each arm that has a finished run."""

import json

import pytest

from lightning_jax.ablation import decode_speed
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep
from tests.infer.random_run import save_run
from tests.tiny import tiny_config, write_corpus

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
def test_arms_with_a_finished_run_are_measured(tmp_path):
    corpus = write_corpus(tmp_path / "text", 300)
    base = tiny_config(model__vocab_size=272, model__moe__num_experts=0, model__num_units=1)
    for source in base.data.sources.values():
        source.path = corpus
    sweep = small_sweep(base=base)
    for run in (Run("full", 1), Run("shared", 0)):
        save_run(run.folder(tmp_path), sweep.config(run))
    with pytest.raises(UserError, match="no run of the sweep has finished"):
        decode_speed.measure(sweep, tmp_path)
    (Run("full", 1).folder(tmp_path) / "evaluation.json").write_text("{}")
    found = decode_speed.measure(sweep, tmp_path, context=40, rounds=2)
    assert json.loads((tmp_path / "decode.json").read_text()) == found
    assert [*found] == ["full"]
    row = found["full"]
    assert row["tokens_per_second"] > 0 and row["prefill_seconds"] > 0
    assert (row["seed"], row["context"], row["rounds"]) == (1, 40, 2)
    assert row["experts_per_token"] is None


@pytest.mark.parametrize("numbers", [{"context": 0}, {"rounds": 0}])
def test_numbers_below_one_are_refused(tmp_path, numbers):
    with pytest.raises(UserError, match="= 0: must be at least 1"):
        decode_speed.measure(small_sweep(), tmp_path, **numbers)
