"""The plan of an exchange: every filled slot is sent once, and found again."""

import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import exchange_plan
from lightning_jax.ops.routing import Choices
from tests.ops.expert_oracle import assignment

M, C, E, PEERS = 37, 4, 16, 4


@pytest.mark.parametrize("kind", ["full", "ragged", "one_expert", "padding"])
@pytest.mark.parametrize("rows", [9, 64, M * C])
def test_every_filled_slot_is_sent_once_and_comes_back(kind, rows):
    index = assignment(kind, M, E, C)
    plan = exchange_plan.make_plan(jnp.asarray(index), E, peers=PEERS, rows=rows)
    counts = np.bincount(index[index < E] // (E // PEERS), minlength=PEERS)
    np.testing.assert_array_equal(plan.count_P, counts)
    assert plan.rounds == -(-counts.max() // rows)
    seen, total = [], np.zeros((M, C))
    for r in range(int(plan.rounds) + 1):
        sending = exchange_plan.outgoing(plan, jnp.int32(r))
        for peer in range(PEERS):
            count = int(sending.sent_P[peer])
            expert, slot = sending.expert_PR[peer], np.asarray(sending.slot_PR[peer, :count])
            np.testing.assert_array_equal(expert[count:], E // PEERS)
            np.testing.assert_array_equal(
                expert[:count] + peer * (E // PEERS), index.reshape(-1)[slot]
            )
            seen += [*slot]
        # What comes back is the number of the slot that was sent.
        total += exchange_plan.collect_slots(plan, 1 + sending.slot_PR, jnp.int32(r))
    assert sorted(seen) == [*np.flatnonzero(index.reshape(-1) < E)]
    np.testing.assert_array_equal(total, np.where(index < E, 1 + np.arange(M * C).reshape(M, C), 0))
    sums = sum(
        exchange_plan.collect(plan, jnp.ones((PEERS, rows, 2)), jnp.int32(r))
        for r in range(int(plan.rounds) + 1)
    )
    np.testing.assert_array_equal(sums, np.tile((index < E).sum(1, keepdims=True), (1, 2)))
    choices = Choices(jnp.asarray(index), jnp.zeros(index.shape), E)
    np.testing.assert_array_equal(exchange_plan.rows_of_peers(choices, PEERS), counts)


@pytest.mark.parametrize(
    ("share", "tokens", "rows"),
    [
        (1.0, 4096, 4096),
        (1.25, 4096, 5120),
        (0.3, 4096, 1536),
        (1.0, 10, 16),
        (1e-6, 10, 8),
        (9.0, 4096, 4 * 4096),  # a token chooses no expert twice
        (1.0, 1, 4),
    ],
)
def test_rows_of_a_buffer(share, tokens, rows):
    found = exchange_plan.buffer_rows(share, tokens=tokens, choices=4, experts=16, peers=4)
    assert found == rows
    alone = exchange_plan.buffer_rows(share, tokens=tokens, choices=4, experts=4, peers=4)
    assert alone == min(rows, tokens)
