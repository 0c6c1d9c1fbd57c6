"""A sweep runs each arm with each seed once, whatever happens in between."""

import json
import logging
from pathlib import Path

import pytest

from lightning_jax.ablation import report
from lightning_jax.ablation import sweep as sweeps
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.train.workdir import claim
from tests.ablation.fake_runs import small_sweep, write_rows, write_run
from tests.tiny import tiny_run, write_corpus

SWEEPS = Path(__file__).resolve().parents[2] / "configs" / "sweeps"


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; returns the (arm folder, seed) of the calls and what they should do."""
    calls, faults = [], {}

    def fake(config, workdir, **_):
        name = f"{workdir.parent.name} seed {config.seed}"
        calls.append(name)
        if name in faults:
            raise faults[name]
        return write_run(config, workdir, code=2 + config.seed / 10)

    monkeypatch.setattr(sweeps.loop, "run", fake)
    return calls, faults


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_every_arm_and_seed_once_with_the_arms_config(tmp_path, trained, caplog):
    caplog.set_level(logging.INFO)
    sweep = small_sweep()
    rows, failures = sweeps.run_sweep(sweep, tmp_path)
    assert trained[0][:4] == ["full seed 0", "shared seed 0", "hybrid seed 0", "full seed 1"]
    assert len(trained[0]) == 9 and not failures
    assert "run 4 of 9: full seed 1" in caplog.text
    recorded = json.loads((tmp_path / "shared" / "seed_1" / "config.json").read_text())
    assert recorded["model"]["unit"] == "Gg" and recorded["seed"] == 1
    assert lines(tmp_path / "results.jsonl") == rows
    table = (tmp_path / "results.csv").read_text().splitlines()
    assert len(table) == 10 and "domains/code/bits_per_byte" in table[0]


def test_finished_runs_are_skipped_and_the_half_done_one_is_called_again(tmp_path, trained):
    sweep = small_sweep()
    sweeps.run_sweep(sweep, tmp_path, only=["full"], seeds=[0, 1])
    (tmp_path / "full" / "seed_1" / "evaluation.json").unlink()
    trained[0].clear()
    rows, _ = sweeps.run_sweep(sweep, tmp_path, only=["full"])
    assert trained[0] == ["full seed 1", "full seed 2"]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    trained[0].clear()
    sweeps.run_sweep(sweep, tmp_path, only=["shared"], seeds=[2])
    assert trained[0] == ["shared seed 2"]
    assert len(lines(tmp_path / "results.jsonl")) == 4


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path, trained):
    calls, faults = trained
    faults["shared seed 0"] = UserError("loss is not finite at step 3")
    rows, failures = sweeps.run_sweep(small_sweep(), tmp_path)
    assert failures == {"shared seed 0": "loss is not finite at step 3"}
    assert len(calls) == 9 and len(rows) == 8
    note = tmp_path / "shared" / "seed_0" / "failure.txt"
    assert note.read_text() == "loss is not finite at step 3\n"
    faults.clear()
    rows, failures = sweeps.run_sweep(small_sweep(), tmp_path)
    assert calls[9:] == ["shared seed 0"] and len(rows) == 9 and not failures
    assert not note.exists()


@pytest.mark.parametrize("fault", [SystemExit(143), RuntimeError("a fault of ours")])
def test_a_stop_or_a_fault_of_ours_ends_the_sweep(tmp_path, trained, fault):
    trained[1]["shared seed 0"] = fault
    with pytest.raises(type(fault)):
        sweeps.run_sweep(small_sweep(), tmp_path)
    assert trained[0] == ["full seed 0", "shared seed 0"]
    assert len(lines(tmp_path / "results.jsonl")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arms={"full": {"model.unit": "G"}}), r"model.unit = 'G': full seed 0 .* has 'GG'"),
        (dict(seeds=(1, 2)), r"seeds = \(1, 2\): .* 'full/seed_0', which is not in it"),
        (dict(arms={"other": {}}, baseline="other"), r"arms = \['other'\]: .* 'full/seed_0'"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(tmp_path, trained, changes, message):
    sweeps.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(UserError, match=message):
        sweeps.run_sweep(small_sweep(**changes), tmp_path)
    assert len(trained[0]) == 1
    assert (tmp_path / "sweep.json").read_text() == before


# Case A2, of a sweep: its folder is locked as those of its runs are.
def test_a_sweep_in_use_is_left_as_it_is(tmp_path, trained):
    root = tmp_path / "new" / "sweep"
    with claim(root):
        with pytest.raises(UserError, match="workdir = '.*': in use by process"):
            sweeps.run_sweep(small_sweep(), root)
        assert not trained[0] and [path.name for path in root.iterdir()] == ["lock"]
    assert not (tmp_path / "new").exists()
    sweeps.run_sweep(small_sweep(), root, only=["full"], seeds=[0])
    assert not (root / "lock").exists()


# Case A13
def test_a_refused_sweep_leaves_no_trace(tmp_path, trained):
    with pytest.raises(UserError, match="only = 'none'"):
        sweeps.run_sweep(small_sweep(), tmp_path / "new" / "sweep", only=["none"])
    assert not list(tmp_path.iterdir())


def test_more_arms_seeds_and_another_baseline_extend_a_folder(tmp_path, trained):
    sweeps.run_sweep(small_sweep(seeds=(0,)), tmp_path)
    arms = {**small_sweep().arms, "local": {"model.unit": "LL"}}
    sweeps.run_sweep(small_sweep(seeds=(0, 1), arms=arms, baseline="local"), tmp_path)
    assert trained[0][3:] == ["local seed 0"] + [f"{arm} seed 1" for arm in arms]


def test_the_order_of_stages_is_part_of_a_run(tmp_path, trained):
    sweeps.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    base = small_sweep().base
    turned = {**base, "stages": dict(reversed(base["stages"].items()))}
    with pytest.raises(UserError, match="stages = "):
        sweeps.run_sweep(small_sweep(base=turned), tmp_path)


def test_half_done_and_strange_files_in_the_folder_do_no_harm(tmp_path, trained):
    write_rows(tmp_path / "full" / "seed_0", 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "full" / "plot.png").write_bytes(b"")
    sweeps.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    assert trained[0] == ["full seed 0"]


def test_sweep_json_gives_the_same_sweep_back(tmp_path, trained):
    sweep = small_sweep()
    sweeps.run_sweep(sweep, tmp_path, only=["full"], seeds=[0])
    again = sweeps.build_sweep(json.loads((tmp_path / "sweep.json").read_text()))
    assert again == sweep
    assert list(again.base["stages"]) == ["stable", "decay"] and list(again.arms) == list(
        sweep.arms
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arms={"full": {"model.unti": "G"}}), 'field model.unti: .*did you mean "unit"'),
        (dict(arms={"full": {"model.unit.x": "G"}}), "model.unit has no fields"),
        (dict(arms={"full": {"model.unit": "l"}}), "arm 'full': model.unit = 'l'"),
        (dict(arms={"full": {"model.unit": 3}}), "arm 'full': model.unit = 3"),
        (dict(arms={"full": {"seed": 3}}), "seed cannot be changed"),
        (dict(arms={"full": "G"}), "arms.full = 'G'"),
        (dict(arms={"a/b": {}}, baseline="a/b"), "arms = 'a/b'"),
        (dict(arms={"full": {}, "Full": {}}), "different without case"),
        (dict(arms={}), "at least one arm"),
        (dict(baseline="ful"), 'baseline = .ful.: .*did you mean "full"'),
        (dict(seeds=()), r"seeds = \(\)"),
        (dict(seeds=(0, 0)), "different numbers"),
        (dict(seeds=(0, True)), "one or more numbers"),
        (dict(seeds=3), "seeds = 3: must be a list"),
        (dict(question=" "), "question = ' '"),
        (dict(bse={}), 'unknown sweep field bse: .*did you mean "base"'),
    ],
)
def test_a_bad_sweep_is_refused_with_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        small_sweep(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [(dict(only=["ful"]), 'did you mean "full"'), (dict(seeds=[7]), "seeds = 7: must be one of 0")],
)
def test_a_selection_that_is_not_in_the_sweep_is_refused(chosen, message):
    with pytest.raises(UserError, match=message):
        small_sweep().runs(**chosen)


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("model.model_dim=64", ("model.model_dim", 64)),
        ("optimizer.beta1=0.5", ("optimizer.beta1", 0.5)),
        ("model.unit=LLLG", ("model.unit", "LLLG")),
        ("model.scan=False", ("model.scan", False)),
        ("sample_prompt=a=b", ("sample_prompt", "a=b")),
    ],
)
def test_parse_change(text, change):
    assert sweeps.parse_change(text) == change


def test_a_change_without_a_value_is_refused():
    with pytest.raises(UserError, match="set = 'model.scan'"):
        sweeps.parse_change("model.scan")


def test_override_changes_a_copy():
    base = {"a": {"b": 1, "c": {"d": 2}}}
    assert sweeps.override(base, {"a.b": 3, "a.c": {"e": 4}}) == {"a": {"b": 3, "c": {"e": 4}}}
    assert base == {"a": {"b": 1, "c": {"d": 2}}}


def test_the_pattern_sweep_compares_equal_depth_and_changes_reach_every_arm():
    sweep = sweeps.load_sweep(SWEEPS / "pattern.py", {"stages.stable.tokens": 100_000})
    configs = [sweep.config(Run(arm, 1)) for arm in sweep.arms]
    assert {config.model.num_layers for config in configs} == {8}
    assert {config.stages[0].tokens for config in configs} == {100_000}
    assert {config.seed for config in configs} == {1}
    assert list(sweep.arms) == ["G", "Gg", "LLLG", "LLLGLLLg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"s.py: it has no function get_sweep"),
        ("def get_sweep():\n    return 1 / 0", r"s.py:2: ZeroDivisionError"),
        ("def get_sweep(:", r"s.py:1: SyntaxError"),
        ("def get_sweep():\n    return None", r"get_sweep\(\) = None"),
        ("def get_sweep():\n    return {}", "question is missing"),
    ],
)
def test_a_bad_sweep_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "s.py").write_text(text)
    with pytest.raises(UserError, match=message):
        sweeps.load_sweep(tmp_path / "s.py")


def test_a_missing_sweep_file_suggests_one():
    with pytest.raises(UserError, match='did you mean ".*pattern.py"'):
        sweeps.load_sweep(SWEEPS / "patern.py")


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_two_arms_train_and_are_reported(tmp_path, monkeypatch):
    base = to_dict(tiny_run(write_corpus(tmp_path / "text"), model__moe__num_experts=0))
    base = sweeps.override(base, {"stages.decay": None})
    arms = {"full": {"model.unit": "GG"}, "shared": {"model.unit": "Gg"}}
    sweep = small_sweep(base=base, arms=arms, seeds=(0,))
    rows, failures = sweeps.run_sweep(sweep, tmp_path / "s")
    assert not failures and [row["arm"] for row in rows] == ["full", "shared"]
    assert rows[0]["bytes"] == rows[1]["bytes"]
    assert rows[1]["kv_bytes_per_token"] == rows[0]["kv_bytes_per_token"] / 2
    assert all(row["tokens_per_second"] > 0 and row["seconds"] > 0 for row in rows)

    def refuse(*_):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(sweeps.loop, "run", refuse)
    assert sweeps.run_sweep(sweep, tmp_path / "s") == (rows, {})
    shared = report.write_report(tmp_path / "s")["arms"][1]
    change = rows[1]["bits_per_byte"] - rows[0]["bits_per_byte"]
    assert shared["difference"]["mean"] == pytest.approx(change)
