"""Restore and `load_run`: digests before parsing, strictness, and the way out of each error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model, sharding
from lightning_jax.checkpoint import Checkpointer, checkpoints_dir, load_run, read_meta, reading
from lightning_jax.config import CheckpointMeta
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from tests.checkpoint.saved import FIRST, assert_bitwise, dataset, make_params, save_one
from tests.tiny import mesh_config, tiny_run

PROGRAMS = Path(__file__).resolve().parents[2] / "experiments"


def flip_a_bit(folder, item):
    largest = max(folder.rglob(f"{item}/ocdbt*/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# Case F3: files that Orbax would parse are compared with their digests first.
DAMAGES = {
    "flipped bit": (lambda folder: flip_a_bit(folder, "params"), "params/.* is damaged"),
    "no metadata": (lambda f: (f / "params/_METADATA").unlink(), "params/_METADATA is missing"),
    "other metadata": (
        lambda folder: edit_json(folder / "params/_METADATA", lambda m: m.clear()),
        "params/_METADATA is damaged",
    ),
    "broken iterator": (
        lambda folder: (folder / "data/process_0-of-1.json").write_text("{"),
        "data/process_0-of-1.json is damaged",
    ),
    "other step": (
        lambda folder: edit_json(folder / "meta/metadata", lambda m: m.update(step=11)),
        "meta/metadata is damaged",
    ),
    "other step metadata": (
        lambda folder: (folder / "_CHECKPOINT_METADATA").write_bytes(b"[" * 1000),
        "_CHECKPOINT_METADATA is damaged",
    ),
    "no item": (lambda folder: shutil.rmtree(folder / "params"), "params/.* is missing"),
    "no digests": (lambda folder: (folder / "sha256.json").unlink(), "sha256.json: no such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_one_line(tmp_path, damage):
    params = {"w": jax.random.normal(jax.random.key(0), (1 << 14,))}
    save_one(tmp_path, params=params, data_iterator=iter(dataset()))
    hurt, message = DAMAGES[damage]
    hurt(tmp_path / "checkpoints" / "10")
    with Checkpointer(tmp_path, keep=3) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(None, {"params": params}, iter(dataset()))
    start = f"cannot restore step 10 of {tmp_path}/checkpoints: "
    assert re.fullmatch(f"{start}.*{message}; no other checkpoint is good", str(caught.value))


def test_damage_elsewhere_does_not_stop_inference(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (1 << 14,))}
    save_one(tmp_path, params={"w": jnp.arange(4)}, optimizer=params)
    flip_a_bit(tmp_path / "checkpoints" / "10", "optimizer")
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        checkpointer.restore(None, {"params": {"w": jnp.arange(4)}})
        with pytest.raises(UserError, match="optimizer/.* is damaged"):
            checkpointer.restore(None, {"optimizer": params})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved run with the real model: (workdir, config, params, ema, router)."""
    workdir = tmp_path_factory.mktemp("run")
    settings = tiny_run("corpus.jsonl", model__vocab_size=64)
    params = jax.tree.map(
        lambda a: jnp.asarray(np.full(a.shape, 0.5, a.dtype)), model.abstract_params(settings.model)
    )
    ema = jax.tree.map(lambda a: jnp.asarray(np.asarray(a) + 1), params)
    router = model.init_router(settings.model)
    position = dict(tokens=99, stage="stable", seq_len=32, rope_base_global=1e4)
    metas = [to_dict(CheckpointMeta(config=settings, step=step, **position)) for step in (1, 2)]
    with Checkpointer(workdir, keep=2) as checkpointer:
        optimizer = {"mu": params}
        items = {"params": params, "router": router, "optimizer": optimizer}
        checkpointer.save(1, items, None, metas[0])
        checkpointer.save(2, items | {"ema": ema}, None, metas[1])
    return workdir, settings, params, ema, router


@pytest.mark.parametrize(
    ("step", "weights", "average"),
    [(1, "auto", False), (2, "auto", True), (2, "params", False), (None, "ema", True)],
)
def test_load_run(run, step, weights, average):
    workdir, settings, params, ema, router = run
    loaded = load_run(workdir, step=step, weights=weights)
    meta = loaded.meta
    assert (loaded.config, meta.step, meta.tokens) == (settings, step or 2, 99)
    assert read_meta(workdir, step) == meta
    assert [stage.name for stage in loaded.config.stages] == ["stable", "decay"]
    assert_bitwise(loaded.params, ema if average else params)
    assert_bitwise(loaded.router, router)
    assert {a.sharding for a in jax.tree.leaves((loaded.params, loaded.router))} == {FIRST}


