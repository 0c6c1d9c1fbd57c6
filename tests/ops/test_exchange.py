"""Experts split over eight emulated devices give what one device gives, by every transport."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.tpu_static import environment
from lightning_jax.config.errors import UserError
from lightning_jax.ops import exchange
from lightning_jax.ops.exchange import exchanged_experts
from lightning_jax.ops.experts import routed_experts
from lightning_jax.ops.routing import Choices
from tests.ops import expert_oracle as oracle

M, C, D = 96, 4, oracle.D  # M of all devices
NAMES = ("y", "dx", "dgate", "dgate_w", "dup_w", "ddown_w", "dgate_b", "dup_b", "ddown_b")
COTANGENT = np.random.default_rng(6).standard_normal((M, D)).astype(np.float32)
pytestmark = pytest.mark.usefixtures("compile_afresh")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A mesh (data, expert, tensor), and how its devices exchange the rows of E experts."""

    mesh: tuple[int, ...]
    transport: str = "all_to_all"
    share: float = 1.0
    experts: int = 16
    implementation: str = "blocked"

    @property
    def axes(self):
        return ("data", "expert", "tensor")[: len(self.mesh)]

    def make_mesh(self):
        kinds = (jax.sharding.AxisType.Auto,) * len(self.mesh)
        return jax.make_mesh(self.mesh, self.axes, axis_types=kinds)


def inputs(kind, experts=16):
    """x, index, gate, weights and biases of all devices."""
    if kind == "one_device":  # of the last peer, whatever the mesh
        index = np.where(np.arange(C) < 2, experts - 1 - np.arange(C), experts)
        index = np.broadcast_to(index, (M, C)).astype(np.int32)
    else:
        index = oracle.assignment(kind, M, experts, C)
    gate, weights = oracle.gates(index, experts, np.float32), oracle.weights(experts, np.float32)
    return oracle.tokens(M, np.float32), index, gate, *weights, *oracle.expert_biases(experts)


def value_and_grads(run, x, index, gate, *parameters):
    """(y, aux) of `run`, and gradients of all floats."""

    def loss(x, gate, *parameters):
        y, aux = run(x, index, gate, *parameters)
        return jnp.sum(y * COTANGENT), (y, aux)

    grads, (y, aux) = jax.grad(loss, argnums=range(8), has_aux=True)(x, gate, *parameters)
    return (y, *grads), aux


def here(x, index, gate, *parameters):
    """On one device."""
    choices = Choices(index, gate, len(parameters[0]))
    return routed_experts(x, choices, *parameters[:3], biases=parameters[3:]), None


def stacked(run):
    """Two units of the same kind, scanned over and computed again in the backward pass."""

    def deep(x, index, gate, *parameters):
        def unit(x, parameters):
            y, aux = run(x, index, gate, *parameters)
            return x + y, aux

        units = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), parameters)
        return jax.lax.scan(jax.checkpoint(unit), x, units)

    return deep


one_device = jax.jit(functools.partial(value_and_grads, here))
one_device_stacked = jax.jit(functools.partial(value_and_grads, stacked(here)))


def exchanging(setting, lead=(), **changes):
    """Runs `exchanged_experts` on each device's part of the inputs; statistics lead with [8]."""
    axes, tokens = setting.axes, P(("data", "expert"))

    def local(x, index, gate, *parameters):
        y, stats = exchanged_experts(
            x,
            Choices(index, gate, setting.experts),
            *parameters[:3],
            biases=parameters[3:],
            axis="expert",
            sync_axes=axes,
            sum_axes=axes[2:],
            transport=setting.transport,
            share=setting.share,
            implementation=setting.implementation,
            **changes,
        )
        return y, jax.tree.map(lambda a: a[None], stats)

    last = (*axes[2:], None)[0]
    into, out = P(*lead, "expert", None, last), P(*lead, "expert", last)
    specs = (into, into, out, out, out, P(*lead, "expert"))
    return jax.shard_map(
        local, in_specs=(tokens,) * 3 + specs, out_specs=(tokens, tokens), check_vma=False
    )


@functools.cache
def lowered(setting, wrap=None):
    run = exchanging(setting)
    run = functools.partial(value_and_grads, wrap(run) if wrap else run)
    with jax.set_mesh(setting.make_mesh()):
        return jax.jit(run).lower(*inputs("full", setting.experts))


