"""Checkpoints: bitwise round trips on any devices, strictness, retention, and every way to fail."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightning_jax.checkpoint import Checkpointer, all_steps, checkpoints_dir, load_run
from lightning_jax.config.errors import UserError
from tests.checkpoint.saved import (
    abstract,
    assert_bitwise,
    dataset,
    make_params,
    save_one,
    steps_on_disk,
)

BROKEN_SAVES = Path(__file__).with_name("broken_saves.py")


def test_round_trip_is_bitwise_for_every_kind_of_leaf(tmp_path):
    params = make_params()
    odd = jnp.array([0x7FC1, 0xFF81, 0x0001, 0x8000], jnp.uint16)
    items = {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "mixed": {
            "bfloat16_nan_and_denormal": jax.lax.bitcast_convert_type(odd, jnp.bfloat16),
            "int32": jnp.array([-(2**31), 2**31 - 1]),
            "bool": jnp.array([True, False]),
            "scalar": jnp.float32(0.1),
            "numpy": np.arange(3, dtype=np.int64) + 2**40,
            "tuple": (jnp.ones(2), [jnp.zeros(3, jnp.uint8)]),
        },
        "progress": {"step": 7, "tokens": 2**40, "rate": 0.1, "done": False},
        "router": {"bias": jnp.zeros((3, 0, 4)), "top_p": jnp.float32(0.7)},
        "nothing": {},
    }
    save_one(tmp_path, **items)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        assert_bitwise(checkpointer.restore(None, items), items)
        assert_bitwise(checkpointer.restore(10, {"params": abstract(params)}), {"params": params})


def test_the_caller_may_donate_and_overwrite_after_save(tmp_path):
    state, count = jnp.arange(1 << 20, dtype=jnp.float32), np.arange(1 << 20)
    items = {"params": {"w": state, "n": count}}
    expected = jax.tree.map(np.array, items)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        checkpointer.save(1, items, None, {"step": 1})
        count[:] = -1
        step = jax.jit(lambda x: x * -3, donate_argnums=0)
        for _ in range(5):
            state = step(state)
        assert_bitwise(checkpointer.restore(1, expected), expected)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(1, 8), (8, 1), (8, 4)])
def test_resharding_on_restore(tmp_path, saved_on, restored_on):
    def placement(count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",))
        split = {
            "embed": {"table_VD": PartitionSpec(None, "fsdp")},
            "units": {"mlp": {"up_DF": PartitionSpec(None, "fsdp", None)}},
        }
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), split)

    params = make_params()
    save_one(tmp_path, params=jax.device_put(params, placement(saved_on)))
    where = placement(restored_on)
    wanted = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, where
    )
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        restored = checkpointer.restore(None, {"params": wanted})["params"]
    assert_bitwise(restored, params)
    assert jax.tree.map(lambda a: a.sharding, restored) == where


def changed(params, change):
    return {
        "shape": lambda: make_params(layers=3),
        "dtype": lambda: make_params(dtype=jnp.bfloat16),
        "missing": lambda: params | {"head": {"kernel_DV": jnp.zeros((16, 24))}},
        "extra": lambda: {"embed": params["embed"]},
    }[change]()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("shape", "params/units/mlp/up_DF is float32[4, 16, 8] in it, not float32[3, 16, 8]"),
        ("dtype", "params/units/mlp/up_DF is float32[4, 16, 8] in it, not bfloat16[4, 16, 8]"),
        ("missing", "it lacks params/head/kernel_DV"),
        ("extra", "it has, beyond what is asked for, params/units/mlp/up_DF"),
    ],
)
def test_restore_names_the_parameter_that_differs(tmp_path, change, words):
    params = make_params()
    save_one(tmp_path, params=params)
    with Checkpointer(tmp_path, keep=3) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(None, {"params": abstract(changed(params, change))})
    assert words in str(caught.value) and "step 10" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_deeper_model_is_not_cut_to_size(tmp_path):
    save_one(tmp_path, params=make_params(layers=16))
    wanted = {"params": abstract(make_params(layers=12))}
    words = r"up_DF is float32\[16, .* not float32\[12, "
    with Checkpointer(tmp_path, keep=3) as checkpointer, pytest.raises(UserError, match=words):
        checkpointer.restore(None, wanted)


def test_requests_that_no_checkpoint_can_serve(tmp_path):
    params = make_params()
    wanted = {"params": abstract(params)}
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        with pytest.raises(UserError, match="no checkpoint in .*checkpoints"):
            checkpointer.restore(None, wanted)
        for step in (10, 20):
            checkpointer.save(step, {"params": params}, None, {"step": step})
        with pytest.raises(UserError, match="step 30 is not among 10, 20"):
            checkpointer.restore(30, wanted)
        with pytest.raises(UserError, match="it lacks ema"):
            checkpointer.restore(20, {"ema": abstract(params)})
        with pytest.raises(UserError, match="step 20 .*data"):
            checkpointer.restore(20, wanted, iter(dataset()))
        with pytest.raises(TypeError, match="needs a sharding"):
            checkpointer.restore(20, {"params": abstract(params, None)})
    with pytest.raises(UserError, match="mounted folder"):
        Checkpointer("gs://bucket/run", keep=1)
    with pytest.raises(UserError, match="keep = 0"):
        Checkpointer(tmp_path, keep=0)


def test_items_may_not_take_reserved_names(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=3)
    with pytest.raises(ValueError, match="reserved"):
        checkpointer.save(1, {"meta": make_params()}, None, {"step": 1})


def test_newest_and_ends_of_stages_are_kept_across_restarts(tmp_path):
    for steps in ((1, 2, 3), (4, 5, 6)):
        with Checkpointer(tmp_path, keep=2, keep_steps={2, 3}) as checkpointer:
            for step in steps:
                checkpointer.save(step, {"params": {"w": jnp.full(4, step)}}, None, {"step": step})
    assert steps_on_disk(tmp_path) == ["2", "3", "5", "6"]
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        restored = checkpointer.restore(3, {"params": {"w": jnp.zeros(4, jnp.int32)}})
    assert_bitwise(restored, {"params": {"w": jnp.full(4, 3)}})


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        for value in (1, 2):
            checkpointer.save(5, {"params": {"w": jnp.full(4, value)}}, None, {"step": 5})
        restored = checkpointer.restore(5, {"params": {"w": jnp.zeros(4, jnp.int32)}})
    assert_bitwise(restored, {"params": {"w": jnp.full(4, 1)}})


def test_data_iterator_continues_where_it_was_saved(tmp_path):
    iterator, params = iter(dataset()), make_params()
    for _ in range(5):
        next(iterator)
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        checkpointer.save(5, {"params": params}, iterator, {"step": 5})
        expected = [next(iterator) for _ in range(3)]
        fresh = iter(dataset())
        assert_bitwise(checkpointer.restore(5, {"params": params}, fresh), {"params": params})
    np.testing.assert_array_equal([next(fresh) for _ in range(3)], expected)
    files = [path.name for path in (tmp_path / "checkpoints/5/data").glob("process*")]
    assert files == ["process_0-of-1.json"]


KILLED = """
    import jax.numpy as jnp, sys, time
    from lightning_jax.checkpoint import Checkpointer

    class Stuck:
        def get_state(self):
            print("saving", flush=True)
            time.sleep(600)

    checkpointer = Checkpointer(sys.argv[1], keep=2)
    checkpointer.save(1, {"params": {"w": jnp.arange(1000)}}, None, {"step": 1})
    checkpointer.wait()
    state = {"params": {"w": jnp.arange(1000) + 1}, "more": {"w": jnp.ones((1 << 22))}}
    checkpointer.save(2, state, Stuck() if sys.argv[2] == "blocking" else None, {"step": 2})
    print("saving", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["blocking", "background"])
