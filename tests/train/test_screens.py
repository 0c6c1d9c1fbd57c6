"""The first and the last lines of a run."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import jax
import pytest

from lightning_jax.sharding import make_mesh
from lightning_jax.train import screens
from lightning_jax.train.plan import Plan
from lightning_jax.train.screens import closing, opening
from tests.tiny import mesh_config, tiny_run, write_corpus


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    return Plan.of(tiny_run(corpus, model__vocab_size=64))


def lines(screen):
    return dict(line.split(maxsplit=1) for line in screen.splitlines())


def screen_of(plan, **changes):
    options = dict(
        start=0,
        lost=0,
        fresh=True,
        epochs={"a": 1.25, "b": 0.05},
        memory={"parameters": 2**20, "optimizer state": 2**21},
    )
    mesh = make_mesh(mesh_config(data=2, fsdp=4))
    return opening(Path("/runs/a b"), plan, mesh, **{**options, **changes})


def test_the_first_screen_says_what_happens_where_and_how_to_go_on(plan, monkeypatch):
    command = [sys.executable, "-m", "experiments.train", "--workdir=/runs/a b", "--config=x"]
    monkeypatch.setattr(sys, "orig_argv", command)
    found = screen_of(plan).splitlines()
    text = "\n".join(found)
    assert "devices            8 x cpu (data 2, fsdp 4)" in found
    assert "experts per token, of those held   2 of 8" in text
    assert any(line.split()[:3] == ["optimizer", "state", "2"] for line in found)
    assert any(re.match(r"  together +4 MiB of .*; activations are not included", s) for s in found)
    assert "  stable  6      768     4 x 32             0 to 0.003 in 256" in found
    assert "  decay   4      512     4 x 32 in 2 parts  0.003, sqrt to 0 in 256" in found
    assert "  a   832     1.2     75%, 50%" in found and "  b   448     0.05    25%, 50%" in found
    resume = next(line for line in found if line.startswith("resume"))
    assert shlex.split(resume)[-4:] == command[1:]
    watch = shlex.split(next(line for line in found if line.startswith("watch")))
    assert watch[-1] == "--logdir=/runs/a b"
    assert len(found) <= 31 and max(len(s) for s in found if "/runs/a b" not in s) <= 80


def test_a_stage_without_a_mixture_takes_sources_by_their_own_weight(plan):
    stages = [dataclasses.replace(stage, mixture=()) for stage in plan.config.stages]
    first, second = plan.config.data.sources
    sources = dataclasses.replace(first, weight=3.0), second
    data = dataclasses.replace(plan.config.data, sources=sources)
    own = Plan.of(dataclasses.replace(plan.config, stages=tuple(stages), data=data))
    found = screen_of(own).splitlines()
    assert "  a   960     1.2     75%, 75%" in found and "  b   320     0.05    25%, 25%" in found


# Case F7
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "a new run of 10 steps, 1.28 K tokens"),
        (
            {"fresh": False},
            "a new run of 10 steps, 1.28 K tokens, from the weights in checkpoint 0",
        ),
        ({"start": 7}, "resumes after step 7 of 10, in stage 'decay'"),
        (
            {"start": 4, "lost": 2},
            "resumes after step 4 of 10, in stage 'stable'; "
            "steps 5 to 6 were not saved and are taken again",
        ),
        ({"start": 10}, "all 10 steps were taken before: only the last evaluation is repeated"),
    ],
)
def test_the_first_line_says_from_where_a_run_goes_on(plan, changes, words):
    assert screen_of(plan, **changes).splitlines()[0] == f"/runs/a b: {words}"


def test_paths_in_the_present_folder_are_short(plan, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = lines(closing(tmp_path / "runs" / "a", plan))
    assert found["result"] == "runs/a/evaluation.json"


def test_a_state_that_cannot_fit_is_said(plan, monkeypatch):
    monkeypatch.setattr(screens, "_limit", lambda device: 2**20)
    assert "4 MiB of 1 MiB; activations are not included; they do not fit" in screen_of(plan)


def test_many_stages_and_sources_are_counted(plan):
    epochs = {f"s{i}": 1.0 for i in range(20)}
    assert "  and 12 more" in screen_of(plan, epochs=epochs).splitlines()


def test_the_memory_of_a_cpu_device_is_its_part_of_the_machine(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("8000\n")
    monkeypatch.setattr(screens, "_CONTAINER", tmp_path / "max")
    assert screens._limit(jax.devices()[0]) == 8000 // jax.local_device_count()
    (tmp_path / "max").write_text("max\n")
    assert screens._limit(jax.devices()[0]) > 2**20


# Case F7
def test_the_last_lines_say_what_is_next(plan, monkeypatch):
    # As if it were activated.
    monkeypatch.setattr(screens.invocation, "tool", lambda *words: shlex.join(words))
    found = lines(closing(Path("/runs/a b"), plan))
    assert "all 10 steps" in found["done"] and found["result"] == "/runs/a b/evaluation.json"
    prompt = f"--prompt={plan.config.sample_prompt}"
    command = ["python", "-m", "experiments.generate", "--workdir=/runs/a b", prompt]
    assert shlex.split(found["next"]) == command
    assert shlex.split(found["or"])[2:] == ["experiments.evaluate", "--workdir=/runs/a b"]