@functools.cache
def compiled(setting, wrap=None):
    return lowered(setting, wrap).compile()


def run(setting, arguments, wrap=None):
    program = compiled(setting, wrap)
    placed = jax.device_put(tuple(arguments), program.input_shardings[0])
    return jax.device_get(program(*placed))


def assert_close(got, want):
    for name, a, b in zip(NAMES, got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()), rtol=0, err_msg=name)


def check(setting, kind):
    """Compares with one device; returns values and gradients, and the statistics summed up."""
    arguments = inputs(kind, setting.experts)
    got, stats = run(setting, arguments)
    assert_close(got, one_device(*arguments)[0])
    again, _ = run(setting, arguments)
    jax.tree.map(np.testing.assert_array_equal, got, again)
    # The statistics of a device are of its own tokens: one of each pair over `tensor` counts.
    assert len(np.unique(stats.rounds)) == 1
    stats = jax.tree.map(lambda a: a.sum(0), stats)
    filled = arguments[1] < setting.experts
    assert stats.sent_P.sum() == filled.sum() and stats.dropped == 0
    assert stats.sent_P.sum() + stats.empty + stats.dropped == M * C
    np.testing.assert_array_equal(
        stats.sent_P,
        np.bincount(arguments[1][filled] // (setting.experts // setting.mesh[1]),
                    minlength=setting.mesh[1]),
    )  # fmt: skip
    return got, stats.rounds / stats.passes


