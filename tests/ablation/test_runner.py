"""A sweep runs each arm with each seed once, whatever happens in between."""

import json
import logging
from pathlib import Path

import pytest

from lightning_jax.ablation import child, inference, report, runner
from lightning_jax.ablation import sweep as sweeps
from lightning_jax.ablation.report.summary import summarize
from lightning_jax.config.errors import UserError
from lightning_jax.train.workdir import claim
from tests.ablation.fake_runs import small_sweep, write_rows, write_run

SWEEPS = Path(__file__).resolve().parents[2] / "configs" / "sweeps"


@pytest.fixture
def trained(monkeypatch):
    """Replaces training; returns the (arm folder, seed) of the calls and what they should do."""
    calls, faults = [], {}

    def fake(config, workdir, **_):
        name = f"{workdir.parent.name} {workdir.name.replace('_', ' ')}"
        calls.append(name)
        if name in faults:
            raise faults[name]
        return write_run(config, workdir, code=2 + config.seed % 10 / 10)

    def train_here(_, tasks):
        for task in tasks:
            yield task, child.train(task.config, task.folder, ways=dict(task.ways))

    monkeypatch.setattr(child.loop, "run", fake)
    monkeypatch.setattr(runner.Pool, "train", train_here)
    return calls, faults


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_runs_every_arm_and_seed_once_with_the_arms_config(tmp_path, trained, caplog):
    caplog.set_level(logging.INFO)
    sweep = small_sweep()
    rows, failures = runner.run_sweep(sweep, tmp_path)
    assert trained[0][:4] == ["full seed 0", "shared seed 0", "hybrid seed 0", "full seed 1"]
    assert len(trained[0]) == 9 and not failures
    assert "full seed 1: 2.1" in caplog.text
    recorded = json.loads((tmp_path / "shared" / "seed_1" / "config.json").read_text())
    assert recorded["model"]["unit"] == "Gg" and recorded["seed"] == 1
    assert lines(tmp_path / "results.jsonl") == rows
    table = (tmp_path / "results.csv").read_text().splitlines()
    assert len(table) == 10 and "domains/code/bits_per_byte" in table[0]


def test_finished_runs_are_skipped_and_the_half_done_one_is_called_again(tmp_path, trained):
    sweep = small_sweep()
    runner.run_sweep(sweep, tmp_path, only=["full"], seeds=[0, 1])
    (tmp_path / "full" / "seed_1" / "evaluation.json").unlink()
    trained[0].clear()
    rows, _ = runner.run_sweep(sweep, tmp_path, only=["full"])
    assert trained[0] == ["full seed 1", "full seed 2"]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    trained[0].clear()
    runner.run_sweep(sweep, tmp_path, only=["shared"], seeds=[2])
    assert trained[0] == ["shared seed 2"]
    assert len(lines(tmp_path / "results.jsonl")) == 4


def test_a_failing_run_is_recorded_and_the_others_go_on(tmp_path, trained):
    calls, faults = trained
    faults["shared seed 0"] = UserError("loss is not finite at step 3")
    rows, failures = runner.run_sweep(small_sweep(), tmp_path)
    assert failures == {"shared seed 0": "loss is not finite at step 3"}
    assert len(calls) == 9 and len(rows) == 8
    note = tmp_path / "shared" / "seed_0" / "failure.txt"
    assert note.read_text() == "loss is not finite at step 3\n"
    faults.clear()
    rows, failures = runner.run_sweep(small_sweep(), tmp_path)
    assert calls[9:] == ["shared seed 0"] and len(rows) == 9 and not failures
    assert not note.exists()


@pytest.mark.parametrize("fault", [SystemExit(143), KeyboardInterrupt()])
def test_only_a_signal_ends_the_sweep(tmp_path, trained, fault):
    trained[1]["shared seed 0"] = fault
    with pytest.raises(type(fault)):
        runner.run_sweep(small_sweep(), tmp_path)
    assert trained[0] == ["full seed 0", "shared seed 0"]
    assert len(lines(tmp_path / "results.jsonl")) == 1
    trained[1].clear()
    # Stopped, not failed: the run goes on where it was in the order.
    runner.run_sweep(small_sweep(), tmp_path)
    assert trained[0][2] == "shared seed 0"


# Case F4


def test_a_run_of_a_killed_process_comes_last_the_next_time(tmp_path, trained):
    for name in ("full", "shared"):
        folder = tmp_path / name / "seed_0"
        folder.mkdir(parents=True)
        (folder / "failure.txt").write_text("its process was killed: out of memory?\n")
    rows, failures = runner.run_sweep(small_sweep(), tmp_path)
    assert trained[0][-2:] == ["full seed 0", "shared seed 0"]
    assert len(rows) == 9 and not failures


