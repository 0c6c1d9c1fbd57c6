"""The loop: stages, logs, exact resume after any death, and one clear line for bad input."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_jax.checkpoint import (
    Checkpointer,
    all_steps,
    checkpoints_dir,
    load_run,
    read_meta,
)
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data import mixture
from lightning_jax.data.worker import WorkerIterator
from lightning_jax.train import evaluation, loop, placement
from lightning_jax.train.interruption import Stopped
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.plan import Plan
from lightning_jax.train.session import Session
from lightning_jax.train.workdir import claim
from tests.tiny import tiny_run, write_corpus

ROOT = Path(__file__).resolve().parents[2]
TIMING = ("tokens_per_second", "seconds")
# Compiles in seconds.
DENSE = dict(model__unit="G", model__moe__num_experts=0)


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def rows_of(workdir):
    rows = read_rows(Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows]


def terminate_after(steps, monkeypatch):
    """Sends this process SIGTERM, once, when the metrics of `steps` steps have been read."""
    report, fired = Session.report, threading.Event()

    def report_and_signal(self, step, *args):
        report(self, step, *args)
        if step == steps and not fired.is_set():
            fired.set()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Session, "report", report_and_signal)


def test_three_steps_stopped_at_a_seam_and_resumed(corpus, tmp_path, monkeypatch):
    """The one training of `make check`; the slow tests below say what else must hold."""
    config = tiny_run(corpus, **DENSE, checkpoint_every=100)
    first, second = config.stages
    second = dataclasses.replace(second, tokens=128, decay_tokens=128, accumulate=1)
    first = dataclasses.replace(first, tokens=256, warmup_tokens=0)
    config = dataclasses.replace(config, stages=(first, second))
    traced = []
    train_step = placement.step.train_step
    monkeypatch.setattr(
        placement.step,
        "train_step",
        lambda *args, **kwargs: traced.append(0) or train_step(*args, **kwargs),
    )
    with monkeypatch.context() as patch:
        terminate_after(1, patch)
        with pytest.raises(Stopped):
            loop.run(config, tmp_path)
    assert read_meta(tmp_path).step == 2 and not (tmp_path / "evaluation.json").exists()
    # The next stage has not begun: its rate may still change.
    config = dataclasses.replace(
        config, stages=(first, dataclasses.replace(second, learning_rate=1e-4))
    )
    results = loop.run(config, tmp_path)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == results
    rows = rows_of(tmp_path)
    assert [(row["step"], row["stage"]) for row in rows] == [
        (1, "stable"),
        (2, "stable"),
        (3, "decay"),
    ]
    assert [row["tokens"] for row in rows] == [128, 256, 384]
    # Case B6: across a stop, a seam and batches made ahead
    by_source = [[source["tokens"] for source in row["data"].values()] for row in rows]
    assert [sum(tokens) for tokens in by_source] == [128, 256, 384]
    assert all(source["epochs"] > 0 for source in rows[-1]["data"].values())
    assert all(np.isfinite(row["loss"]) for row in rows)
    plan = Plan.of(config)
    assert [row["learning_rate"] for row in rows] == [plan.knobs(n).learning_rate for n in range(3)]
    assert all_steps(checkpoints_dir(tmp_path)) == [2, 3]
    meta = read_meta(tmp_path)
    assert (meta.step, meta.tokens, meta.stage) == (3, 384, "decay")
    assert len(traced) == 2  # once per session


@pytest.mark.slow
def test_a_run_leaves_all_that_it_did_in_its_folder(corpus, tmp_path):
    texts = []

    def sampler(config, params, router, tokenizer, rope_base_global):
        texts.append((rope_base_global, tokenizer.vocab_size))
        return "a sample"

    options = dict(sample_tokens=8, eval_every=5, histogram_every=2)
    config = tiny_run(corpus, data__eval_fraction=0.2, **options)
    results = loop.run(config, tmp_path, sampler=sampler)
    rows = rows_of(tmp_path)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == list(range(1, 11))
    assert [row["stage"] for row in logged] == ["stable"] * 6 + ["decay"] * 4
    assert [row["tokens"] for row in logged] == [128 * step for step in range(1, 11)]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert len(logged[0]["mean_experts"]) == 2
    for name in ("rows_sent", "part_max_over_mean", "exchange_rounds", "dropped_share"):
        assert len(logged[0][name]) == 2
    assert [row["step"] for row in rows if "eval" in row] == [5]
    assert texts == [(10_000.0, 258), (50_000.0, 258)]

    assert json.loads((tmp_path / "evaluation.json").read_text()) == results
    assert set(results) == {"a", "b"} and results["a"]["bytes"] > 0
    about = json.loads((tmp_path / "run.json").read_text())
    [session] = about["sessions"]
    assert session["versions"]["jax"] == jax.__version__ and about["data"]["a"]["fingerprint"]
    assert build(RunConfig, json.loads((tmp_path / "config.json").read_text())).seed == config.seed
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"tensors": 0})
    events.Reload()
    # The last evaluation and its sample too.
    for name in ("bits_per_byte/a", "loss/eval/b", "sample"):
        assert [event.step for event in events.Tensors(name)] == [5, 10]
    assert [event.step for event in events.Tensors("loss/train")] == list(range(1, 11))
    assert "config" in events.Tags()["tensors"]
    # The two newest, and the ends of both stages.
    assert sorted(all_steps(checkpoints_dir(tmp_path))) == [6, 9, 10]

    again = loop.run(config, tmp_path)
    assert again == results and rows_of(tmp_path) == rows

    # What `experiments.evaluate` says of the last checkpoint is what the run said at its end.
    evaluated = evaluation.evaluate_run(str(tmp_path), evaluation.EvalOptions())
    assert evaluated["step"] == 10
    for name in results:
        assert evaluated["domains"][name]["loss"] == pytest.approx(results[name]["loss"], abs=1e-6)
    fewer = evaluation.EvalOptions(data=corpus, max_tokens=200, routing=EvalRouting(top_p=0.01))
    used = evaluation.evaluate_run(str(tmp_path), fewer)["domains"]["data"]["experts_per_token"]
    assert used == 1.0
    few = evaluation.EvalOptions(routing=EvalRouting(top_k=2))
    with pytest.raises(UserError, match="eval.top_k = 2: needs --eval.routing=top_k"):
        evaluation.evaluate_run(str(tmp_path), few)
    bounded = loop.run(dataclasses.replace(config, final_eval_tokens=1), tmp_path)
    assert 0 < bounded["a"]["tokens"] < results["a"]["tokens"]


def environment(cache):
    return {
        **os.environ,
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def run_process(corpus, workdir, *kill_at, cache):
    script = ROOT / "tests" / "train" / "killed_run.py"
    command = [sys.executable, str(script), corpus, str(workdir), *map(str, kill_at)]
    return subprocess.run(
        command, env=environment(cache), capture_output=True, text=True, timeout=600
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_saves_and_resumed_is_bit_for_bit_the_same(corpus, tmp_path):
    """With packing, a mixture, accumulation, experts, the controller and averaging on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_process(corpus, whole, cache=tmp_path / "cache").returncode == 0
    died = run_process(corpus, killed, 4, cache=tmp_path / "cache")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert max(all_steps(checkpoints_dir(killed))) in (2, 4)
    finished = run_process(corpus, killed, cache=tmp_path / "cache")
    assert finished.returncode == 0, finished.stderr

    assert rows_of(killed) == rows_of(whole)
    one, other = load_run(whole), load_run(killed)
    assert one.meta.step == other.meta.step == 10
    jax.tree.map(
        np.testing.assert_array_equal, (one.params, one.router), (other.params, other.router)
    )
    evaluations = [(folder / "evaluation.json").read_text() for folder in (whole, killed)]
    assert evaluations[0] == evaluations[1]