def test_load_run_onto_a_mesh(run):
    workdir, settings, params, _, router = run
    mesh = sharding.make_mesh(mesh_config(fsdp=4, tensor=2))
    loaded = load_run(workdir, mesh=mesh, weights="params")
    assert_bitwise(loaded.params, params)
    table_VD = loaded.params["embed"]["table_VD"]
    assert table_VD.sharding.shard_shape(table_VD.shape) == (64 // 2, 32)  # as it is in use
    assert loaded.router.top_p.sharding == sharding.replicated(mesh)


def test_load_run_refuses(run, tmp_path):
    workdir = run[0]
    with pytest.raises(UserError, match="no checkpoint in"):
        load_run(tmp_path)
    with pytest.raises(UserError, match="it lacks ema"):
        load_run(workdir, step=1, weights="ema")
    with pytest.raises(UserError, match="weights = 'best'"):
        load_run(workdir, weights="best")
    save_one(tmp_path, params=make_params())
    with pytest.raises(UserError, match="step 10 .*lacks config in meta"):
        load_run(tmp_path)


def test_load_run_leaves_a_save_in_progress_alone(run):
    unfinished = checkpoints_dir(run[0]) / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert load_run(run[0]).meta.step == 2
    assert unfinished.is_dir()
    unfinished.rmdir()


@pytest.fixture
def damaged(run, tmp_path):
    """A run whose newest checkpoint is damaged, in a folder whose name a shell must quote."""
    workdir = tmp_path / "a run"
    shutil.copytree(run[0], workdir)
    flip_a_bit(checkpoints_dir(workdir) / "2", "params")
    return workdir


# Case A9
def test_the_good_older_checkpoint_is_named_for_inference(damaged):
    with pytest.raises(UserError) as caught:
        load_run(damaged, weights="params")
    words = (
        r"cannot restore step 2 of .*: params/\S+ is damaged; checkpoint 1 is good: use it with "
    )
    advice = re.fullmatch(words + r"--step=(\d+)", str(caught.value))
    assert load_run(damaged, step=int(advice[1])).meta.step == 1


def test_every_program_that_reads_checkpoints_has_the_flag_of_the_advice():
    readers = [path for path in PROGRAMS.glob("*.py") if "step=_STEP.value" in path.read_text()]
    assert {"evaluate", "generate", "convert", "lm_eval", "upcycle"} <= {
        path.stem for path in readers
    }
    assert all("_STEP = program.define_step()" in path.read_text() for path in readers)


# Case A9
def test_the_good_older_checkpoint_is_named_for_training(damaged, run):
    with Checkpointer(damaged, keep=2) as checkpointer:
        with pytest.raises(UserError) as caught:
            checkpointer.restore(None, {"params": run[2]})
        command = str(caught.value).split("to train on from it, first run ")[1]
        subprocess.run(command, shell=True, check=True)
        assert_bitwise(checkpointer.restore(None, {"params": run[2]}), {"params": run[2]})
        assert read_meta(damaged).step == 1
    assert (damaged / "damaged-2" / "params").is_dir()


def test_all_damaged_ones_are_moved_away_at_once(damaged, run):
    shutil.copytree(checkpoints_dir(run[0]) / "2", checkpoints_dir(damaged) / "3")
    (checkpoints_dir(damaged) / "3" / "sha256.json").write_text("[]")
    with pytest.raises(UserError, match="step 3 .*checkpoint 1 is good") as caught:
        read_meta(damaged)
    subprocess.run(str(caught.value).split("first run ")[1], shell=True, check=True)
    assert read_meta(damaged).step == 1


@pytest.mark.parametrize("copied", [False, True])
def test_a_number_that_is_not_the_step_is_noticed(run, tmp_path, copied):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    folder = checkpoints_dir(workdir)
    if copied:
        shutil.copytree(folder / "2", folder / "4")
    else:
        (folder / "2").rename(folder / "4")
    good = 2 if copied else 1
    words = (
        f"step 4 of .*: by its meta it is step 2: .*renamed or copied; checkpoint {good} is good"
    )
    with pytest.raises(UserError, match=words):
        load_run(workdir)
    with pytest.raises(UserError, match=words):
        read_meta(workdir)
    with Checkpointer(workdir, keep=2) as checkpointer, pytest.raises(UserError, match=words):
        checkpointer.restore(None, {"params": run[2]})


def test_weights_that_were_saved_and_are_gone_are_not_replaced_by_others(run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    shutil.rmtree(checkpoints_dir(workdir) / "2" / "ema")
    with pytest.raises(UserError, match="ema/.* is missing"):
        load_run(workdir)
    assert load_run(workdir, weights="params").meta.step == 2


def test_a_checkpoint_that_training_replaces_meanwhile_is_not_called_damaged(
    run, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(run[0], workdir)
    folder = checkpoints_dir(workdir) / "2"
    abstract_params = model.abstract_params

    def replaced(config):
        shutil.rmtree(folder)
        return abstract_params(config)

    monkeypatch.setattr(model, "abstract_params", replaced)
    with pytest.raises(UserError, match="; the run has replaced it by a newer one meanwhile$"):
        load_run(workdir)


def test_the_position_is_what_all_processes_know(tmp_path):
    parts = [{"streams": {"0": {"at": 5}, "1": {"at": 6}}}, {"streams": {"1": {"at": 6}, "2": {}}}]
    for index, part in enumerate(parts):
        (tmp_path / f"process_{index}-of-2.json").write_text(json.dumps(part))
    whole = {"streams": {"0": {"at": 5}, "1": {"at": 6}, "2": {}}}
    assert reading._position(tmp_path) == whole