def test_a_run_that_leaves_no_result_is_a_row_with_its_reason(tmp_path, trained, monkeypatch):
    monkeypatch.setattr(child.loop, "run", lambda *_, **__: None)
    _, failures = runner.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    assert failures == {"full seed 0": "it ended without an evaluation"}
    assert (tmp_path / "full" / "seed_0" / "failure.txt").exists()


# Case F12, case D4


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "config.json: no such file"),
        ("config.json", "[1", "config.json: not JSON"),
        ("config.json", "{}", "config field seed is missing"),
        ("evaluation.json", '{"code": {"lo', "evaluation.json: not JSON"),
        ("evaluation.json", "", "evaluation.json: not JSON"),
        ("evaluation.json", "[]", "evaluation.json: must be a JSON object"),
        ("evaluation.json", "{}", "evaluation.json: nothing was measured"),
        ("evaluation.json", '{"a": {}}', "not an evaluation (a: lacks loss"),
        ("evaluation.json", '{"a": 3}', "not an evaluation (a = 3: must be an object)"),
        (
            "evaluation.json",
            '{"a": {"loss": 0, "bits_per_byte": 0, "tokens": 0, "bytes": 0}}',
            "tokens = 0: must be a whole number in [1,",
        ),
        (
            "evaluation.json",
            '{"a": {"loss": 2.0, "bits_per_byte": null, "tokens": 9, "bytes": 9}}',
            "bits_per_byte is not finite",
        ),
        (
            "evaluation.json",
            '{"a": {"loss": 2.0, "bits_per_byte": null, "no_bits_per_byte": "3 of 9 bytes lost"}}',
            "a has no bits_per_byte: 3 of 9 bytes lost",
        ),
        ("metrics.jsonl", '{"step": 1, "tokens_per_second": 3}\n', "metrics.jsonl: line 1: lacks"),
    ],
)
def test_a_damaged_finished_run_is_a_row_with_its_reason(tmp_path, trained, name, content, reason):
    runner.run_sweep(small_sweep(), tmp_path, only=["full"])
    path = tmp_path / "full" / "seed_1" / name
    path.unlink() if content is None else path.write_text(content)
    trained[0].clear()
    rows, failures = runner.run_sweep(small_sweep(), tmp_path)
    assert list(failures) == ["full seed 1"] and reason in failures["full seed 1"]
    # Found before the training of the others, and not trained over.
    assert len(trained[0]) == 6 and len(rows) == 8
    assert len(lines(tmp_path / "results.jsonl")) == 8
    missing = summarize(small_sweep(), tmp_path)["missing"]
    assert [(run["arm"], run["seed"]) for run in missing] == [("full", 1)]
    assert reason in missing[0]["reason"]


# Case F12


@pytest.mark.parametrize("name", ["shared", "shared/seed_1"])
def test_a_file_in_the_place_of_a_folder_is_a_row_with_its_reason(tmp_path, trained, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    rows, failures = runner.run_sweep(small_sweep(), tmp_path)
    lost = 3 if name == "shared" else 1
    assert len(failures) == lost and len(rows) == len(trained[0]) == 9 - lost
    assert set(failures.values()) == {f"{tmp_path / name}: must be a folder"}
    assert len(summarize(small_sweep(), tmp_path)["missing"]) == lost


# Case F12


def test_a_report_is_made_of_what_is_there(tmp_path, trained):
    runner.run_sweep(small_sweep(), tmp_path, only=["full", "shared"])
    (tmp_path / "full" / "seed_0" / "run.json").write_text("[")
    (tmp_path / "full" / "seed_1" / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "shared" / "seed_2" / "evaluation.json").write_text("{}")
    (tmp_path / "hybrid").write_text("")
    made = report.write_report(tmp_path)
    assert {arm["arm"]: arm["seeds"] for arm in made["arms"]} == {
        "full": [0, 2],
        "shared": [0, 1],
        "hybrid": [],
    }
    assert len(made["missing"]) == 5 and (tmp_path / "report.html").stat().st_size > 1000


# Case F12


def test_an_unfinished_run_whose_config_is_damaged_is_a_row_with_its_reason(tmp_path, trained):
    folder = tmp_path / "shared" / "seed_0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"seed": ')
    rows, failures = runner.run_sweep(small_sweep(), tmp_path)
    assert "config.json: not JSON" in failures["shared seed 0"] and len(rows) == 8


def test_a_runs_folder_is_no_sweeps_folder(tmp_path, trained):
    runner.run_sweep(small_sweep(), tmp_path / "s", only=["full"], seeds=[0])
    with pytest.raises(UserError, match="is a run's folder"):
        runner.run_sweep(small_sweep(), tmp_path / "s" / "full" / "seed_0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arms={"full": {"model.unit": "G"}}), r"model.unit = 'G': full seed 0 .* has 'GG'"),
        (dict(seeds=(1, 2)), r"seeds = \(1, 2\): .* 'full/seed_0', which is not in it"),
        (dict(arms={"other": {}}, baseline="other"), r"arms = \['other'\]: .* 'full/seed_0'"),
    ],
)
def test_another_sweep_in_the_same_folder_is_refused(tmp_path, trained, changes, message):
    runner.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    before = (tmp_path / "sweep.json").read_text()
    with pytest.raises(UserError, match=message):
        runner.run_sweep(small_sweep(**changes), tmp_path)
    assert len(trained[0]) == 1
    assert (tmp_path / "sweep.json").read_text() == before


