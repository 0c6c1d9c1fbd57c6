"""A compilation in a process of its own: its answer, and the lines about what goes wrong there."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lightning_jax import sharding
from lightning_jax.aot import compiling, programs, topologies
from lightning_jax.aot.programs import Shape
from lightning_jax.aot.topologies import Slice
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.train import placement
from lightning_jax.train.optimizer import make_optimizer
from lightning_jax.train.plan import Plan
from tests.tiny import mesh_config, tiny_config

ROOT = Path(__file__).parents[2]
# A dense model whose arrays fill the tiles of a TPU.
SIZES = {
    "vocab_size": 256,
    "model_dim": 256,
    "unit": "L",
    "num_units": 2,
    "mlp_dim": 256,
    "compute_dtype": "bfloat16",
    "attention.head_dim": 128,
    "attention.window": 128,
    "moe.num_experts": 0,
}


def config():
    sizes = {f"model__{name.replace('.', '__')}": value for name, value in SIZES.items()}
    return build(RunConfig, tiny_config(**sizes))


def task():
    return compiling.Task(config(), Slice.parse("v5e:2x2"), "train", Shape())


def test_a_request_is_json_that_gives_the_task_back():
    request = json.loads(json.dumps(task().request()))
    assert RunConfig.parse(request["config"], "config") == config()
    assert Shape(**request["shape"]) == Shape()
    assert Slice(request["generation"], tuple(request["sizes"]), request["slices"]) == (
        task().topology
    )


ABORT = """\
WARNING: something
F1127 16:47:44.081388   17548 statusor.cc:99] Check failed: chip_bounds().y <= 16
*** Check failure stack trace: ***
"""


@pytest.mark.parametrize(
    ("status", "log", "kind", "words"),
    [
        (-6, ABORT, UserError, "libtpu ended the process: Check failed: chip_bounds().y <= 16"),
        (-11, "", UserError, "libtpu ended the process: SIGSEGV"),
        (-9, "", UserError, "needs more memory than is here"),
        (1, "Traceback: ours", RuntimeError, "Traceback: ours"),
    ],
)
def test_a_process_that_fails(monkeypatch, status, log, kind, words):
    done = SimpleNamespace(returncode=status, stderr=log)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(kind, match="train on v5e:2x2") as error:
        compiling.run_task(task())
    assert words in str(error.value)


def test_bad_input_that_only_the_process_sees(monkeypatch):
    def refuse(command, **kwargs):
        Path(command[-1]).write_text(json.dumps({"error": "mesh = 3: must be 4"}))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(UserError, match="train on v5e:2x2: mesh = 3: must be 4"):
        compiling.run_task(task())


def test_checks_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr(topologies, "versions", dict)
    assert compiling.check(config(), ("train",), Shape()) == config()
    with pytest.raises(UserError, match=r"programs = 'encode': must be one of train"):
        compiling.check(config(), ("encode",), Shape())
    with pytest.raises(UserError, match=r"stage = 'x': must be one of stable, decay"):
        compiling.check(config(), ("train",), Shape(stage="x"))
    with pytest.raises(UserError, match=r"rows = 0: must be at least 1"):
        compiling.check(config(), ("train",), Shape(rows=0))
    bytes_only = dataclasses.replace(
        config(), model=dataclasses.replace(config().model, vocab_size=0)
    )
    assert compiling.check(bytes_only, (), Shape()).model.vocab_size > 256


def test_the_stage_is_the_longest_or_the_one_asked_for():
    values = tiny_config()
    values.stages.decay.seq_len = 1024
    long = build(RunConfig, values)
    assert programs.segment_of(long, None).stage.name == "decay"
    assert programs.segment_of(long, "stable").seq_len == 512
    with pytest.raises(UserError, match="stage = 'stabel'"):
        programs.segment_of(long, "stabel")


def test_bytes_of_one_device():
    mesh = sharding.make_mesh(mesh_config(data=2, fsdp=2), jax.devices()[:4])
    split = jax.ShapeDtypeStruct((8, 6), "bfloat16", sharding=sharding.batch_sharding(mesh))
    whole = jax.ShapeDtypeStruct((3,), "float32", sharding=sharding.replicated(mesh))
    keys = jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype, sharding=sharding.replicated(mesh))
    assert programs.local_bytes([split, whole]) == 2 * 6 * 2 + 12
    assert programs.local_bytes(keys) == 64


def state_bytes():
    """Bytes of one device's state, batch and knobs of the run on data 2 x fsdp 2."""
    mesh = sharding.make_mesh(mesh_config(data=2, fsdp=2), jax.devices()[:4])
    run = config()
    segment = Plan.of(run).segments[0]
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(run.optimizer, placement.lm.logical_axes(run.model))
        state = placement.abstract_state(run, optimizer, mesh)
    knobs = 4 * len(jax.tree.leaves(Plan.of(run).knobs(0)))
    batch = placement.abstract_batch(segment, mesh)
    return programs.local_bytes((state, batch)) + knobs


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-aot)"
)
def test_the_program_from_end_to_end(tmp_path):
    flags = [f"--config.model.{name}={value}" for name, value in SIZES.items()]
    flags += ["--config.mesh.fsdp=2", "--topology=v5e:2x2", "--programs=train,decode", "--rows=8"]
    flags += ["--config.stages.stable.batch_size=8", f"--out={tmp_path / 'out.json'}"]
    command = [sys.executable, "-m", "experiments.aot_compile", "--config=configs/base.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert (found["topology"], found["chips"]) == ("v5e:2x2", 4)
    assert found["mesh"]["data"] == found["mesh"]["fsdp"] == 2
    assert "largest buffers" in done.stderr and "--topology=v5e:2x2" in found["command"]
    assert set(found["programs"]) == {"train", "decode"}
    for entry in found["programs"].values():
        held, time = entry["memory"], entry["roofline"]
        assert entry["fits"] and 0 < held["peak"] < held["hbm"]
        assert held["program"] > 1e6 and held["temporaries"] > 0
        # Scalars take 512 bytes, and what is padded to a tile is small here.
        assert 0 <= held["arguments"] - entry["argument_bytes"] < 100_000
        assert entry["largest_buffers"][0]["bytes"] > 0
        assert entry["flops"]["products"] > 0 < entry["bytes"]["scheduled"]
        assert 0 < time["step_s"] <= time["scheduled_s"] <= time["sum_s"]
        assert 0 < time["mfu"] <= 1
        assert entry["compile"]["wall_s"] > 0
    train = found["programs"]["train"]
    assert train["argument_bytes"] == state_bytes()
    # What our accounting needs, and what the products of the program say: attention is a kernel.
    assert train["flops"]["products"] == pytest.approx(train["flops"]["model"], rel=0.25)
    assert train["flops"]["kernel_calls"] >= 2 * 2
    gathers = [row for row in train["collectives"] if row["kind"] == "all-gather"]
    assert any(row["axes"] == ["fsdp"] for row in gathers)
    # Serving splits no weights here, so a decode step exchanges next to nothing.
    assert sum(row["bytes"] for row in found["programs"]["decode"]["collectives"]) < 1e5
