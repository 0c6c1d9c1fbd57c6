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
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from lightning_jax import checkpoint, sharding
from lightning_jax.checkpoint import Checkpointer, load_run, read_meta
from lightning_jax.config import CheckpointMeta, MeshConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.runtime.files import write_json

FIRST = SingleDeviceSharding(jax.devices()[0])


def make_params(layers=4, dtype=jnp.float32):
    """Parameters stacked over layers, as the model's units are."""
    random = np.random.default_rng(0)
    return {
        "embed": {"table_VD": jnp.asarray(random.normal(size=(24, 16)), jnp.float32)},
        "units": {"mlp": {"up_DF": jnp.asarray(random.normal(size=(layers, 16, 8)), dtype)}},
    }


def abstract(tree, where=FIRST):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def assert_bitwise(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert type(new) is type(old) or isinstance(old, jax.Array)
        new, old = np.asarray(new), np.asarray(old)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert new.tobytes() == old.tobytes()


def save_one(workdir, step=10, data_iterator=None, meta=None, **items):
    with Checkpointer(workdir, keep=3) as checkpointer:
        checkpointer.save(step, items, data_iterator, meta or {"step": step})


def steps_on_disk(workdir):
    return sorted(path.name for path in (Path(workdir) / "checkpoints").iterdir())


def dataset():
    return grain.MapDataset.range(1000).shuffle(seed=3).repeat().batch(4).to_iter_dataset()


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
        assert checkpointer.latest_step() == 10
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
        assert checkpointer.latest_step() is None
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
        assert steps_on_disk(tmp_path) == ["1"] and checkpointer.latest_step() == 1
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
    assert checkpointer.latest_step() == 1
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
        assert checkpointer.latest_step() is None


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


def _truncate(folder):
    largest = max(folder.rglob("ocdbt*/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def _flip_a_bit(folder):
    largest = max(folder.rglob("ocdbt*/d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


DAMAGES = {
    "flipped bit": _flip_a_bit,
    "truncated array": _truncate,
    "no arrays": lambda folder: [path.unlink() for path in folder.rglob("d/*")],
    "no manifest": lambda folder: [path.unlink() for path in folder.rglob("manifest.ocdbt")],
    "no metadata": lambda folder: (folder / "params/_METADATA").unlink(),
    "broken metadata": lambda folder: (folder / "params/_METADATA").write_text('{"tree'),
    "no digests": lambda folder: (folder / "sha256.json").unlink(),
    "broken iterator": lambda folder: (folder / "data/process_0-of-1.json").write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_one_line(tmp_path, damage):
    params = {"w": jax.random.normal(jax.random.key(0), (1 << 14,))}
    save_one(tmp_path, params=params, data_iterator=iter(dataset()))
    DAMAGES[damage](tmp_path / "checkpoints" / "10")
    with Checkpointer(tmp_path, keep=3) as checkpointer, pytest.raises(UserError) as caught:
        checkpointer.restore(None, {"params": params}, iter(dataset()))
    message = str(caught.value)
    assert message.startswith(f"cannot restore step 10 of {tmp_path}/checkpoints: ")
    assert "\n" not in message


def test_damage_elsewhere_does_not_stop_inference(tmp_path):
    params = {"w": jax.random.normal(jax.random.key(0), (1 << 14,))}
    save_one(tmp_path, params={"w": jnp.arange(4)}, optimizer=params)
    _flip_a_bit(tmp_path / "checkpoints" / "10")
    with Checkpointer(tmp_path, keep=3) as checkpointer:
        checkpointer.restore(None, {"params": {"w": jnp.arange(4)}})
        with pytest.raises(UserError, match="optimizer/.* is damaged"):
            checkpointer.restore(None, {"optimizer": params})


def test_write_json_replaces_whole_files(tmp_path):
    path = tmp_path / "meta.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(UserError, match="cannot write .*: No such file or directory"):
        write_json(tmp_path / "absent" / "meta.json", {})


def test_import_and_start_do_not_load_orbax_or_grain(tmp_path):
    program = (
        "import sys; from lightning_jax.checkpoint import Checkpointer;"
        f"assert Checkpointer({str(tmp_path)!r}, keep=1).latest_step() is None;"
        "assert not {'grain', 'orbax.checkpoint'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_is_printed_even_at_log_level_info(tmp_path, caplog):
    caplog.set_level("INFO")
    save_one(tmp_path, params=make_params())
    assert not [r for r in caplog.records if "orbax" in r.pathname]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved run with the real model: (workdir, config, params, ema, router)."""
    from lightning_jax import model
    from tests import tiny

    workdir = tmp_path_factory.mktemp("run")
    settings = tiny.tiny_run("corpus.jsonl", model__vocab_size=64)
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
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4, expert=1, tensor=1, sequence=1))
    loaded = load_run(workdir, mesh=mesh, weights="params")
    assert_bitwise(loaded.params, params)
    table_VD = loaded.params["embed"]["table_VD"]
    assert table_VD.sharding.shard_shape(table_VD.shape) == (64, 32 // 4)
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
    unfinished = checkpoint.checkpoints_dir(run[0]) / "3.orbax-checkpoint-tmp"
    unfinished.mkdir()
    assert load_run(run[0]).meta.step == 2
    assert unfinished.is_dir()
    unfinished.rmdir()
