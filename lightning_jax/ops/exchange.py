"""Experts split over the devices of a mesh axis: rows of tokens travel to them and back.

Three transports, for functions that run on each device's own tokens and experts (`shard_map`):

| transport | how | for |
|---|---|---|
| all_to_all | a buffer of R rows for each peer, in rounds until all have arrived | training |
| ragged_all_to_all | the same, but only filled rows travel; TPU and GPU | training |
| all_gather | all tokens go to all devices, partial sums come back | few tokens: decoding |

Imbalance costs rounds, and never a token. All three give the same values and gradients, up to the
order of float32 sums, and each has the same bits on every run. Letters: see `ops.exchange_plan`;
L = E / P experts on a device, N the tokens of all peers, X = 2 D.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.config.errors import suggest
from lightning_jax.ops import exchange_plan
from lightning_jax.ops.balance import ExchangeStats
from lightning_jax.ops.collectives import total
from lightning_jax.ops.exchange_plan import Outgoing, Plan
from lightning_jax.ops.experts import routed_experts
from lightning_jax.ops.routing import Choices
from lightning_jax.runtime import target

logger = logging.getLogger(__name__)

TRANSPORTS = ("all_to_all", "all_gather", "ragged_all_to_all")
# Tokens of a device up to which they are gathered: one collective each way then beats two with a
# plan. At training sizes the gathered rows would need P times the memory of a buffer.
_FEW_TOKENS = 256


def check_transport(transport: str, platform: str) -> None:
    """Raises UserError if a named transport does not run on a platform."""
    if transport == "ragged_all_to_all":
        target.require_platform("model.moe.transport", transport, ("tpu", "gpu"), platform)


def exchanged_experts(
    x_MD: jax.Array,
    choices: Choices,
    gate_LDF: jax.Array,
    up_LDF: jax.Array,
    down_LFD: jax.Array,
    *,
    axis: str | None = None,
    sync_axes: tuple[str, ...] = (),
    sum_axes: tuple[str, ...] = (),
    transport: str | None = None,
    share: float = 1.0,
    biases: tuple[jax.Array, ...] = (),
    clamp: float | None = None,
    unit: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, ExchangeStats]:
    """`ops.experts.routed_experts` with L = E / P of the experts here and the others on peers.

    Gradients reach x, the gates, the weights and the biases of this device, with the contributions
    of the tokens of all peers; weight gradients of several rounds add up in float32.

    Args:
      x_MD: this device's tokens.
      choices: their choices among all E experts.
      gate_LDF, up_LDF, down_LFD, biases, clamp, unit, implementation: of the experts here, as for
        `routed_experts`. The device at index p of `axis` has the experts [p L, (p+1) L).
      axis: mesh axis that splits the experts; None: all are here, and nothing is exchanged.
      sync_axes: mesh axes whose devices take part in the same exchanges: all of the program.
      sum_axes: mesh axes that split F: each device has a part of the hidden features of its
        experts, and the sum over these axes is y. The bias of `down` counts once.
      transport: one of `TRANSPORTS`; None: "all_gather" for few tokens, else "all_to_all".
      share: rows of the buffer for one peer, as a share of an equal part of all slots (see
        `exchange_plan.buffer_rows`): memory against rounds. Not read by "all_gather".

    Returns:
      y_MD in the dtype of x, and the statistics of this device's tokens.

    Raises:
      ValueError: unknown transport, or experts that are not P * L.
      UserError: a transport that the devices do not have.
    """
    if biases and sum_axes:
        is_first = lax.axis_index(sum_axes) == 0
        biases = (*biases[:2], jnp.where(is_first, biases[2], 0))
    parameters = ((gate_LDF, up_LDF, down_LFD), tuple(biases))
    run = functools.partial(_run, clamp=clamp, implementation=implementation)
    if axis is None:
        y_MD, stats = run(x_MD, choices, parameters, unit), _stats(choices, 1, rounds=None)
    else:
        _check_experts(axis, gate_LDF.shape[-3], choices.num_experts)
        transport = _resolve(transport, x_MD.shape[0])
        with jax.named_scope(f"experts_{transport}"):
            if transport == "all_gather":
                y_MD, stats = _gathered(run, axis, x_MD, choices, parameters, unit)
            else:
                how = _How(axis, transport == "ragged_all_to_all", clamp, implementation)
                y_MD, stats = _exchanged(how, sync_axes, share, x_MD, choices, parameters, unit)
    return total(y_MD, sum_axes), stats


def _check_experts(axis: str, local_experts: int, num_experts: int) -> None:
    if local_experts * (peers := lax.axis_size(axis)) != num_experts:
        raise ValueError(
            f"axis {axis!r} has {peers} devices of {local_experts} experts each, which must be "
            f"the {num_experts} of the choices"
        )


def _resolve(transport: str | None, tokens: int) -> str:
    if transport is None:
        return _choose(tokens <= _FEW_TOKENS)
    if transport not in TRANSPORTS:
        known = suggest(transport, TRANSPORTS)
        raise ValueError(f"transport must be {known}, got {transport!r}")
    check_transport(transport, target.current().platform)
    return transport


@functools.cache
def _choose(few: bool) -> str:
    transport = "all_gather" if few else "all_to_all"
    words = "at most" if few else "more than"
    logger.debug("exchanged_experts of %s %d tokens a device: %s", words, _FEW_TOKENS, transport)
    return transport


def _stats(choices: Choices, peers: int, rounds: jax.Array | None) -> ExchangeStats:
    """Statistics of one pass; `rounds` is None where nothing is exchanged."""
    sent_P = exchange_plan.rows_of_peers(choices, peers)
    return ExchangeStats(
        sent_P=sent_P,
        empty=choices.expert_index_MC.size - jnp.sum(sent_P),
        dropped=jnp.float32(0),
        rounds=jnp.float32(0) if rounds is None else rounds.astype(jnp.float32),
        passes=jnp.float32(rounds is not None),
    )


def _run(x_MD, choices, parameters, unit, *, clamp, implementation):
    weights, biases = parameters
    return routed_experts(
        x_MD,
        choices,
        *weights,
        biases=biases,
        clamp=clamp,
        unit=unit,
        implementation=implementation,
    )


def _gathered(run, axis, x_MD, choices, parameters, unit):
    gather = functools.partial(lax.all_gather, axis_name=axis, tiled=True)
    x_ND, index_NC, gate_NC = map(gather, (x_MD, choices.expert_index_MC, choices.gate_MC))
    local_experts = parameters[0][0].shape[-3]
    index_NC -= lax.axis_index(axis) * local_experts
    here_NC = (index_NC >= 0) & (index_NC < local_experts)
    here = Choices(
        jnp.where(here_NC, index_NC, local_experts), jnp.where(here_NC, gate_NC, 0), local_experts
    )
    y_ND = run(x_ND, here, parameters, unit)
    wide = jnp.promote_types(y_ND.dtype, jnp.float32)
    y_MD = lax.psum_scatter(y_ND.astype(wide), axis, tiled=True).astype(y_ND.dtype)
    return y_MD, _stats(choices, lax.axis_size(axis), jnp.float32(1))


@dataclasses.dataclass(frozen=True)
class _How:
    axis: str
    ragged: bool
    clamp: float | None
    implementation: str | None


def _exchanged(how, sync_axes, share, x_MD, choices, parameters, unit):
    peers = lax.axis_size(how.axis)
    M, C = choices.expert_index_MC.shape
    rows = exchange_plan.buffer_rows(
        share, tokens=M, choices=C, experts=choices.num_experts, peers=peers
    )
    plan = exchange_plan.make_plan(
        choices.expert_index_MC,
        choices.num_experts,
        peers=peers,
        rows=rows,
        sync_axes=sync_axes,
    )
    y_MD = _in_rounds(how, x_MD, choices.gate_MC, plan, parameters, unit)
    return y_MD, _stats(choices, peers, plan.rounds)


# Differentiated by hand: a loop with a traced number of rounds has no reverse mode, and nothing of
# a round is kept but its inputs.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(how: _How, x_MD, gate_MC, plan: Plan, parameters, unit):
    def one_round(r):
        there = _Round.begin(how, plan, gate_MC, r)
        y_PRD = _received(how, there, unit, there.send(x_MD), there.gate_PR, parameters)
        return exchange_plan.collect(plan, there.give_back(y_PRD), r)

    return _sum_over_rounds(one_round, plan.rounds).astype(x_MD.dtype)


def _forward(how, *arguments):
    return _in_rounds(how, *arguments), arguments


def _backward(how, arguments, dy_MD):
    x_MD, gate_MC, plan, parameters, unit = arguments
    # One exchange of both, not two.
    both_MX = jnp.concatenate([x_MD, dy_MD], axis=1)

    def one_round(r):
        there = _Round.begin(how, plan, gate_MC, r)
        x_PRD, dy_PRD = jnp.split(there.send(both_MX), 2, axis=-1)
        run = functools.partial(_received, how, there, unit)
        _, pullback = jax.vjp(run, x_PRD, there.gate_PR, parameters)
        dx_PRD, dgate_PR, dparameters = pullback(dy_PRD)
        dgate_PR = _swap(how, dgate_PR)
        return (
            exchange_plan.collect(plan, there.give_back(dx_PRD), r),
            exchange_plan.collect_slots(plan, dgate_PR, r),
            jax.tree.map(lambda d: d.astype(jnp.promote_types(d.dtype, jnp.float32)), dparameters),
        )

    dx_MD, dgate_MC, dparameters = _sum_over_rounds(one_round, plan.rounds)
    dparameters = jax.tree.map(lambda d, p: d.astype(p.dtype), dparameters, parameters)
    return dx_MD.astype(x_MD.dtype), dgate_MC.astype(gate_MC.dtype), None, dparameters, None


_in_rounds.defvjp(_forward, _backward)


def _sum_over_rounds(one_round, rounds):
    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        r, total = state
        return r + 1, jax.tree.map(jnp.add, total, one_round(r))

    # The first round, in most passes the only one, is outside of the loop: other work can run
    # beside its exchanges, but not beside a loop.
    first = jnp.int32(1), one_round(jnp.int32(0))
    return lax.while_loop(lambda state: state[0] < rounds, step, first)[1]


@dataclasses.dataclass(frozen=True)
class _Round:
    """A round in which the choices have arrived.

    expert_PR: local expert of each row from each peer; L where none was sent.
    gate_PR: its gate.
    received_P: rows from each peer.
    """

    how: _How
    sending: Outgoing
    expert_PR: jax.Array
    gate_PR: jax.Array
    received_P: jax.Array
    choices: int

    @classmethod
    def begin(cls, how: _How, plan: Plan, gate_MC: jax.Array, r: jax.Array) -> _Round:
        sending = exchange_plan.outgoing(plan, r)
        gate_PR = gate_MC.astype(jnp.float32).reshape(-1)[sending.slot_PR]
        # Bits, so that one exchange takes both, and rows, so that a TPU does not pad each number.
        bits_P2R = jnp.stack([sending.expert_PR, lax.bitcast_convert_type(gate_PR, jnp.int32)], 1)
        expert_PR, bits_PR = jnp.unstack(_swap(how, bits_P2R), axis=1)
        gate_PR = lax.bitcast_convert_type(bits_PR, jnp.float32)
        received_P = jnp.sum(expert_PR < plan.local_experts, axis=1, dtype=jnp.int32)
        return cls(how, sending, expert_PR, gate_PR, received_P, gate_MC.shape[1])

    def send(self, values_MX: jax.Array) -> jax.Array:
        """What the peers send of their tokens' values, [P, R, X]."""
        values_PRX = values_MX[self.sending.slot_PR // self.choices]
        if not self.how.ragged:
            return _swap(self.how, values_PRX)
        return _ragged(self.how, values_PRX, self.sending.sent_P, self.received_P)

    def give_back(self, values_PRX: jax.Array) -> jax.Array:
        """Values of the rows that came from the peers, at the devices that had sent them."""
        if not self.how.ragged:
            return _swap(self.how, values_PRX)
        return _ragged(self.how, values_PRX, self.received_P, self.sending.sent_P)


def _received(how, there, unit, x_PRD, gate_PR, parameters):
    """gate * expert(x) of each row that has arrived; 0 where none was sent."""
    choices = Choices(
        there.expert_PR.reshape(-1, 1), gate_PR.reshape(-1, 1), parameters[0][0].shape[-3]
    )
    x_SD = x_PRD.reshape(-1, x_PRD.shape[-1])
    y_SD = _run(x_SD, choices, parameters, unit, clamp=how.clamp, implementation=how.implementation)
    return y_SD.reshape(x_PRD.shape)


def _swap(how: _How, values_PX: jax.Array) -> jax.Array:
    """values[p] of each device goes to device p, which has it at the sender's index."""
    return lax.all_to_all(values_PX, how.axis, 0, 0, tiled=True)


def _ragged(how: _How, values_PRX, sent_P, received_P) -> jax.Array:
    """`_swap` of the first rows alone, `sent_P` of them for each peer; 0 past them."""
    peers, rows, width = values_PRX.shape
    values_SX = values_PRX.reshape(-1, width)
    got_SX = lax.ragged_all_to_all(
        values_SX,
        jnp.zeros_like(values_SX),
        jnp.arange(peers, dtype=jnp.int32) * rows,
        sent_P,
        jnp.full(peers, lax.axis_index(how.axis) * rows, jnp.int32),
        received_P,
        axis_name=how.axis,
    )
    return got_SX.reshape(values_PRX.shape)