def test_kill_in_the_middle_of_a_save(tmp_path, part):
    program = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), part]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "saving\n"
        child.send_signal(signal.SIGKILL)
    assert any("2." in name for name in steps_on_disk(tmp_path)), "killed too late"
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        assert steps_on_disk(tmp_path) == ["1"]
        expected = {"params": {"w": jnp.arange(1000)}}
        assert_bitwise(checkpointer.restore(None, expected), expected)
        checkpointer.save(2, expected, None, {"step": 2})
    assert steps_on_disk(tmp_path) == ["1", "2"]


@pytest.fixture
def small_files():
    """A function after which no file may grow: the writer gets a real error from the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("surfaces_in", ["wait", "save", "restore", "close"])
def test_background_disk_error_surfaces_once_and_harms_nothing(tmp_path, small_files, surfaces_in):
    good = {"params": {"w": jnp.arange(4)}}
    large = {"params": {"w": jax.random.normal(jax.random.key(0), (1 << 17,))}}
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, good, None, {"step": 1})
    checkpointer.wait()
    small_files()
    checkpointer.save(2, large, None, {"step": 2})
    call = {
        "wait": checkpointer.wait,
        "save": lambda: checkpointer.save(3, good, None, {"step": 3}),
        "restore": lambda: checkpointer.restore(1, good),
        "close": checkpointer.close,
    }[surfaces_in]
    with pytest.raises(UserError, match=f"cannot save .*{tmp_path}/checkpoints: File too large$"):
        call()
    assert_bitwise(checkpointer.restore(None, good), good)
    if surfaces_in != "close":
        checkpointer.save(3, good, None, {"step": 3})
        checkpointer.close()
        assert steps_on_disk(tmp_path) == ["3"]


def test_full_disk_while_saving_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, {"params": {"w": jnp.arange(4)}}, None, {"step": 1})
    checkpointer.wait()
    monkeypatch.setattr(grain.checkpoint.CheckpointHandler, "save", full)
    with pytest.raises(UserError, match="checkpoints: No space left on device$"):
        checkpointer.save(2, {"params": {"w": jnp.arange(4)}}, iter(dataset()), {"step": 2})
    checkpointer.close()
    assert steps_on_disk(tmp_path) == ["1"]


def test_fault_of_ours_in_a_save_keeps_its_type(tmp_path):
    class Broken:
        def get_state(self):
            raise ZeroDivisionError("ours")

    with Checkpointer(tmp_path, keep=1) as checkpointer:
        with pytest.raises(ZeroDivisionError, match="ours"):
            checkpointer.save(1, {"params": {"w": jnp.arange(4)}}, Broken(), {"step": 1})
        assert not all_steps(checkpoints_dir(tmp_path))


def test_leaving_the_context_by_an_error_keeps_that_error(tmp_path, small_files):
    large = {"params": {"w": jax.random.normal(jax.random.key(0), (1 << 17,))}}
    with pytest.raises(KeyError) as caught, Checkpointer(tmp_path, keep=1) as checkpointer:
        small_files()
        checkpointer.save(1, large, None, {"step": 1})
        raise KeyError("first")
    assert "File too large" in caught.value.__notes__[0]


def test_workdir_that_cannot_hold_checkpoints(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=f"{tmp_path}/checkpoints: "):
        Checkpointer(tmp_path, keep=1)
    with pytest.raises(UserError, match="no checkpoint in"):
        load_run(tmp_path)


def test_import_and_start_do_not_load_orbax_or_grain(tmp_path):
    program = (
        "import sys; from lightning_jax.checkpoint import Checkpointer;"
        f"Checkpointer({str(tmp_path)!r}, keep=1);"
        "assert not {'grain', 'orbax.checkpoint'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_printed_even_at_log_level_info(tmp_path, caplog):
    caplog.set_level("INFO")
    save_one(tmp_path, params=make_params())
    assert not [r for r in caplog.records if "orbax" in r.pathname]


def break_saves(folder, kind, points):
    """Runs broken_saves.py; returns what it found and what it wrote to standard error."""
    program = [sys.executable, str(BROKEN_SAVES), str(folder), kind, str(points)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    result = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.mark.slow
def test_a_kill_at_any_file_call_of_a_save_leaves_one_of_two_right_states(tmp_path):
    found, said = break_saves(tmp_path, "kill", 30)
    assert found["calls"] > 40 and not found["bad"], said
    # The number is given once, near the end.
    assert found["newest"] == sorted(found["newest"]) and set(found["newest"]) == {1, 2}


# Case F3
@pytest.mark.slow
def test_a_disk_that_is_full_at_any_file_call_of_a_save_is_one_line(tmp_path):
    found, said = break_saves(tmp_path, "full", 15)
    assert found["calls"] > 40 and not found["bad"], said
    assert not said


class FileCalls:
    """Records syncs, renames and removals, in order."""

    def __init__(self, monkeypatch):
        self.calls = []
        for module, name in ((os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir")):
            monkeypatch.setattr(module, name, self.recorded(name, getattr(module, name)))
        fsync = os.fsync

        def record_fsync(descriptor):
            self.calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", record_fsync)

    def recorded(self, name, call):
        def record(path, *args, **options):
            self.calls.append((name, str(path), *map(str, args)))
            return call(path, *args, **options)

        return record

    def first(self, name, *paths):
        return self.calls.index((name, *map(str, paths)))


# Case F13
def test_all_of_a_checkpoint_is_synced_before_its_number_and_that_before_the_older_goes(
    tmp_path, monkeypatch
):
    items = {"params": make_params(), "optimizer": {"mu": jnp.ones(4)}}
    folder = tmp_path / "checkpoints"
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(1, items, iter(dataset()), {"step": 1})
        checkpointer.wait()
        calls = FileCalls(monkeypatch)
        checkpointer.save(2, items, iter(dataset()), {"step": 2})
        checkpointer.wait()
    temporary = folder / "2.orbax-checkpoint-tmp"
    numbered = calls.first("rename", temporary, folder / "2")
    inside = [path.relative_to(folder / "2") for path in (folder / "2").rglob("*")]
    assert len([path for path in inside if (folder / "2" / path).is_file()]) > 14
    synced = {path for name, path, *_ in calls.calls[:numbered] if name == "fsync"}
    # The list of digests is written under another name, in a folder that is synced after it.
    missing = {str(temporary / path) for path in inside} - synced
    assert missing == {str(temporary / "sha256.json")} and str(temporary) in synced
    gone = next(i for i, call in enumerate(calls.calls) if call[1] == str(folder / "1"))
    assert ("fsync", str(folder)) in calls.calls[numbered:gone]


def test_damage_in_older_checkpoints_does_not_stop_a_save(tmp_path):
    save_one(tmp_path, step=1, params=make_params())
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(b"[" * 9)
    save_one(tmp_path, step=2, params=make_params())
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        assert_bitwise(checkpointer.restore(2, {"params": make_params()})["params"], make_params())


# Case F13
def test_leftovers_of_killed_writers_go_at_the_next_start(tmp_path):
    save_one(tmp_path, step=1, params=make_params())
    (tmp_path / f".config.json.{os.getpid()}.1.tmp").write_text("{")
    (tmp_path / "checkpoints/2.orbax-checkpoint-tmp/params/d").mkdir(parents=True)
    Checkpointer(tmp_path, keep=1)
    assert steps_on_disk(tmp_path) == ["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_meta_of_another_step_is_a_fault_of_ours(tmp_path):
    with pytest.raises(ValueError, match="step = 1 in checkpoint 2"):
        Checkpointer(tmp_path, keep=1).save(2, {}, None, {"step": 1})
