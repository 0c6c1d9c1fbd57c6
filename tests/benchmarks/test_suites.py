"""Every suite on tiny shapes: its rows are complete and can be written as JSON. No timing here."""

import dataclasses
import json

import pytest

from benchmarks import attention, data, moe, startup, tpu_program, train
from benchmarks.measure import Options
from lightning_jax.config.errors import UserError
from lightning_jax.train.plan import Plan
from tests.tiny import tiny_run, write_corpus

ONCE = Options(rounds=1)


@pytest.fixture
def no_peers(monkeypatch):
    for suite in (attention, moe, train, startup):
        monkeypatch.setattr(suite, "peer", lambda name: None)


def by_name(rows):
    assert json.loads(json.dumps(rows)) == rows
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    return {row["name"]: row for row in rows}


def test_attention(monkeypatch, no_peers):
    for name, value in (("LENGTH", 64), ("LONG", 128), ("WINDOW", 16), ("HEAD_DIM", 8)):
        monkeypatch.setattr(attention, name, value)
    only = ("forward_float32_64_16", "growth_forward_64")
    rows = by_name(attention.run(dataclasses.replace(ONCE, only=only)))
    assert set(rows) == {"forward_float32_64_16", "growth_forward_64_128"}
    row = rows["forward_float32_64_16"]
    assert row["vs_jax"] > 0 and row["of_peak"] > 0 and row["temp_mb"] > 0
    assert "torch is not installed" in row["note"]


def test_flops_of_attention_count_visible_pairs():
    pairs = 1 + 2 + 3 + 3
    heads = attention.QUERY_HEADS * attention.HEAD_DIM
    assert attention.useful_flops(4, 3, "forward") == 2 * 2 * heads * pairs
    assert attention.useful_flops(4, None, "forward+backward") == 2 * 7 * heads * 10


@pytest.fixture
def small_moe(monkeypatch):
    sizes = {"TOKENS": 32, "MODEL_DIM": 16, "EXPERT_DIM": 8, "DECODE_TOKENS": (2,)}
    for name, value in sizes.items():
        monkeypatch.setattr(moe, name, value)


@pytest.mark.slow
def test_moe(small_moe, no_peers):
    only = ("forward_bfloat16_2_", "forward_float32_2_", "top_p_forward")
    rows = by_name(moe.run(dataclasses.replace(ONCE, only=only)))
    assert rows["forward_bfloat16_2_tokens"]["ours_ms"] > 0
    assert 3.5 < rows["top_p_forward"]["experts_a_token"] < 4.5
    assert "not installed" in rows["forward_float32_2_tokens"]["note"]


@pytest.mark.slow
def test_the_blocks_of_transformers_compute_what_ours_do(small_moe):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from benchmarks.peers import torch_moe_calls

    arrays = moe._arrays(32, 8, "float32")
    ours = moe._compiled("forward", arrays, choices=2)(*arrays)
    for call in torch_moe_calls("forward", arrays, choices=2, batched=True).values():
        difference = call()[0] - torch.from_numpy(ours.__array__().copy())
        assert difference.abs().max() < 1e-5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_run(write_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.mark.slow
def test_train(config, no_peers):
    rows = by_name(train.run(dataclasses.replace(ONCE, config=config, only=("float32",))))
    row = rows["step_float32"]
    assert row["ours_tokens_s"] > 0 and row["tokens"] == 4 * 32 and "not installed" in row["note"]


def test_suites_of_a_run_want_its_config():
    for suite in (train, startup):
        with pytest.raises(UserError, match="--config is missing"):
            suite.run(ONCE)


def test_startup_takes_one_step_of_the_first_stage(config):
    one = startup.one_step(config)
    assert Plan.of(one).total_steps == 1 and one.log_every == 1 and len(one.stages) == 1
    assert one.model == config.model


@pytest.mark.slow
def test_startup_waits_for_the_first_line_of_metrics(config, tmp_path, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")  # Of these tests: a batch of this size needs few devices.
    (tmp_path / "config.json").write_text(startup.as_json(startup.one_step(config)))
    assert startup.seconds_to_first_step(tmp_path, "cold") > 0
    assert (tmp_path / "jax_compilation_cache_dir").is_dir()


def test_startup_reports_a_run_that_fails(config, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="ended before its first step"):
        startup.seconds_to_first_step(tmp_path, "cold")


@pytest.mark.slow
def test_data(monkeypatch):
    monkeypatch.setattr(data, "SIZES_MB", (0.2, 1))
    row = by_name(data.run(dataclasses.replace(ONCE, only=("start_0.2_",))))["start_0.2_mb"]
    assert 10 < row["documents"] < 1000
    assert min(row["first_peak_mb"], row["second_peak_mb"]) >= row["imports_mb"] > 0
    assert min(row["first_s"], row["second_s"], row["first_cpu_s"], row["second_cpu_s"]) > 0


def test_the_sizes_of_tpu_programs_are_of_distinct_runs(monkeypatch):
    monkeypatch.setattr(tpu_program.slices, "versions", lambda: {"libtpu": "1"})
    monkeypatch.setattr(tpu_program, "measure", lambda name: {"name": name, "program_mb": 1.0})
    rows = by_name(tpu_program.run(dataclasses.replace(ONCE, only=("LLL_",))))
    assert set(rows) == {"LLL_dense_none_both", "LLL_experts_none_both"}
    assert rows["LLL_dense_none_both"]["libtpu"] == "1"
    for name in tpu_program.names():
        unit, mlp, remat, variant = name.split("_")
        config = tpu_program.run_config(unit, mlp, remat)
        assert config.model.unit == unit and config.model.remat == remat
        assert config.model.moe.num_experts == (16 if mlp == "experts" else 0)
        assert variant in tpu_program.VARIANTS


def test_a_tpu_program_that_does_not_compile_is_named_with_its_reason():
    with pytest.raises(UserError, match="LLL_dense_none_nothing: KeyError: 'nothing'"):
        tpu_program.measure("LLL_dense_none_nothing")