def wait_for(paths, processes):
    while not all(path.exists() for path in paths):
        assert all(process.poll() in (None, 0) for process in processes)
        time.sleep(0.001)


# Case A2
@pytest.mark.slow
def test_of_two_processes_in_one_folder_exactly_one_trains_ten_times(corpus, tmp_path):
    """Half of the rounds begin a run, half resume one; the other process changes nothing."""
    script = ROOT / "tests" / "train" / "racing_runs.py"
    rounds = [str(number) for number in range(11)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), corpus, str(tmp_path), name, *rounds[name == "b" :]],
            env=environment(tmp_path / "cache"),
            stderr=subprocess.DEVNULL,
        )
        for name in ("a", "b")
    ]
    whole = tmp_path / "0"
    try:
        for number in rounds:
            names = ["a", "b"] if number != "0" else ["a"]  # Nobody disturbs the first round.
            wait_for([tmp_path / f"{name}.{number}.ready" for name in names], processes)
            if int(number) % 2:
                shutil.copytree(whole, tmp_path / number)
                shutil.rmtree(tmp_path / number / "checkpoints" / "10")
                (tmp_path / number / "evaluation.json").unlink()
            (tmp_path / f"{number}.go").touch()
            done = [tmp_path / f"{name}.{number}.done" for name in names]
            wait_for(done, processes)
            outcomes = [path.read_text() for path in done]
            assert outcomes.count("trained") == 1, outcomes
            for refused in set(outcomes) - {"trained"}:
                winner = processes[outcomes.index("trained")]
                assert f"in use by process {winner.pid} on " in refused
    finally:
        for process in processes:
            process.kill()
            process.wait()
    expected = load_run(whole)
    for number in rounds[1:]:
        path = tmp_path / number
        assert rows_of(path) == rows_of(whole) and not (path / "lock").exists()
        assert (path / "evaluation.json").read_text() == (whole / "evaluation.json").read_text()
        assert all_steps(checkpoints_dir(path)) == all_steps(checkpoints_dir(whole))
        trained = load_run(path)
        jax.tree.map(np.testing.assert_array_equal, trained.params, expected.params)
        sessions = json.loads((path / "run.json").read_text())["sessions"]
        assert len(sessions) == 1 + int(number) % 2


