"""What devices send to one another in a train step: all of it, by kind, mesh axes and shape.

Arrays of at most D elements are left out: metrics, norms of gradients, scales of norms.
"""

import dataclasses
import functools
import math
import re
from collections import Counter

import jax
import pytest

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.aot import groups, hlo
from lightning_jax.aot.costs import COLLECTIVES
from lightning_jax.aot.loops import visits
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
from lightning_jax.train import placement
from lightning_jax.train.plan import Plan
from tests.tiny import mesh_config, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_afresh")]

# Each size is of one axis alone, and so are its parts on the meshes below.
B, T, D, V, E, C, U = 16, 1032, 80, 166, 44, 4, 3
N, K, H, F_DENSE, F_EXPERT, CHUNK, WINDOW = 4, 2, 14, 58, 26, 50, 12
CHANGES = {
    "vocab_size": V,
    "model_dim": D,
    "unit": "LG",
    "unit_mlp": "ED",
    "num_units": U,
    "mlp_dim": F_DENSE,
    "head_chunk": CHUNK,
    "remat": "full",
    "attention__num_heads": N,
    "attention__num_kv_heads": K,
    "attention__head_dim": H,
    "attention__window": WINDOW,
    "attention__output_gate": True,
    "moe__num_experts": E,
    "moe__expert_dim": F_EXPERT,
    "moe__max_experts": C,
    "moe__num_shared_experts": 1,
    # As on accelerators; a CPU's own adds up blocks in place.
    "moe__implementation": "ragged_dot",
}
MESHES = {
    "2 fsdp, 2 expert, 2 tensor": {"fsdp": 2, "expert": 2, "tensor": 2},
    "2 data, 4 sequence": {"data": 2, "sequence": 4},
    "2 replica, 2 fsdp, 2 expert": {"replica": 2, "fsdp": 2, "expert": 2},
}


@functools.cache
def lowered(name, dtype="float32"):
    changes = {**CHANGES, "compute_dtype": dtype}
    config = build(RunConfig, tiny_config(**{f"model__{k}": v for k, v in changes.items()}))
    stage = dataclasses.replace(config.stages[0], batch_size=B, seq_len=T)
    plan = Plan.of(dataclasses.replace(config, stages=(stage,)))
    mesh = sharding.make_mesh(mesh_config(**MESHES[name]))
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(plan.config, mesh)
        batch = placement.abstract_batch(plan.segments[0], mesh)
        step = program.step.lower(program.abstract_state, batch, plan.knobs(0), 1)
    return plan.config.model, mesh, step


@functools.cache
def compiled(name):
    return lowered(name)[2].compile().as_text()


def sent(name):
    """Counts (kind, mesh axes, shape on one device) of arrays that collectives return.

    Shapes are sorted and without axes of size 1; an all-to-all counts once, without a shape.
    """
    _, mesh, _ = lowered(name)
    program, found = hlo.parse(compiled(name)), Counter()
    for visit in visits(program):
        for op in program.computations[visit.computation]:
            if op.opcode not in COLLECTIVES:
                continue
            axes = groups.axes_of(groups.groups_of(op, mesh.size), mesh.shape)
            shapes = [shape_of(array.dims) for array in op.arrays]
            if op.opcode == "all-to-all":
                found[op.opcode, axes, ()] += 1
            elif axes:
                found.update((op.opcode, axes, s) for s in shapes if math.prod(s) > D)
    return found


def shape_of(dims):
    return tuple(sorted(size for size in dims if size > 1))


def of_parameters(name):
    """What is due for each parameter of a unit (twice gathered, for the backward pass too)."""
    config, mesh, _ = lowered(name)
    in_use, stored = sharding.Rules.of(mesh), sharding.Rules.of(mesh, stored=True)
    axes = lm.logical_axes(config)
    leaves, due = jax.tree.leaves(lm.abstract_params(config)), Counter()
    for leaf, names in zip(leaves, jax.tree.leaves(axes, is_leaf=_are_names), strict=True):
        in_unit = names[0] == "layers"
        part = jax.sharding.NamedSharding(mesh, in_use.spec(*names)).shard_shape(leaf.shape)
        shape = shape_of(part[in_unit:])
        if math.prod(shape) <= D:
            continue
        gathered = tuple(a for a in _split(stored, names) if a not in _split(in_use, names))
        summed = tuple(
            a for a in mesh.axis_names
            if a in (*in_use.batch, *in_use.sequence) and a not in _split(in_use, names)
        )  # fmt: skip
        if gathered:
            due["all-gather", gathered, shape] += 1 + in_unit
        if "router" in names and "sequence" in summed:
            # Not in an island: a partitioner sums over rows and over positions apart.
            due.update(("all-reduce", (axis,), shape) for axis in summed)
        else:
            due["all-reduce", summed, shape] += 1
        if names == ("vocab", "embed"):  # the head too
            due["all-reduce", summed, shape] += 1
    return due


