"""Experts split over eight emulated devices give what one device gives, by every transport."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax.config.errors import UserError
from lightning_jax.ops import exchange, exchange_plan
from lightning_jax.ops.exchange import exchanged_experts
from lightning_jax.ops.experts import routed_experts
from lightning_jax.ops.routing import Choices
from tests.ops import expert_oracle as oracle

M, C, D = 96, 4, oracle.D  # of all devices
NAMES = ("y", "dx", "dgate", "dgate_w", "dup_w", "ddown_w", "dgate_b", "dup_b", "ddown_b")
COTANGENT = np.random.default_rng(6).standard_normal((M, D)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("compile_afresh")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A mesh (data, expert, tensor) and how its devices exchange rows."""

    mesh: tuple[int, ...]
    transport: str = "all_to_all"
    share: float = 1.0
    implementation: str = "blocked"

    def make_mesh(self):
        names = ("data", "expert", "tensor")[: len(self.mesh)]
        kinds = (jax.sharding.AxisType.Auto,) * len(names)
        return jax.make_mesh(self.mesh, names, axis_types=kinds)


def inputs(kind, experts=16):
    index = oracle.assignment(kind, M, experts, C)
    if kind == "one_device":  # of the last peer's experts, whatever the mesh
        index = np.where(np.arange(C) < 2, experts - 1 - np.arange(C), experts) + 0 * index
    index = index.astype(np.int32)
    gate = oracle.gates(index, experts, np.float32)
    biases = oracle.expert_biases(experts)
    return (
        oracle.tokens(M, np.float32),
        index,
        gate,
        *oracle.weights(experts, np.float32),
        *biases,
    )


def value_and_grads(run, x, index, gate, *parameters):
    """(y, aux) of `run`, and gradients of all floats."""

    def loss(x, gate, *parameters):
        y, aux = run(x, index, gate, *parameters)
        return jnp.sum(y * COTANGENT), (y, aux)

    grads, (y, aux) = jax.grad(loss, argnums=range(8), has_aux=True)(x, gate, *parameters)
    return (y, *grads), aux


@functools.partial(jax.jit, static_argnums=0)
def on_one_device(experts, *arguments):
    def run(x, index, gate, *parameters):
        choices = Choices(index, gate, experts)
        return routed_experts(x, choices, *parameters[:3], biases=parameters[3:]), None

    return value_and_grads(run, *arguments)[0]


def split(setting, experts, function):
    """`function` of each device's own part of the inputs."""
    tokens = P(("data", "expert"))
    specs = [P("expert")] * 6
    if len(setting.mesh) == 3:
        specs = [P("expert", None, "tensor")] * 2 + [P("expert", "tensor")]
        specs += [P("expert", "tensor")] * 2 + [P("expert")]
    return jax.shard_map(
        function,
        in_specs=(tokens, tokens, tokens, *specs),
        out_specs=(tokens, tokens),
        check_vma=False,
    )


def exchanging(setting, experts, **changes):
    def local(x, index, gate, *parameters):
        y, stats = exchanged_experts(
            x,
            Choices(index, gate, experts),
            *parameters[:3],
            biases=parameters[3:],
            axis="expert",
            sync_axes=("data", "expert", "tensor")[: len(setting.mesh)],
            sum_axes=("tensor",) if len(setting.mesh) == 3 else (),
            transport=setting.transport,
            share=setting.share,
            implementation=setting.implementation,
            **changes,
        )
        return y, jax.tree.map(lambda a: a[None], stats)

    return local


@functools.cache
def compiled(setting, experts):
    run = split(setting, experts, exchanging(setting, experts))
    with jax.set_mesh(setting.make_mesh()):
        return (
            jax.jit(functools.partial(value_and_grads, run))
            .lower(*inputs("full", experts))
            .compile()
        )


def run(setting, arguments):
    with jax.set_mesh(setting.make_mesh()):
        program = compiled(setting, len(arguments[3]))
        placed = jax.device_put(tuple(arguments), program.input_shardings[0])
        return jax.device_get(program(*placed))


def check(setting, kind, experts=16):
    arguments = inputs(kind, experts)
    got, stats = run(setting, arguments)
    for name, a, b in zip(NAMES, got, on_one_device(experts, *arguments), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()), rtol=0, err_msg=name)
    again, _ = run(setting, arguments)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    return stats
