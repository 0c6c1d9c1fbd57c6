"""The first and the last lines of a run."""

import shlex
from pathlib import Path

import pytest

from lightning_jax.sharding import make_mesh
from lightning_jax.train.plan import Plan
from lightning_jax.train.screens import closing, opening
from tests.tiny import mesh_config, tiny_run, write_corpus


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return Plan.of(tiny_run(write_corpus(tmp_path_factory.mktemp("corpus"))))


def lines(screen):
    return dict(line.split(maxsplit=1) for line in screen.splitlines())


# Case F7
@pytest.mark.parametrize(
    ("start", "steps"),
    [
        (0, "10 (stable 6, decay 4)"),
        (4, "10 (stable 6, decay 4), 4 of them before"),
        (10, "10 (stable 6, decay 4), all of them before"),
    ],
)
def test_the_first_screen_says_where_things_are_and_what_happens(plan, start, steps):
    mesh = make_mesh(mesh_config(data=2, fsdp=4))
    found = lines(opening(Path("/runs/a b"), plan, start, mesh))
    assert found["steps"] == steps
    assert found["devices"] == "8 x cpu (data 2, fsdp 4)"
    assert found["watch"] == "tensorboard --logdir='/runs/a b'"
    for name in ("/runs/a b/", "config.json", "run.json", "checkpoints", "metrics.jsonl"):
        assert name in found["run"]


# Case F7
def test_the_last_lines_say_what_is_next(plan):
    found = lines(closing(Path("/runs/a b"), plan))
    assert "all 10 steps" in found["done"] and found["result"] == "/runs/a b/evaluation.json"
    prompt = f"--prompt={plan.config.sample_prompt}"
    command = ["python", "-m", "experiments.generate", "--workdir=/runs/a b", prompt]
    assert shlex.split(found["next"]) == command
    assert shlex.split(found["or"])[2:] == ["experiments.evaluate", "--workdir=/runs/a b"]