def command(workdir, *flags, cache):
    call = [sys.executable, "-m", "experiments.train", "--config=configs/tour.py", *flags]
    return subprocess.run(
        [*call, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_second_command_is_refused_before_it_does_anything(tmp_path):
    path = tmp_path / "run"
    with claim(path):
        result = command(path, cache=tmp_path / "cache")
        assert os.listdir(path) == ["lock"] and os.listdir(tmp_path) == ["run"]
    assert result.returncode == 2 and not result.stdout
    line = f"error: workdir = '{path}': in use by process {os.getpid()} on "
    assert result.stderr.startswith(line) and len(result.stderr.splitlines()) == 1


# Case A13
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.data.sources.code.path=none/*.txt"], "data.sources.code.path = 'none/*.txt': "),
        (["--config.data.tokenizer=bpe:300", "--config.model.vocab_size=260"], "has 300 ids"),
        (["--config.mesh.fsdp=3", "--profile"], "mesh = "),
    ],
)
def test_a_refused_command_leaves_no_trace(corpus, tmp_path, flags, message):
    flags = [f"--config.data.sources.code.path={corpus}", *flags]
    result = command(tmp_path / "new" / "run", *flags, cache=tmp_path / "cache")
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


# Case A1, with training
@pytest.mark.slow
def test_changed_text_is_refused_after_training_and_goes_on_when_allowed(corpus, tmp_path):
    lines = Path(corpus).read_text().splitlines(keepends=True)
    text, path = tmp_path / "text.jsonl", tmp_path / "run"
    text.write_text("".join(lines))
    config = tiny_run(str(text), **DENSE)
    loop.run(config, path)
    shutil.rmtree(path / "checkpoints" / "10")
    text.write_text("".join(lines[:30]))
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    with pytest.raises(UserError, match="^data.sources.a: its text has changed: .* before, "):
        loop.run(config, path)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    results = loop.run(config, path, allow_changed_data=True)
    assert load_run(path).meta.step == 10 and np.isfinite(results["a"]["loss"])
    about = json.loads((path / "run.json").read_text())
    assert about["data"]["a"]["documents"] > about["data_changes"]["a"][0]["documents"]
    assert about["data_changes"]["a"][0]["first_step"] == 10
    assert loop.run(config, path) == results  # It is known now.


@pytest.mark.slow
def test_sigterm_saves_and_the_same_call_goes_on(corpus, tmp_path, monkeypatch):
    config = tiny_run(corpus, checkpoint_every=100)
    whole = tmp_path / "whole"
    loop.run(config, whole)

    terminate_after(3, monkeypatch)
    stopped = tmp_path / "stopped"
    with pytest.raises(Stopped) as stop:
        loop.run(config, stopped)
    assert stop.value.code == 128 + signal.SIGTERM
    assert max(all_steps(checkpoints_dir(stopped))) in (4, 5)
    loop.run(config, stopped)
    assert rows_of(stopped) == rows_of(whole)


MOMENTS = {
    "at a seam": (mixture, "make_train_iterator", 2),
    "waiting": (WorkerIterator, "ready", 4),
    "before a step": (placement, "put_batch", 3),
    "before the last step": (placement, "put_batch", 10),
    "reading metrics": (Session, "report", 7),
    "evaluating": (Session, "evaluate", 2),
    "saving": (Session, "save", 2),
    "saving the end": (Session, "save", 4),
}


# Case F11
@pytest.mark.slow
def test_a_signal_at_any_moment_costs_nothing(corpus, tmp_path, monkeypatch):
    config = tiny_run(corpus, **DENSE, eval_every=3, checkpoint_every=4)
    results = loop.run(config, tmp_path / "whole")
    whole, rows = load_run(tmp_path / "whole"), rows_of(tmp_path / "whole")
    for moment, (place, name, call) in MOMENTS.items():
        folder, function, calls = tmp_path / moment, getattr(place, name), []

        def fire(*args, call=call, calls=calls, function=function, **kwargs):
            calls.append(0)
            if len(calls) == call:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
            return function(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
            patch.setattr(place, name, fire)
            loop.run(config, folder)
        assert stop.value.code == 128 + signal.SIGTERM, moment
        assert loop.run(config, folder) == results, moment
        assert rows_of(folder) == rows, moment
        other = load_run(folder)
        jax.tree.map(np.testing.assert_array_equal, whole.params, other.params)


# Case A11
@pytest.mark.slow
@pytest.mark.parametrize("when", ["in between", "at the end"])
def test_sigterm_in_an_evaluation_is_heard_before_its_next_batch(
    corpus, tmp_path, monkeypatch, when
):
    # Enough held-out text for several batches.
    config = tiny_run(corpus, **DENSE, eval_every=5, checkpoint_every=100, data__eval_fraction=0.3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    put, batches = evaluation.put_whole, []

    def count(batch, mesh):
        batches.append(batch)
        return put(batch, mesh)

    monkeypatch.setattr(evaluation, "put_whole", count)
    results = loop.run(config, whole)
    every = len(batches)
    last = 2 if when == "in between" else every - 2  # of a batch before the signal

    def terminate(batch, mesh):
        if len(batches) == last - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return count(batch, mesh)

    batches.clear()
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(evaluation, "put_whole", terminate)
        loop.run(config, stopped)
    assert stop.value.code == 128 + signal.SIGTERM and len(batches) == last
    step = 5 if when == "in between" else 10
    assert read_meta(stopped).step == step and not (stopped / "evaluation.json").exists()
    assert loop.run(config, stopped) == results
    assert rows_of(stopped) == rows_of(whole)
    one, other = load_run(whole), load_run(stopped)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


# Case F10
@pytest.mark.slow
def test_an_end_of_the_data_worker_is_a_line_and_costs_no_step(corpus, tmp_path, monkeypatch):
    class PanicException(BaseException):
        """As pyo3 derives it."""

    config = tiny_run(corpus, **DENSE, checkpoint_every=100)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    loop.run(config, whole)
    tokens, seen = mixture.document_tokens, []

    def panic(text, tokenizer):
        seen.append(text)
        if len(seen) == 5:
            raise PanicException("unwrap on None")
        return tokens(text, tokenizer)

    with monkeypatch.context() as patch:
        patch.setattr(mixture, "document_tokens", panic)
        with pytest.raises(UserError, match="corpus.jsonl.*PanicException: unwrap on None") as end:
            loop.run(config, stopped)
    step = read_meta(stopped).step
    assert 0 < step < 10 and str(end.value).endswith(f"the state before it is checkpoint {step}")
    loop.run(config, stopped)
    assert rows_of(stopped) == rows_of(whole)
    one, other = load_run(whole), load_run(stopped)
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


# Case A12
@pytest.mark.slow
def test_a_profile_of_stages_of_a_few_steps(corpus, tmp_path):
    loop.run(tiny_run(corpus, **DENSE), tmp_path, profile=True)
    assert len([*(tmp_path / "profile").rglob("*.xplane.pb")]) == 1
    # A finished run has no steps left to trace; one that was cut short traces in each session.
    loop.run(tiny_run(corpus, **DENSE), tmp_path, profile=True)


def slower(config):
    first, second = config.stages
    first = dataclasses.replace(first, learning_rate=first.learning_rate / 10)
    return dataclasses.replace(config, stages=(first, second))


def skipping(config):
    return dataclasses.replace(
        config, optimizer=dataclasses.replace(config.optimizer, on_nan="skip")
    )


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    corpus, tmp_path, monkeypatch
):
    put = placement.put_batch
    calls = []

    def poison(batch, mesh):
        calls.append(0)
        if len(calls) == 4:
            batch = batch._replace(loss_mask=batch.loss_mask * np.nan)
        return put(batch, mesh)

    monkeypatch.setattr(placement, "put_batch", poison)
    config = tiny_run(corpus, **DENSE, checkpoint_every=100)
    path = tmp_path / "run"
    with pytest.raises(UserError, match="loss is not finite at step 4 .stage 'stable'"):
        loop.run(config, path)
    state = load_run(path)
    assert state.meta.step == 4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))
    calls.extend([0] * 10)
    # Case A5: what the line advises works: the same run, a lower rate, or steps left out.
    for number, advised in enumerate((config, slower(config), skipping(config))):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(path, copy)
        loop.run(advised, copy)
        assert [row["step"] for row in rows_of(copy)][-1] == 10

    calls.clear()
    loop.run(skipping(config), tmp_path / "skip")
    rows = rows_of(tmp_path / "skip")
    assert rows[3]["loss"] is None and rows[3]["bad_steps"] == 1
    assert rows[-1]["bad_steps"] == 1 and np.isfinite(rows[-1]["loss"])


@pytest.mark.slow
def test_another_config_in_the_same_folder_is_refused_by_name(corpus, tmp_path):
    config = tiny_run(corpus, **DENSE)
    loop.run(config, tmp_path)
    wider = dataclasses.replace(config, seed=7)
    with pytest.raises(UserError, match="seed = 7: this workdir's run has 0"):
        loop.run(wider, tmp_path)
    with pytest.raises(UserError, match=r"model.unit = 'L': this workdir's run has 'G'"):
        model = dataclasses.replace(config.model, unit="L")
        loop.run(dataclasses.replace(config, model=model), tmp_path)
    # Its stage has passed.
    with pytest.raises(UserError, match="stages.stable.learning_rate = 0.0003"):
        loop.run(slower(config), tmp_path)
    loop.run(dataclasses.replace(config, log_every=5), tmp_path)


def test_a_workdir_that_cannot_be_written_is_one_line(corpus, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(UserError, match="workdir = .*cannot be written"):
        loop.run(tiny_run(corpus), blocked)


def test_batches_that_do_not_divide_and_vocabularies_too_small(corpus, tmp_path):
    with pytest.raises(UserError, match="model.vocab_size = 100: the tokenizer has 258 ids"):
        loop.run(tiny_run(corpus, model__vocab_size=100), tmp_path)


@pytest.mark.slow
def test_a_save_that_fails_loses_nothing(corpus, tmp_path, monkeypatch):
    """The disk fills up at the second save: one line, and the first checkpoint is whole."""
    save = Checkpointer.save

    def full(self, step, *args):
        if step > 3:
            raise UserError("cannot save a checkpoint: No space left on device")
        save(self, step, *args)

    monkeypatch.setattr(Checkpointer, "save", full)
    with pytest.raises(UserError, match="No space left"):
        loop.run(tiny_run(corpus), tmp_path)
    monkeypatch.undo()
    assert load_run(tmp_path).meta.step == 3
