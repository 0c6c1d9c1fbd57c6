"""Where curves go: chosen by name, opened late, and never the end of a run."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.train import writers
from lightning_jax.train.metrics import MetricsWriter, read_rows

CONFIG = {"seed": 7, "model": {"model_dim": 8}}


class Fake:
    """A package with the interface that `trackers` takes of wandb and trackio."""

    def __init__(self):
        self.opened, self.logged, self.finished, self.error = [], [], 0, None
        self.Settings = lambda **values: values
        self.Html = self.Markdown = lambda text: ("text", text)
        self.Histogram = lambda values: ("histogram", [*values])

    def init(self, **options):
        self.opened.append(options)
        self._fail()
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values, step=None):
        self._fail()
        values = dict(values)
        self.logged.append((values.pop("step", step), values))

    def finish(self):
        self.finished += 1

    def _fail(self):
        if self.error:
            raise self.error


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, monkeypatch):
    fake = Fake()
    fake.__spec__ = SimpleNamespace(name=request.param)
    monkeypatch.setitem(sys.modules, request.param, fake)
    return request.param, fake


def session(workdir, names, resume_step=0, steps=(1, 2)):
    with MetricsWriter(workdir, resume_step=resume_step, config=CONFIG, names=names) as writer:
        for step in steps:
            writer.write({"step": step, "loss": 0.5 * step})
        writer.histogram("params/absmax", np.array([1.0, np.nan]), steps[-1])
        writer.sample("<a>", steps[-1])


def test_a_tracker_gets_curves_histograms_and_texts(tracker, tmp_path):
    name, fake = tracker
    writers.require([name])
    session(tmp_path, [name])
    assert fake.logged[:2] == [(1, {"loss/train": 0.5}), (2, {"loss/train": 1.0})]
    assert fake.logged[2] == (2, {"params/absmax": ("histogram", [1.0])})
    step, sample = fake.logged[3]
    assert step == 2 and ("&lt;a&gt;" if name == "wandb" else "<a>") in sample["sample"][1]
    assert fake.finished == 1 and fake.opened[0]["config"] == CONFIG
    assert not (tmp_path / "tensorboard").exists()


def test_a_later_session_goes_on_with_the_same_run(tracker, tmp_path):
    name, fake = tracker
    session(tmp_path, [name])
    session(tmp_path, [name, "tensorboard"], resume_step=1, steps=(2, 3))
    first, second = fake.opened
    kept = json.loads((tmp_path / "trackers.json").read_text())["name"]
    assert first["name"] == second["name"] == kept and kept.startswith(tmp_path.name)
    assert first["resume"] == "allow" and first.get("id", kept) == kept
    assert (tmp_path / "tensorboard").is_dir()
    (tmp_path / "trackers.json").write_text('{"name": 3}')
    with pytest.raises(UserError, match="trackers.json"):
        writers._tracked_name(tmp_path)


def test_a_tracker_that_fails_is_said_once_and_stops_nothing(tracker, tmp_path, caplog):
    name, fake = tracker
    with MetricsWriter(tmp_path, resume_step=0, names=[name]) as writer:
        writer.write({"step": 1, "loss": 1.0})
        fake.error = OSError("no network")
        for step in (2, 3):
            writer.write({"step": step, "loss": 1.0})
        fake.error = None
        writer.write({"step": 4, "loss": 1.0})
    assert [step for step, _ in fake.logged] == [1, 4]
    assert caplog.messages == [f"{name}: no network; the run goes on", f"{name}: 2 calls failed"]
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_tracker_that_cannot_be_opened_is_not_tried_at_every_step(tracker, tmp_path, caplog):
    name, fake = tracker
    fake.error = RuntimeError("not logged in\nsee the manual")
    session(tmp_path, [name])
    assert len(fake.opened) == 1 and not fake.finished
    assert caplog.messages[0] == f"{name}: not logged in see the manual; the run goes on"
    assert caplog.messages[1:] == [f"{name}: 4 calls failed"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"writers: 'tensorbord': must be .*tensorboard"),
        ([""], "writers: ''"),
        (["tensorboard", "tensorboard"], "a name is given twice"),
        (["wandb"], r"writers: wandb is not installed: .*pip.* install .*lightning_jax\[wandb\]"),
    ],
)
def test_names_are_checked_before_anything_is_written(names, message, monkeypatch):
    find = writers.importlib.util.find_spec
    monkeypatch.setattr(
        writers.importlib.util, "find_spec", lambda n: None if n == "wandb" else find(n)
    )
    writers.require([])
    with pytest.raises(UserError, match=message) as error:
        writers.require(names)
    assert "\n" not in str(error.value)
