"""Whatever a run raises becomes its reason; only a signal ends its process without a word."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import jax
import pytest

from lightning_jax.ablation import child
from lightning_jax.ablation.results import FAILURE
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.train.workdir import claim
from tests.ablation.fake_runs import small_sweep
from tests.tiny import tiny_config

RUN = small_sweep().runs()[0]
CONFIG = small_sweep().config(RUN)


class Panic(BaseException):
    """What an extension raises that panics."""


def train(folder, monkeypatch, fault):
    def raise_it(*_, **__):
        raise fault

    monkeypatch.setattr(child.loop, "run", raise_it)
    return child.train(CONFIG, folder)


# Case F4


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (RuntimeError("a fault\nof ours"), "RuntimeError: a fault of ours"),
        (MemoryError(), "MemoryError: no reason given"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 16 G.\n More"),
            "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory: 16 G. More",
        ),
        (SystemExit(0), "SystemExit: 0"),
        (SystemExit("no"), "SystemExit: no"),
        (Panic("it panicked"), "Panic: it panicked"),
        (OSError(errno.EIO, "Input/output error", "/data/x"), "/data/x: Input/output error"),
        (ExceptionGroup("two", [ValueError("a"), UserError("b")]), "b"),
    ],
)
def test_whatever_a_run_raises_is_its_reason(tmp_path, monkeypatch, fault, reason):
    assert train(tmp_path, monkeypatch, fault) == reason
    kept = (tmp_path / FAILURE).read_text()
    assert kept.startswith(reason + "\n") and "Traceback" in kept and "in raise_it" in kept


def test_bad_input_needs_no_traceback(tmp_path, monkeypatch):
    assert train(tmp_path, monkeypatch, UserError("seed = -1")) == "seed = -1"
    assert (tmp_path / FAILURE).read_text() == "seed = -1\n"


@pytest.mark.parametrize("fault", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_is_no_reason(tmp_path, monkeypatch, fault):
    with pytest.raises(type(fault)):
        train(tmp_path, monkeypatch, fault)
    assert not list(tmp_path.iterdir())


def test_a_run_that_another_process_trains_has_not_failed(tmp_path):
    with claim(tmp_path):
        assert "in use by process" in (child.train(CONFIG, tmp_path) or "")
        assert not (tmp_path / FAILURE).exists()


@pytest.mark.slow
def test_the_process_answers_on_standard_output_alone(tmp_path):
    config = small_sweep(base=tiny_config(data__tokenizer=str(tmp_path / "none"))).config(RUN)
    request = child.Request(
        config=to_dict(config),
        folder=str(tmp_path / "run"),
        ways={},
        compiled=str(tmp_path / "compiled"),
        cores=[min(os.sched_getaffinity(0))],
        allow_changed_data=False,
        argv=["sweep"],
        orig_argv=["python", "sweep"],
    )
    process = subprocess.Popen(
        [sys.executable, "-m", child.__name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert process.stdin and process.stdout
    # Standard input stays open: at its end the process would be ended.
    process.stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
    process.stdin.flush()
    [failure] = json.loads(process.stdout.read()).values()
    assert process.wait() == 0 and str(tmp_path / "none") in failure
    process.communicate()
