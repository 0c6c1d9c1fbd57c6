"""Which rows go to which part of the experts, in which round, and where they come back to.

The experts are split into P parts, one on each device of a mesh axis; a part is a *peer*. Slots
sorted by expert (`ops.routing.sort_slots`) are sorted by peer, so the rows of a peer are one run of
them. In round r a peer gets the rows [r R, (r+1) R) of its run, at its place in a buffer [P, R].

Letters: M tokens, E experts, C choices per token, S = M*C slots, P peers, R rows of a buffer for
each peer, D model.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lightning_jax.ops.routing import Choices, ordered_sum, sort_slots


def buffer_rows(share: float, *, tokens: int, choices: int, experts: int, peers: int) -> int:
    """R, the rows for one peer, as a share of an equal part of all slots, M*C/P.

    Rounded up to 512, or to 8 where it is small; never more than a peer can get, for a token
    chooses no expert twice.
    """
    fair = math.ceil(share * tokens * choices / peers)
    step = 512 if fair >= 512 else 8
    return min(-(-fair // step) * step, tokens * min(choices, experts // peers))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The rounds of an exchange.

    expert_MC: int32, the expert of each slot; E marks an empty one.
    slot_S: int32, the flat slot (token * C + choice) at each sorted position.
    start_P, count_P: int32, the sorted positions of each peer.
    round_MC: int32, the round in which a slot is sent; -1 for empty slots.
    row_MC: int32, its row of that round's buffer, [P * R] flat.
    rounds: int32, how many rounds there are, the same on all devices.
    local_experts: static, E / P.
    rows: static, R.
    """

    expert_MC: jax.Array
    slot_S: jax.Array
    start_P: jax.Array
    count_P: jax.Array
    round_MC: jax.Array
    row_MC: jax.Array
    rounds: jax.Array
    local_experts: int = dataclasses.field(metadata={"static": True})
    rows: int = dataclasses.field(metadata={"static": True})


def make_plan(
    expert_index_MC: jax.Array,
    num_experts: int,
    *,
    peers: int,
    rows: int,
    sync_axes: tuple[str, ...] = (),
) -> Plan:
    """Sorts the slots and counts the rounds.

    The number of rounds is the largest on any device of `sync_axes`, for each of them takes part in
    every exchange; 0 where no slot is filled.
    """
    local_experts = num_experts // peers
    order = sort_slots(expert_index_MC, num_experts)
    end_P = order.end_E[local_experts - 1 :: local_experts]
    count_P = jnp.diff(end_P, prepend=0)
    start_P = end_P - count_P
    peer_MC = jnp.minimum(expert_index_MC // local_experts, peers - 1)
    offset_MC = order.position_MC - start_P[peer_MC]
    rounds = jnp.max(-(-count_P // rows))
    return Plan(
        expert_MC=expert_index_MC,
        slot_S=order.slot_S,
        start_P=start_P,
        count_P=count_P,
        round_MC=jnp.where(order.filled_MC, offset_MC // rows, -1),
        row_MC=jnp.where(order.filled_MC, peer_MC * rows + offset_MC % rows, 0),
        rounds=lax.pmax(rounds, sync_axes) if sync_axes else rounds,
        local_experts=local_experts,
        rows=rows,
    )


class Outgoing(NamedTuple):
    """What a round sends.

    slot_PR: int32, the flat slot of each row; any slot where nothing is sent.
    expert_PR: int32, its expert's index on the peer; E / P where nothing is sent.
    sent_P: int32, rows for each peer, the first of its R.
    """

    slot_PR: jax.Array
    expert_PR: jax.Array
    sent_P: jax.Array


def outgoing(plan: Plan, round_: jax.Array) -> Outgoing:
    """The rows of one round."""
    peers = plan.count_P.shape[0]
    sent_P = jnp.clip(plan.count_P - round_ * plan.rows, 0, plan.rows)
    row_1R = jnp.arange(plan.rows)[None]
    filled_PR = row_1R < sent_P[:, None]
    position_PR = jnp.where(filled_PR, plan.start_P[:, None] + round_ * plan.rows + row_1R, 0)
    slot_PR = plan.slot_S[position_PR]
    first_P1 = plan.local_experts * jnp.arange(peers)[:, None]
    expert_PR = plan.expert_MC.reshape(-1)[slot_PR] - first_P1
    return Outgoing(slot_PR, jnp.where(filled_PR, expert_PR, plan.local_experts), sent_P)


def collect(plan: Plan, rows_PRD: jax.Array, round_: jax.Array) -> jax.Array:
    """y_MD, the sum of each token's rows of a round, in order of its slots, in at least float32."""
    mine_MC = plan.round_MC == round_
    rows_XD = rows_PRD.reshape(-1, rows_PRD.shape[-1])
    return ordered_sum(rows_XD, jnp.where(mine_MC, plan.row_MC, 0), mine_MC)


def collect_slots(plan: Plan, values_PR: jax.Array, round_: jax.Array) -> jax.Array:
    """The values of the slots of a round, [M, C]; 0 for those of other rounds."""
    mine_MC = plan.round_MC == round_
    return jnp.where(mine_MC, values_PR.reshape(-1)[plan.row_MC], 0)


def rows_of_peers(choices: Choices, peers: int) -> jax.Array:
    """count_P: float32, the filled slots of each of P equal parts of the experts."""
    peer_MC = choices.expert_index_MC // (choices.num_experts // peers)
    return jnp.sum(jax.nn.one_hot(peer_MC, peers), axis=tuple(range(peer_MC.ndim)))