def _are_names(value):
    return isinstance(value, tuple)


def _split(rules, names):
    """Mesh axes that split an array, in the order of the mesh."""
    entries = jax.tree.leaves(tuple(rules.spec(*names)))
    return sorted(entries, key=sharding.MESH_AXES.index)


def of_activations(name):
    axes = MESHES[name]
    parts = math.prod(axes.get(axis, 1) for axis in sharding.Rules().batch)
    rows, length, due = B // parts, T // axes.get("sequence", 1), Counter()
    if "sequence" in axes:
        # Keys and values: forward, again where that is recomputed, and back. Segments do not come
        # back.
        due["collective-permute", ("sequence",), shape_of((rows, WINDOW - 1, K, H))] = 3 * 2
        due["collective-permute", ("sequence",), shape_of((rows, WINDOW - 1))] = 2
        due["all-gather", ("sequence",), shape_of((rows, T, K, H))] = 2 * 2
        due["all-gather", ("sequence",), shape_of((rows, T))] = 2
        due["reduce-scatter", ("sequence",), shape_of((rows, length, K, H))] = 2
    if "expert" in axes:
        # Forward: choices, rows, and back. Backward: rows with gradients, choices, and two ways
        # back. Each in the first round and in the loop over rounds.
        due["all-to-all", ("expert",), ()] = 2 * (3 + 4)
    if "tensor" in axes:
        # The softmax of a chunk of tokens: maximum and sum of each device.
        due["all-gather", ("tensor",), (2, 2, CHUNK)] = 1
        # Embedding, head; of each layer attention, again where it is recomputed, and backward; MLP
        # and shared expert and their backward passes; the experts' backward pass.
        due["all-reduce", ("tensor",), shape_of((rows, length, D))] = 2 + 2 * 3 + 2 * 2 + 1
        # The experts, and gradients of the router's logits and of the gates.
        due["all-reduce", ("tensor",), shape_of((rows * length, D))] = 1
        due["all-reduce", ("tensor",), shape_of((rows, length, E))] = 1
        due["all-reduce", ("tensor",), shape_of((rows, length, C))] = 1
    return due


@pytest.mark.parametrize("name", MESHES)
def test_a_step_sends_what_it_must_and_nothing_else(name):
    found, due = sent(name), of_parameters(name) + of_activations(name)
    assert (found - due, due - found) == (Counter(), Counter())


@pytest.mark.parametrize("name", MESHES)
def test_a_step_holds_no_array_of_all_logits_or_all_pairs(name):
    tensor = MESHES[name].get("tensor", 1)
    dims = {
        tuple(n for n in map(int, text.split(",")) if n > 1)
        for text in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled(name))
    }
    # A CPU's `ragged_dot` is dense over the features of all experts.
    experts = E // MESHES[name].get("expert", 1)
    dense = {experts * D, experts * F_EXPERT // tensor}
    large = [shape for shape in dims if sum(size >= T for size in shape) > 1]
    assert not [shape for shape in large if dense.isdisjoint(shape)]
    # The table, whole or as it is stored, and the logits of a chunk.
    others = {n for shape in dims if V // tensor in shape for n in shape} - {V // tensor}
    assert others <= {D, D // 4, D // 2, CHUNK}
    assert tensor == 1 or not [shape for shape in dims if V in shape]


@pytest.mark.parametrize("name", MESHES)
def test_only_the_embedding_and_the_router_scatter_numbers(name):
    _, mesh, step = lowered(name)
    scatters = re.findall(r'"stablehlo.scatter".*?-> tensor<(\S+)>', step.as_text(), re.DOTALL)
    parts = math.prod(mesh.shape[axis] for axis in sharding.Rules.of(mesh).batch)
    router = f"{B // parts}x{T // mesh.shape['sequence']}x{E}xf32"
    table = f"{V // mesh.shape['tensor']}x{D}xf32"
    # The choices of a token are distinct: what reaches its scores is never added.
    assert {kind for kind in scatters if "xf" in kind} == {router, table}


def test_in_bfloat16_only_activations_are_summed_over_devices():
    """A program for CPUs would add them in float32, so this is the program before it is compiled.

    The parts of a weight are as many as devices of the batch: 512 of them lose 2% in bfloat16.
    """
    _, _, step = lowered("2 fsdp, 2 expert, 2 tensor", "bfloat16")
    summed = re.findall(r"all_reduce.*?\}\) : \(tensor<(\S+)>\)", step.as_text(), re.DOTALL)
    narrow = {kind for kind in summed if kind.endswith("xbf16")}
    tokens = f"{B // 4}x{T}x", f"{B // 4 * T}x"
    assert f"{tokens[0]}{D}xbf16" in narrow
    assert not [kind for kind in narrow if not kind.startswith(tokens)]