# Case A2, of a sweep: its folder is locked as those of its runs are.


def test_a_sweep_in_use_is_left_as_it_is(tmp_path, trained):
    root = tmp_path / "new" / "sweep"
    with claim(root):
        with pytest.raises(UserError, match="workdir = '.*': in use by process"):
            runner.run_sweep(small_sweep(), root)
        assert not trained[0] and [path.name for path in root.iterdir()] == ["lock"]
    assert not (tmp_path / "new").exists()
    runner.run_sweep(small_sweep(), root, only=["full"], seeds=[0])
    assert not (root / "lock").exists()


# Case A13


def test_a_refused_sweep_leaves_no_trace(tmp_path, trained):
    with pytest.raises(UserError, match="only = 'none'"):
        runner.run_sweep(small_sweep(), tmp_path / "new" / "sweep", only=["none"])
    assert not list(tmp_path.iterdir())


def test_more_arms_seeds_and_another_baseline_extend_a_folder(tmp_path, trained):
    runner.run_sweep(small_sweep(seeds=(0,)), tmp_path)
    arms = {**small_sweep().arms, "local": {"model.unit": "LL"}}
    runner.run_sweep(small_sweep(seeds=(0, 1), arms=arms, baseline="local"), tmp_path)
    assert trained[0][3:] == ["local seed 0"] + [f"{arm} seed 1" for arm in arms]


def test_the_order_of_stages_is_part_of_a_run(tmp_path, trained):
    runner.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    base = small_sweep().base
    turned = {**base, "stages": dict(reversed(base["stages"].items()))}
    with pytest.raises(UserError, match="stages = "):
        runner.run_sweep(small_sweep(base=turned), tmp_path)


def test_half_done_and_strange_files_in_the_folder_do_no_harm(tmp_path, trained):
    write_rows(tmp_path / "full" / "seed_0", 3)
    (tmp_path / "notes").mkdir()
    (tmp_path / "full" / "plot.png").write_bytes(b"")
    runner.run_sweep(small_sweep(), tmp_path, only=["full"], seeds=[0])
    assert trained[0] == ["full seed 0"]


def test_sweep_json_gives_the_same_sweep_back(tmp_path, trained):
    sweep = small_sweep()
    runner.run_sweep(sweep, tmp_path, only=["full"], seeds=[0])
    again = sweeps.build_sweep(json.loads((tmp_path / "sweep.json").read_text()))
    assert again == sweep
    assert list(again.base["stages"]) == ["stable", "decay"] and list(again.arms) == list(
        sweep.arms
    )


def test_a_task_is_one_run_and_locks_no_more_than_its_folder(tmp_path, trained):
    sweep, root = small_sweep(), tmp_path / "s"
    with claim(root):
        rows, failures = runner.run_task(sweep, root, 4)
        assert [(row["arm"], row["seed"]) for row in rows] == [("shared", 1)] and not failures
    assert trained[0] == ["shared seed 1"]
    assert len(lines(root / "results.jsonl")) == 1
    assert runner.run_task(sweep, root, 4)[0] == rows and len(trained[0]) == 1
    assert runner.run_sweep(sweep, root)[1] == {} and len(trained[0]) == 9


@pytest.mark.parametrize("task", [-1, 9])
def test_a_task_that_is_no_run_is_refused(tmp_path, trained, task):
    with pytest.raises(UserError, match=f"task = {task}: must be the number of a run, from 0 to 8"):
        runner.run_task(small_sweep(), tmp_path / "s", task)
    assert not list(tmp_path.iterdir())