SETTINGS = {
    "1x8": Setting((1, 8), share=0.5),
    "2x4, small": Setting((2, 4), share=0.3),
    "2x4, large": Setting((2, 4), share=4.0),
    "2x4, gathered": Setting((2, 4), "all_gather"),
    "4x2": Setting((4, 2), share=0.4),
    "2x2x2": Setting((2, 2, 2), share=0.5),
    "2x2x2, gathered": Setting((2, 2, 2), "all_gather"),
}
KINDS = ("ragged", "full", "one_expert", "one_device", "padding")


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_eight_devices_give_what_one_gives(name):
    setting = SETTINGS[name]
    found = {kind: check(setting, kind) for kind in KINDS}
    rounds = {kind: rounds for kind, (_, rounds) in found.items()}
    for value in found["padding"][0]:
        np.testing.assert_array_equal(value, 0.0)
    if setting.transport == "all_gather" or setting.share > 1:
        assert set(rounds.values()) <= {0, 1}
        return
    # As many as the fullest run of rows for one peer needs.
    tokens, peers = M // np.prod(setting.mesh[:2]), setting.mesh[1]
    index = inputs("full")[1].reshape(-1, tokens * C) // (16 // peers)
    most = max(np.bincount(part).max() for part in index)
    rows = -(-int(np.ceil(setting.share * tokens * C / peers)) // 8) * 8
    assert rounds["full"] == -(-most // rows)
    assert rounds["one_device"] == -(-2 * tokens // rows) > 1
    assert rounds["padding"] == 0


def test_transports_and_buffers_agree():
    for kind in ("ragged", "one_device"):
        many, one, gathered = (
            check(SETTINGS[f"2x4, {name}"], kind)[0] for name in ("small", "large", "gathered")
        )
        assert_close(many, one)
        assert_close(many, gathered)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [4, 64])
@pytest.mark.parametrize("transport", ["all_to_all", "all_gather"])
def test_the_number_of_experts_here_does_not_matter_at_one_load(experts, transport):
    check(Setting((2, 4), transport, share=0.6, experts=experts), "ragged")


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["all_to_all", "all_gather"])
def test_within_a_scan_that_computes_again(transport):
    setting = Setting((2, 4), transport, share=0.4)
    for kind in ("ragged", "one_device"):
        arguments = inputs(kind)
        got, stats = run(setting, arguments, stacked)
        want = one_device_stacked(*arguments)[0]
        for name, a, b in zip(NAMES, got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max(), rtol=0, err_msg=name)
        assert stats.passes.sum() == 2 * 8


@pytest.mark.parametrize("transport", ["all_to_all", "all_gather"])
def test_experts_of_one_unit_of_a_stack(transport):
    x, index, gate, *parameters = inputs("ragged")
    stack = [np.stack([np.full_like(p, np.nan), p]) for p in parameters]
    setting = Setting((2, 4), transport, share=0.4)
    with jax.set_mesh(setting.make_mesh()):
        split = exchanging(setting, lead=(None,), unit=jnp.int32(1))
        y, _ = jax.jit(split)(x, index, gate, *stack)
    np.testing.assert_allclose(y, one_device(*inputs("ragged"))[0][0], atol=2e-6)


@pytest.mark.slow
def test_bfloat16_is_as_near_as_on_one_device():
    arguments = inputs("one_device")
    exact = one_device(*arguments)[0]
    narrow = [a.astype(jnp.bfloat16) if i not in (1, 2) else a for i, a in enumerate(arguments)]
    alone = one_device(*narrow)[0]
    setting = Setting((2, 4), share=0.3)
    with jax.set_mesh(setting.make_mesh()):
        got, _ = jax.jit(functools.partial(value_and_grads, exchanging(setting)))(*narrow)
    for name, a, b, c in zip(NAMES, got, alone, exact, strict=True):
        assert a.dtype == b.dtype, name
        error, usual = (np.abs(np.asarray(v, np.float32) - c).max() for v in (a, b))
        assert error <= 2 * usual + 1e-3, name


HLO = Setting((2, 4), share=0.3, implementation="ragged_dot")


def test_the_program_exchanges_and_gathers_nothing():
    text = compiled(HLO).as_text()
    exchanges = re.findall(r" all-to-all(?:-start)?\(", text)
    # Choices and rows there and back; choices, rows with their gradients, and two ways back: each
    # once, and once more in the loop. The first choices serve both directions.
    assert len(exchanges) == 2 * (3 + 4) - 1
    assert not re.search(r" (all-gather|reduce-scatter|collective-permute)", text)
    # The gradients of the weights, over `data`, and the number of rounds.
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 2
    rows = 4 * 8
    copied = [np.prod([int(n) for n in shape.split(",")])
              for shape in re.findall(r"= \w+\[([\d,]+)\]\S* copy\(", text)]  # fmt: skip
    assert not {rows * D, rows * 2 * D} & set(copied)
    program = lowered(HLO).as_text()
    scatters = re.findall(r'"stablehlo.scatter".*?-> tensor<(\S+)>', program, re.DOTALL)
    assert scatters and not [kind for kind in scatters if "i32" not in kind]


def test_gathered_tokens_are_not_exchanged():
    text = compiled(SETTINGS["2x4, gathered"]).as_text()
    assert "all-to-all" not in text and "all-gather" in text and "reduce-scatter" in text


def test_what_cannot_be_done_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^model.moe.transport = 'ragged_all_to_all': runs on tpu"):
        lowered(Setting((2, 4), "ragged_all_to_all"))
    with pytest.raises(ValueError, match='did you mean "all_to_all"'):
        lowered(Setting((2, 4), "all_to_al"))
    with (
        pytest.raises(ValueError, match="'expert' has 4 devices of 4 experts each.* the 8 of"),
        jax.set_mesh(HLO.make_mesh()),
    ):
        jax.eval_shape(exchanging(dataclasses.replace(HLO, experts=8)), *inputs("full", 16))


def test_few_tokens_are_gathered_and_many_exchanged(caplog):
    exchange._choose.cache_clear()
    with caplog.at_level(logging.DEBUG, exchange.__name__):
        assert exchange._resolve(None, 256) == "all_gather"
        assert exchange._resolve(None, 257) == "all_to_all"
    assert caplog.messages == [
        "exchanged_experts of at most 256 tokens a device: all_gather",
        "exchanged_experts of more than 256 tokens a device: all_to_all",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-aot)"
)
def test_programs_for_a_tpu_copy_and_gather_nothing():
    script = Path(__file__).with_name("exchange_program.py")
    command = [sys.executable, str(script), "all_to_all", "ragged_all_to_all"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    # Of the 13 exchanges 8 take rows, there and back; the others choices and their gradients.
    exchanges = {name: (program["exchanges"], program["ragged"]) for name, program in found.items()}
    assert exchanges == {"all_to_all": (13, 0), "ragged_all_to_all": (5, 8)}
    for program in found.values():
        assert program["gathers"] == program["reduce_scatters"] == program["float_scatters"] == 0
    assert not found["all_to_all"]["large_copies"]
    # The ragged exchange of these sizes wants the rows in another layout.
    assert found["ragged_all_to_all"]["large_copies"] <= 1
