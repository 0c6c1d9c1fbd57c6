"""Eight emulated devices, however they are arranged, agree with one: loss, gradients, metrics."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
from lightning_jax.ops import balance
from lightning_jax.train import evaluation, placement, step
from lightning_jax.train.placement import put_batch
from lightning_jax.train.plan import Plan
from tests.tiny import mesh_of, random_batch, tiny_config

BATCH, LENGTH, VOCABULARY = 16, 32, 64
MESHES = {
    "8 data": {"data": 8},
    "8 fsdp": {"fsdp": 8},
    # Shards of 8 and 4 positions: the window of 8 takes one hop, or two.
    "2 data, 4 sequence": {"data": 2, "sequence": 4},
    "8 sequence": {"sequence": 8},
}
EXPERT_MESHES = {
    "2 data, 4 expert": {"data": 2, "expert": 4},
    "2 replica, 2 fsdp, 2 expert": {"replica": 2, "fsdp": 2, "expert": 2},
    "2 fsdp, 2 expert, 2 tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
}
DENSE_MESHES = {
    "2 fsdp, 4 tensor": {"fsdp": 2, "tensor": 4},
    "2 expert, 2 tensor, 2 sequence": {"expert": 2, "tensor": 2, "sequence": 2},
}
# Without experts; a head of its own, biases, and a loss in chunks that do not divide the tokens.
DENSE = (
    ("model__moe__num_experts", 0),
    ("model__tie_embeddings", False),
    ("model__attention__num_kv_heads", 4),
    ("model__attention__qkv_bias", True),
    ("model__head_chunk", 50),
)
TRANSPORT = "model__moe__transport"
ACCUMULATED = ("2 data, 4 expert", "all_to_all")
# What an exchange does depends on the mesh by nature.
OF_THE_EXCHANGE = ("rows_sent", "part_max_over_mean", "exchange_rounds", "dropped_share")

# In this order: eight devices, other axes, four devices, one, and back.
RESTORED_ON = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"expert": 4, "tensor": 2},
    {"replica": 2, "fsdp": 2},
    {},
    {"fsdp": 8},
]


def run_config(**changes):
    """Top-p routing, shared keys, sinks, a shared expert, all balance losses."""
    config = build(
        RunConfig,
        tiny_config(
            model__vocab_size=VOCABULARY,
            model__unit="LGl",
            model__moe__switch_weight=0.1,
            model__moe__partition_weight=0.1,
            **{"model__attention__sinks": True, **changes},
        ),
    )
    stage = dataclasses.replace(
        config.stages[0], batch_size=BATCH, seq_len=LENGTH, warmup_tokens=0, learning_rate=0.01
    )
    return dataclasses.replace(config, stages=(stage,))


@functools.cache
def program(mesh, accumulate=1, changes=()):
    """(state, batch) -> loss, gradients, router metrics, and those of the exchange, on a mesh.

    `mesh` and `changes` of the config are tuples of pairs.
    """
    # A small buffer, so that unequal loads take several rounds.
    config, mesh = (
        run_config(model__moe__exchange_rows=0.25, **dict(changes)),
        mesh_of(**dict(mesh)),
    )
    knobs = Plan.of(config).knobs(0)

    def compute(state, batch):
        value, sums, grads = step.loss_and_grad(
            config, state.params, state.router, batch, knobs, accumulate=accumulate
        )
        stats = sums.pop("stats")
        router = {} if stats is None else jax.vmap(jax.vmap(balance.routing_metrics))(stats)
        exchange = {name: router.pop(name) for name in OF_THE_EXCHANGE if name in router}
        return {"value": value, "sums": sums, "router": router, "gradients": grads}, exchange

    with jax.set_mesh(mesh):
        made = placement.TrainProgram(config, mesh)
        placements = jax.tree.map(lambda leaf: leaf.sharding, made.abstract_state)
        run = jax.jit(compute, in_shardings=(placements, sharding.batch_sharding(mesh)))
        return mesh, run, made.init()


@functools.cache
def gradients(mesh, accumulate=1, changes=(), one_expert=False):
    """What `program` returns for a packed batch, twice.

    With `one_expert` the router sends all tokens to the last expert, and to no other.
    """
    mesh, run, state = program(mesh, accumulate, changes)
    with jax.set_mesh(mesh):
        if one_expert:
            bias_URE, top_p = state.router.bias_URE, state.router.top_p
            router = lm.Router(bias_URE.at[..., -1].add(10.0), top_p * 0 + 1e-6)
            state = dataclasses.replace(state, router=router)
        batch = put_batch(random_batch(BATCH, LENGTH, VOCABULARY), mesh)
        return [jax.device_get(run(state, batch)) for _ in range(2)]


def check(mesh, changes=(), accumulate=1, **options):
    """Compares a mesh with one device; returns the metrics of its exchange."""
    of_all = tuple(pair for pair in changes if pair[0] != TRANSPORT)
    [expected, _], _ = gradients((), changes=of_all, **options)
    (found, exchange), again = gradients(tuple(mesh.items()), accumulate, changes, **options)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5, err_msg=where)
    jax.tree.map(np.testing.assert_array_equal, (found, exchange), again)
    return exchange


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_equal_one_and_repeat_bit_for_bit(name):
    check(MESHES[name], accumulate=2 if name == "8 fsdp" else 1)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("name", DENSE_MESHES)
def test_dense_models_on_eight_devices_equal_those_on_one(name):
    check(DENSE_MESHES[name], DENSE)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize(
    "name, transport",
    [
        *((name, "all_to_all") for name in EXPERT_MESHES),
        # The other meshes are those of tests/layers/test_moe.py and tests/ops/test_exchange.py.
        ("2 fsdp, 2 expert, 2 tensor", "all_gather"),
    ],
)
def test_experts_on_eight_devices_equal_those_on_one(name, transport):
    mesh, changes = EXPERT_MESHES[name], ((TRANSPORT, transport),)
    options = dict(accumulate=2 if (name, transport) == ACCUMULATED else 1)
    exchange = check(mesh, changes, **options)
    assert exchange["part_max_over_mean"].max() < mesh["expert"]
    uneven = check(mesh, changes, one_expert=True, **options)
    np.testing.assert_allclose(uneven["part_max_over_mean"], mesh["expert"], rtol=1e-6)
    if transport == "all_to_all":
        assert uneven["exchange_rounds"].min() > 1
    else:
        np.testing.assert_array_equal(uneven["exchange_rounds"], 1)
    assert not uneven["dropped_share"].any()


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_an_evaluation_gathers_the_losses_of_split_rows():
    config = build(RunConfig, tiny_config(model__vocab_size=VOCABULARY, model__moe__num_experts=0))
    batch, found = random_batch(4, LENGTH, VOCABULARY), []
    for sizes in ({}, {"data": 2, "sequence": 4}):
        mesh = mesh_of(**sizes)
        with jax.set_mesh(mesh):
            state = placement.TrainProgram(config, mesh).init()
            evaluate = evaluation.make_eval_step(config, mesh)
            result = evaluate(state.params, state.router, placement.put_whole(batch, mesh), 1e4)
        assert result["nll_BT"].is_fully_replicated
        found.append(np.asarray(result["nll_BT"]))
    np.testing.assert_allclose(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_a_step_keeps_parameters_and_moments_where_they_are_stored():
    mesh, config = mesh_of(data=2, fsdp=4), run_config()
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(config, mesh)
        batch = put_batch(random_batch(BATCH, LENGTH, VOCABULARY), mesh)
        state, _ = program.step(program.init(), batch, Plan.of(config).knobs(0), 1)
    gates = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.optimizer))
        if "1_G" in jax.tree_util.keystr(path) and "gate_EDF" in jax.tree_util.keystr(path)
    ]
    assert len(gates) == 3  # the parameter and both moments
    for leaf in gates:
        assert leaf.sharding.spec == P(None, None, ("fsdp",), None)
        assert leaf.addressable_shards[0].data.shape[2] == leaf.shape[2] // 4
    assert state.router.bias_URE.sharding.is_fully_replicated


def filled(mesh, config):
    """A state of random numbers, moments and averages too, placed as in training."""
    generator = np.random.default_rng(0)

    def fill(leaf):
        drawn = generator.normal(size=leaf.shape) * 100
        return jax.device_put(drawn.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, abstract_state_on(mesh, config))


def abstract_state_on(mesh, config):
    with jax.set_mesh(mesh):
        return placement.TrainProgram(config, mesh).abstract_state


@pytest.mark.slow
def test_a_state_saved_on_one_mesh_comes_back_on_others(tmp_path):
    config = run_config(optimizer__ema_decay=0.9)
    meshes = [mesh_of(**sizes) for sizes in RESTORED_ON]
    state = filled(meshes[0], config)
    expected = jax.device_get(state)
    with Checkpointer(tmp_path, keep=9) as checkpointer:
        for step_number, mesh in enumerate(meshes):
            checkpointer.save(
                step_number, placement.items_from_state(state), None, {"step": step_number}
            )
            abstract = abstract_state_on(mesh, config)
            items = checkpointer.restore(step_number, placement.items_from_state(abstract))
            state = placement.state_from_items(items)
            # Moments and averages too: a restore that leaves some as they were looks like one.
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), expected)
            for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
                assert leaf.sharding == wanted.sharding