def test_results_have_the_rows_of_all_who_finish_at_the_same_time(tmp_path, trained, monkeypatch):
    sweep = small_sweep()
    other, write = sweep.runs()[3], runner.write_results

    def write_late(root, rows):
        if not (other.folder(root) / "evaluation.json").exists():
            # Another process finishes now, and writes before this one does.
            write_run(sweep.config(other), other.folder(root))
            write(root, runner.collect(sweep.runs(), root))
        write(root, rows)

    monkeypatch.setattr(runner, "write_results", write_late)
    runner.run_task(sweep, tmp_path, 0)
    assert [(row["arm"], row["seed"]) for row in lines(tmp_path / "results.jsonl")] == [
        ("full", 0),
        ("full", 1),
    ]


# What runs depend on: calibrations and searches.


def test_a_search_comes_first_and_its_factors_reach_the_runs(tmp_path, trained):
    pytest.importorskip("optuna")
    sweep = small_sweep(search={"trials": 3}, scaling=[0.5])
    with pytest.raises(UserError, match="arm 'full': its learning rate has not been searched"):
        runner.run_task(sweep, tmp_path / "s", 0)
    assert not list(tmp_path.iterdir())
    rows, failures = runner.run_sweep(sweep, tmp_path, seeds=[0])
    assert not failures and len(trained[0]) == 9 + 4
    factors = {
        arm: record["factor"]
        for arm, record in json.loads((tmp_path / "search.json").read_text()).items()
    }
    assert [row["arm"] for row in rows] == ["full", "shared", "hybrid", "full@0.5"]
    factors["full@0.5"] = factors["full"]
    before = sweep.base["stages"]["stable"]["learning_rate"]
    for row in rows:
        config = json.loads((tmp_path / row["arm"] / "seed_0" / "config.json").read_text())
        rate = config["stages"]["stable"]["learning_rate"]
        assert rate == pytest.approx(before * factors[row["arm"]])
    # Other seeds need no other search.
    assert runner.prepare(sweep, tmp_path)["full"] == {
        "tokens": 1.0,
        "learning_rate": factors["full"],
    }
    assert len(runner.run_task(sweep, tmp_path, 3)[0]) == 5 and len(trained[0]) == 14


def test_an_arm_all_of_whose_trials_failed_is_rows_with_that_reason(tmp_path, trained):
    pytest.importorskip("optuna")
    calls, faults = trained
    faults.update({f"shared trial {k}": UserError("loss is not finite") for k in range(3)})
    sweep = small_sweep(search={"trials": 3})
    rows, failures = runner.run_sweep(sweep, tmp_path)
    assert set(failures.values()) == {"every trial of its learning rate failed"}
    assert list(failures) == [f"shared seed {seed}" for seed in range(3)] and len(rows) == 6
    missing = summarize(sweep, tmp_path)["missing"]
    assert {run["reason"] for run in missing} == {f"failed: {failures['shared seed 0']}"}
    faults.clear()
    rows, failures = runner.run_sweep(sweep, tmp_path)
    assert len(rows) == 9 and not failures


def test_preparing_trains_no_run(tmp_path, trained):
    sweep = small_sweep(budget="flops")
    found = runner.prepare(sweep, tmp_path)
    assert found["full"] == {"tokens": 1.0, "learning_rate": 1.0}
    assert found["hybrid"]["tokens"] > 1.0 and not trained[0]
    runner.run_task(sweep, tmp_path, 2)
    config = json.loads((tmp_path / "hybrid" / "seed_0" / "config.json").read_text())
    tokens = sweep.base["stages"]["stable"]["tokens"]
    assert config["stages"]["stable"]["tokens"] > tokens


def test_runs_with_experts_are_evaluated_under_the_other_routings_once(
    tmp_path, trained, monkeypatch
):
    asked = []

    def evaluate(folder, options):
        asked.append((Path(folder).parent.name, options.routing.top_k))
        return {"domains": {}}

    monkeypatch.setattr(inference, "evaluate_run", evaluate)
    arms = {"dense": {}, "sparse": {"model.moe.num_experts": 8}}
    fields = {"arms": arms, "baseline": "dense", "seeds": (0,)}
    runner.run_sweep(small_sweep(**fields), tmp_path)
    ways = {f"top_{k}": {"routing": "top_k", "top_k": k} for k in (1, 2)}
    for _ in range(2):
        rows, failures = runner.run_sweep(small_sweep(**fields, inference=ways), tmp_path)
        assert len(rows) == 2 and not failures
    assert asked == [("sparse", 1), ("sparse", 2)] and len(trained[0]) == 2
    ways["top_1"] = {"routing": "top_k", "top_k": 2}
    with pytest.raises(UserError, match="inference.top_1 = .* were inferred with .*'top_k': 1"):
        runner.run_sweep(small_sweep(**fields, inference=ways), tmp_path)
