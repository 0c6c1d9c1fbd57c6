"""Strict rules, mesh errors, and eight emulated devices that agree with one."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax import sharding
from lightning_jax.config import MeshConfig, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.sharding import Rules
from lightning_jax.train import placement, step
from lightning_jax.train.placement import put_batch
from lightning_jax.train.plan import Plan
from tests.tiny import random_batch, tiny_config

ONE = dict(data=1, fsdp=1, expert=1, tensor=1, sequence=1)


def test_rules_map_names_and_refuse_typos_and_collisions():
    mesh = sharding.make_mesh(MeshConfig(**{**ONE, "fsdp": 8}))
    stored, in_use = Rules.of(mesh, stored=True), Rules.of(mesh)
    assert stored.spec("embed", "heads", "head") == P("fsdp", None, None)
    assert in_use.spec("batch", None, "embed") == P(("data", "fsdp"), None, None)
    with pytest.raises(ValueError, match='did you mean "embed"'):
        stored.spec("embd")
    with pytest.raises(ValueError, match="twice"):
        stored.spec("batch", "embed")


@pytest.mark.parametrize("axis", ["expert", "tensor", "sequence"])
def test_reserved_axes_are_refused_in_one_line(axis):
    with pytest.raises(UserError, match=f"mesh.{axis} = 2: .*reserved.* use mesh.data and mesh.f"):
        sharding.make_mesh(MeshConfig(**{**ONE, axis: 2}))
    sharding.make_mesh(MeshConfig(**{**ONE, "data": 4, "fsdp": 2}))  # its advice


def test_mesh_sizes():
    assert sharding.make_mesh(MeshConfig(**{**ONE, "data": -1})).shape["data"] == 8
    mesh = sharding.make_mesh(MeshConfig(**{**ONE, "data": 2, "fsdp": -1}))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 4)
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(MeshConfig(**{**ONE, "data": 3}))
    sharding.make_mesh(MeshConfig(**{**ONE, "data": 8}))  # its advice
    with pytest.raises(UserError, match="model.model_dim = 36"):
        config = build(RunConfig, tiny_config(model__model_dim=36))
        sharding.check_divisible(
            config.model, 8, "batch", sharding.make_mesh(MeshConfig(**{**ONE, "fsdp": 8}))
        )
    mesh, config = (
        sharding.make_mesh(MeshConfig(**{**ONE, "fsdp": 8})),
        build(RunConfig, tiny_config()),
    )
    with pytest.raises(UserError, match="batch = 4: must be a multiple of the 8"):
        sharding.check_divisible(config.model, 4, "batch", mesh)
    sharding.check_divisible(config.model, 8, "batch", mesh)  # its advice


@functools.cache
def train(data, fsdp, accumulate):
    """Three steps on a mesh, twice: (loss and gradient of the first batch, [(losses, state)])."""
    config = build(
        RunConfig,
        tiny_config(
            model__vocab_size=64,
            model__unit="Gg",
            model__moe__switch_weight=0.1,
            model__moe__partition_weight=0.1,
            model__attention__sinks=True,
        ),
    )
    stage = dataclasses.replace(
        config.stages[0], batch_size=16, seq_len=24, warmup_tokens=0, learning_rate=0.01
    )
    config = dataclasses.replace(config, stages=(stage,))
    mesh = sharding.make_mesh(
        MeshConfig(**{**ONE, "data": data, "fsdp": fsdp}), jax.devices()[: data * fsdp]
    )
    knobs = Plan.of(config).knobs(0)
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(config, mesh)
        batches = [put_batch(random_batch(16, 24, 64, seed), mesh) for seed in range(3)]
        state = program.init()
        compute = functools.partial(step.loss_and_grad, config, accumulate=accumulate)
        value, _, grads = jax.jit(compute)(state.params, state.router, batches[0], knobs)
        runs = []
        for _ in range(2):
            state, losses = program.init(), []
            for batch in batches:
                state, metrics = program.step(state, batch, knobs, accumulate)
                losses.append(float(metrics["loss"]))
            runs.append((losses, state))
    return jax.device_get((value, grads)), runs


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_eight_devices_equal_one_and_repeat_bit_for_bit(data, fsdp):
    one, [(one_losses, _), _] = train(1, 1, 1)
    eight, [(losses, state), (again_losses, again)] = train(data, fsdp, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), eight, one)
    np.testing.assert_allclose(losses, one_losses, atol=1e-5)

    gate = state.params["units"]["0_G"]["moe"]["gate_EDF"]
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.optimizer)
        if "0_G" in jax.tree_util.keystr(path) and "gate_EDF" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2
    for leaf in (gate, *moments):
        assert leaf.sharding.spec == P(None, None, "fsdp", None)
        assert leaf.addressable_shards[0].data.shape[2] == leaf.shape[2] // fsdp
    assert state.router.bias_URE.sharding.is_fully_replicated

    assert losses == again_losses
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.params, again.params)))
