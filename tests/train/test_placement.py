"""Where batches and states lie, and one compiled step for all knobs, also for devices not here."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.tpu_static import environment
from lightning_jax import accounting, sharding
from lightning_jax import model as lm
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.ops.attention import check_device
from lightning_jax.ops.exchange import check_transport
from lightning_jax.train import placement, step
from lightning_jax.train.plan import Plan
from tests.tiny import mesh_config, random_batch, tiny_config, tiny_run

ROOT = Path(__file__).resolve().parents[2]
DENSE = dict(model__vocab_size=64, model__unit="G", model__moe__num_experts=0)


def run_of(**changes):
    config = build(RunConfig, tiny_config(**{"model__vocab_size": 64, **changes}))
    stage = dataclasses.replace(config.stages[0], batch_size=8, seq_len=24)
    return dataclasses.replace(config, stages=(stage,))


def mesh_of(data, fsdp):
    config = mesh_config(data=data, fsdp=fsdp)
    return sharding.make_mesh(config, jax.devices()[: data * fsdp])


def specs(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf.sharding.spec for path, leaf in leaves}


def test_the_bytes_of_a_state_on_each_device():
    run, whole, split = run_of(), mesh_of(1, 1), mesh_of(1, 4)
    optimizer = placement.make_optimizer(run.optimizer, lm.logical_axes(run.model))

    def state_bytes(mesh):
        return placement.state_bytes(placement.abstract_state(run, optimizer, mesh))

    found, parameters = state_bytes(whole), 4 * accounting.parameters(run.model).total
    assert found["parameters"] == parameters and set(found) == {"parameters", "optimizer state"}
    # Two moments of each, and a few counters.
    assert 0 <= found["optimizer state"] - 2 * parameters < 64
    # Vectors are whole on every device.
    assert parameters / 4 < state_bytes(split)["parameters"] < parameters / 3.5


def test_a_mesh_that_batch_or_width_do_not_divide_over_is_refused():
    plan = Plan.of(tiny_run("unread", mesh__fsdp=2, mesh__data=1))
    with pytest.raises(UserError, match="mesh = .*8 devices"):
        placement.make_mesh(plan)
    plan = Plan.of(tiny_run("unread", mesh__fsdp=2))
    field = "stages.stable.batch_size / accumulate = 4: must be .* mesh.data . mesh.fsdp = 8, such"
    with pytest.raises(UserError, match=field):
        placement.make_mesh(plan)
    wide = dataclasses.replace(plan.config.stages[0], batch_size=16, accumulate=2)
    assert placement.make_mesh(Plan.of(dataclasses.replace(plan.config, stages=(wide,)))).size == 8


# Case D5
@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [
        ("pallas_tpu", "cpu", "runs on tpu, and this run's devices are cpu"),
        ("pallas_gpu", "tpu", "runs on gpu, and this run's devices are tpu"),
        ("pallas_gpu", "gpu", "needs a head_dim out of 16, 32, 64, 128, 256, not 8"),
    ],
)
def test_attention_that_the_devices_do_not_have_is_refused(name, platform, message):
    with pytest.raises(UserError, match=f"implementation = '{name}': {message}"):
        check_device(name, platform, 8)
    for fits in ("", "reference", "xla_banded"):
        check_device(fits, platform, 8)
    run = run_of(model__attention__implementation="pallas_tpu")
    with pytest.raises(UserError, match="runs on tpu, and this run's devices are cpu"):
        placement.make_mesh(Plan.of(run))


def test_experts_that_the_devices_do_not_have_are_refused():
    run = run_of(model__moe__implementation="pallas_gpu")
    message = "model.moe.implementation = 'pallas_gpu': runs on gpu, and this run's devices are cpu"
    with pytest.raises(UserError, match=message):
        placement.make_mesh(Plan.of(run))


def test_a_transport_that_the_devices_do_not_have_is_refused():
    ragged = dict(model__moe__transport="ragged_all_to_all")
    stage = dataclasses.replace(run_of().stages[0], batch_size=8, accumulate=1)
    run = dataclasses.replace(run_of(mesh__data=4, mesh__expert=2, **ragged), stages=(stage,))
    with pytest.raises(UserError, match="transport = 'ragged_all_to_all': runs on tpu and gpu"):
        placement.make_mesh(Plan.of(run))
    check_transport("ragged_all_to_all", "tpu")
    # Without experts elsewhere nothing is exchanged.
    alone = dataclasses.replace(run_of(mesh__data=8, **ragged), stages=(stage,))
    assert placement.make_mesh(Plan.of(alone)).size == 8


# Right numbers, but the same tokens on all devices of an expert group.
def test_a_batch_that_is_not_split_over_the_experts_devices_is_refused():
    config = run_of(mesh__data=2, mesh__expert=4)
    mesh, segment = sharding.make_mesh(config.mesh), Plan.of(config).segments[0]
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(config, mesh)
        described = placement.abstract_batch(segment, mesh)
        assert described.tokens.sharding.spec == P(("data", "expert"), None)
        batch = random_batch(*described.tokens.shape, 64)
        batch = jax.device_put(batch, jax.NamedSharding(mesh, P("data")))
        knobs = Plan.of(config).knobs(0)
        with pytest.raises(ValueError, match="(?s)Sharding.*does not match.*'data', 'exp"):
            program.step(program.abstract_state, batch, knobs, 1)


@pytest.mark.parametrize(("sizes", "part"), [({"fsdp": 8}, (1, 24)), ({"sequence": 2}, (2, 12))])
def test_batches_lie_where_the_abstract_batch_says(sizes, part):
    mesh = sharding.make_mesh(mesh_config(**{"data": 8 // max(sizes.values()), **sizes}))
    segment = Plan.of(run_of()).segments[0]
    host = random_batch(8, 24, 64)
    abstract = placement.abstract_batch(segment, mesh)
    for put in (placement.put_batch, placement.put_whole):
        batch = put(host, mesh)
        jax.tree.map(np.testing.assert_array_equal, batch, host)
        for leaf, described in zip(batch, abstract, strict=True):
            assert (leaf.shape, leaf.dtype) == (described.shape, described.dtype)
            assert leaf.sharding == described.sharding
    assert batch.tokens.addressable_shards[0].data.shape == part


def test_what_mirrors_a_parameter_is_split_as_it_is():
    config, mesh = run_of(optimizer__ema_decay=0.9, optimizer__name="muon"), mesh_of(2, 4)
    with jax.set_mesh(mesh):
        state = placement.TrainProgram(config, mesh).abstract_state
    found = specs(state)
    gate = {name: spec for name, spec in found.items() if "'gate_EDF'" in name}
    # The parameter, its average and its momentum of Muon, in both layers.
    assert len(gate) == 6 and set(gate.values()) == {P(None, None, "fsdp", None)}
    assert found[".step"] == found[".router.bias_URE"] == P()
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))


def test_items_give_the_state_back():
    for changes in ({}, {"optimizer__ema_decay": 0.9}):
        state = placement.TrainProgram(run_of(**changes), mesh_of(1, 1)).abstract_state
        items = placement.items_from_state(state)
        assert ("ema" in items) == bool(changes)
        assert placement.state_from_items(items) == state


@pytest.fixture
def traces(monkeypatch):
    """Counts how often the train step is traced."""
    counted, train_step = [], step.train_step

    def counting(*args, **kwargs):
        counted.append(kwargs["accumulate"])
        return train_step(*args, **kwargs)

    monkeypatch.setattr(step, "train_step", counting)
    return counted


@pytest.mark.slow
def test_stages_that_differ_in_knobs_share_one_trace(traces):
    """Other rates and RoPE bases in the stages, other loss weights: one program for all."""
    config = run_of(model__unit="G")
    (stage,) = config.stages
    other = dataclasses.replace(stage, name="b", learning_rate=0.5, rope_base_global=5e5)
    heavy = dataclasses.replace(config.model.moe, z_weight=0.5, partition_weight=0.25)
    weighted = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, moe=heavy),
        optimizer=dataclasses.replace(config.optimizer, z_loss_weight=0.0),
    )
    plan = Plan.of(dataclasses.replace(config, stages=(stage, other)))
    first, second = plan.segments
    knobs = [
        plan.knobs(first.first_step),
        plan.knobs(first.end_step - 1),
        plan.knobs(second.first_step),
        Plan.of(weighted).knobs(7),
    ]
    mesh = mesh_of(1, 1)
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(plan.config, mesh)
        batch = placement.abstract_batch(first, mesh)
        for values in knobs:
            program.step.trace(program.abstract_state, batch, values, 1)
        assert traces == [1]
        program.step.trace(program.abstract_state, batch, knobs[0], 2)
        assert traces == [1, 2]


@pytest.mark.slow
def test_losses_that_the_run_does_not_use_are_not_computed():
    weights = dict.fromkeys(("switch", "group", "partition", "true_group", "z", "entropy"), 0.0)
    with_weights = {f"model__moe__{name}_weight": w for name, w in weights.items()}
    mesh, counts = mesh_of(1, 1), {}
    for z_weight in (0.0, 0.1):
        config = run_of(**{**with_weights, "model__unit": "G", "model__moe__z_weight": z_weight})
        plan = Plan.of(config)
        with jax.set_mesh(mesh):
            program = placement.TrainProgram(config, mesh)
            batch = placement.abstract_batch(plan.segments[0], mesh)
            # With accumulation a balance loss costs a forward pass that counts first.
            traced = program.step.trace(program.abstract_state, batch, plan.knobs(0), 2)
        counts[z_weight] = str(traced.jaxpr).count(" scan[")
    assert counts[0.0] < counts[0.1]


@pytest.mark.slow
def test_a_new_value_of_a_knob_compiles_nothing_and_acts():
    config, mesh = run_of(**DENSE), mesh_of(1, 1)
    plan = Plan.of(config)
    base = plan.knobs(0)._replace(learning_rate=np.float32(0.01))
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(config, mesh)
        batch = placement.put_batch(random_batch(8, 24, 64), mesh)
        before = jax.device_get(program.init().params)

        def take(**changes):
            values = {name: np.float32(value) for name, value in changes.items()}
            state, metrics = program.step(program.init(), batch, base._replace(**values), 1)
            return jax.device_get((state.params, metrics))

        params, metrics = take()
        still, _ = take(learning_rate=0)
        _, turned = take(rope_base_global=100.0)
        _, heavy = take(z_loss_weight=1.0)
        assert program.step._cache_size() == 1
    jax.tree.map(np.testing.assert_array_equal, still, before)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, before)
    assert min(jax.tree.leaves(moved)) > 0
    assert metrics["loss"] != turned["loss"] and metrics["loss"] == heavy["loss"]
    ratio = heavy["output_z_loss"] * base.z_loss_weight / metrics["output_z_loss"]
    np.testing.assert_allclose(ratio, 1, rtol=1e-5)


def test_states_of_a_mesh_without_devices():
    mesh = AbstractMesh((1, 2, 4, 1, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 6)
    config = run_of()
    with jax.set_mesh(mesh_of(2, 4)):
        expected = placement.TrainProgram(config, mesh_of(2, 4)).abstract_state
    with jax.sharding.use_abstract_mesh(mesh):
        state = placement.TrainProgram(config, mesh).abstract_state
    assert specs(state) == specs(expected)


AHEAD = """
import dataclasses, json, jax
from jax.experimental import topologies
from lightning_jax import sharding
from lightning_jax.train import placement
from lightning_jax.train.plan import Plan
from tests.train.test_placement import run_of

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
config = run_of()
mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=2, fsdp=4), devices)
plan = Plan.of(config)
with jax.set_mesh(mesh):
    program = placement.TrainProgram(config, mesh)
    batch = placement.abstract_batch(plan.segments[0], mesh)
    program.step.trace(program.abstract_state, batch, plan.knobs(0), 1)
kinds = {d.device_kind for leaf in jax.tree.leaves(program.abstract_state)
         for d in leaf.sharding.device_set}
print(json.dumps(sorted(kinds)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-aot)"
)
def test_the_step_is_traced_for_tpus_that_are_not_here():
    done = subprocess.run(
        [sys.executable, "-c", AHEAD],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == ["TPU v5 lite"]
