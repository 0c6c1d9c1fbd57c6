"""Embedding and loss on a mesh that splits rows, positions and the vocabulary."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax import sharding
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
from lightning_jax.layers import vocabulary
from lightning_jax.train import placement
from lightning_jax.train.plan import Plan
from tests.tiny import mesh_of, tiny_config

V, D, CHUNK = 166, 32, 12
ALL_REDUCE = r"all_reduce.*?\}\) : \(tensor<(\w+)>\)"


def tied_losses(dtype):
    """A function of a stored table that embeds tokens and predicts from them with that table."""
    rng = np.random.default_rng(0)
    tokens_BT, targets_BT = rng.integers(0, V // 3, (2, 4, 6)).astype(np.int32) * 3
    weights_BT = rng.integers(0, 2, (4, 6)).astype(np.float32)

    def losses(stored_VD):
        table_VD = sharding.shard(stored_VD.astype(dtype), "vocab", "embed")
        hidden_BTD = jnp.sin(2 * vocabulary.lookup(table_VD, tokens_BT))
        given = hidden_BTD, table_VD.T, targets_BT
        sums = vocabulary.cross_entropy(*given, weights_BT, z_weight=jnp.float32(0.01), chunk=5)
        nll_BT = vocabulary.token_losses(*given, chunk=5)
        rank_BT = vocabulary.target_ranks(*given, chunk=5)
        return -3 * sums[0], (sums, nll_BT, rank_BT, hidden_BTD)

    return jax.value_and_grad(losses, has_aux=True), jnp.asarray(rng.normal(size=(V, D)))


@pytest.mark.usefixtures("compile_afresh")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_one_device(dtype):
    compute, table_VD = tied_losses(dtype)
    expected = jax.device_get(jax.jit(compute)(table_VD))
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, sequence=2)):
        found = jax.device_get(jax.jit(compute, in_shardings=P("tensor", "fsdp"))(table_VD))
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        got, want = got.astype(np.float32), want.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.usefixtures("compile_afresh")
def test_only_rows_of_tokens_that_occur_get_a_gradient():
    table_VD = jnp.ones((V, D))
    tokens_BT = np.array([[0, 3, 3, 165], [83, 82, 3, 0]] * 2, np.int32)

    def total(stored_VD):
        x_BTD = vocabulary.lookup(sharding.shard(stored_VD, "vocab", "embed"), tokens_BT)
        return (jnp.arange(1, 5.0)[None, :, None] * x_BTD).sum()

    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, sequence=2)):
        compute = jax.jit(jax.grad(total), in_shardings=P("tensor", "fsdp"))
        found_VD = np.asarray(compute(table_VD))
    expected_VD = np.zeros((V, D), np.float32)
    np.add.at(expected_VD, tokens_BT, np.arange(1, 5.0, dtype=np.float32)[None, :, None])
    np.testing.assert_array_equal(found_VD, expected_VD)


def test_gradients_of_both_ends_are_summed_over_devices_in_float32():
    compute, table_VD = tied_losses("bfloat16")
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, sequence=2)):
        text = jax.jit(compute, in_shardings=P("tensor", "fsdp")).lower(table_VD).as_text()
    sums = re.findall(ALL_REDUCE, text, re.DOTALL)
    for shape in (f"{D}x{V // 2}", f"{V // 2}x{D}"):
        assert f"{shape}xf32" in sums and f"{shape}xbf16" not in sums


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_a_train_step_never_holds_all_columns_nor_more_rows_than_a_chunk():
    changes = dict(vocab_size=V, unit="G", num_units=1, mlp_dim=58, tie_embeddings=False)
    changes = {f"model__{name}": value for name, value in changes.items()}
    config = build(
        RunConfig, tiny_config(**changes, model__head_chunk=CHUNK, model__moe__num_experts=0)
    )
    stage = dataclasses.replace(config.stages[0], batch_size=8, seq_len=24)
    plan = Plan.of(dataclasses.replace(config, stages=(stage,)))
    mesh = mesh_of(fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(plan.config, mesh)
        batch = placement.abstract_batch(plan.segments[0], mesh)
        lowered = program.step.lower(program.abstract_state, batch, plan.knobs(0), 1)
        text = lowered.compile().as_text()
    found = re.findall(r"\w+\[([\d,]+)\]", text)
    shapes = {tuple(size for size in map(int, dims.split(",")) if size > 1) for dims in found}
    assert not [shape for shape in shapes if V in shape]
    # The head and the embedding, stored and in use, and the logits of a chunk.
    with_columns = {tuple(sorted(shape)) for shape in shapes if V // 2 in shape}
    assert with_columns - {(V // 2,)} == {(D // 2, V // 2), (D, V // 2), (CHUNK, V // 2)}
    hidden = {shape for shape in shapes if plan.config.model.mlp_dim in shape}
    assert not hidden  # split over tensor
    # Sums over devices that have the same tokens: embedding, attention and MLP and their gradients,
    # the head's.
    sums = re.findall(ALL_REDUCE, lowered.as_text(), re.DOTALL)
    assert sums.count(f"4x24x{D}xf32") == 6
    assert not re.search(r"all-reduce\(.*/dot_general", text)  # of the partitioner
