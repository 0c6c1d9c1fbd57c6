"""Seconds of transfers and steps, by hand."""

import dataclasses

import numpy as np
import pytest

from lightning_jax.aot import collectives, hlo, roofline
from lightning_jax.aot.chips import CHIPS
from lightning_jax.aot.roofline import Network
from tests.aot.samples import MESH, PROGRAM


def network(chip, *sizes):
    """Devices of a slice in the order of their places, the last axis fastest."""
    coords = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij"), -1)
    return Network(CHIPS[chip], sizes, coords.reshape(-1, len(sizes)))


def collective(kind, members, operand_bytes=8e9, **changes):
    fields = dict(
        kind=kind,
        source="",
        groups=np.array([members]),
        axes=("fsdp",),
        operand_bytes=operand_bytes,
        times=1,
        is_open=False,
        is_async=False,
        between=(),
    )
    return collectives.Collective(**(fields | changes))


RING = [x * 16 for x in range(16)]  # the first axis of v5e:16x16, with the last link
LINE = [0, 4, 8, 12]  # of v5e:4x4, without


@pytest.mark.parametrize(
    ("where", "kind", "members", "seconds"),
    [
        # 15 x 8 GB arrive by two links of 50 GB/s.
        (network("v5e", 16, 16), "all-gather", RING, 15 * 8 / 100),
        (network("v5e", 16, 16), "reduce-scatter", RING, 15 / 16 * 8 / 100),
        (network("v5e", 16, 16), "all-reduce", RING, 2 * 15 / 16 * 8 / 100),
        # Both axes of the torus: four links.
        (network("v5e", 16, 16), "all-reduce", range(256), 2 * 255 / 256 * 8 / 200),
        # The end of a line has one link.
        (network("v5e", 4, 4), "all-gather", LINE, 3 * 8 / 50),
        # A part of a ring is a line; so is every second chip, which shares links with the others.
        (network("v5e", 16, 16), "all-gather", RING[:4], 3 * 8 / 50),
        (network("v5e", 16, 16), "all-gather", RING[:8:2], 3 * 8 / 25),
        # Every second chip all around closes a ring.
        (network("v5e", 16, 16), "all-gather", RING[::2], 7 * 8 / 50),
        # All-to-all: half of 4 chips' halves through the middle, of a ring in two ways.
        (network("v5e", 4, 4), "all-to-all", LINE, 8 * 4 / 4 / 50),
        (network("v5p", 4, 4, 4), "all-to-all", [0, 16, 32, 48], 8 * 4 / 8 / 100),
        (network("v5p", 8, 8, 8), "all-to-all", range(512), 8 * 8 / 8 / 100),
        (network("v5p", 2, 2, 1), "all-gather", [0, 2], 8 / 100),
        (network("v5p", 2, 2, 1), "collective-permute", [0, 1], 8 / 100),
    ],
)
def test_seconds_of_a_collective(where, kind, members, seconds):
    assert where.seconds(collective(kind, list(members))) == pytest.approx(seconds)


def test_between_slices_the_network_of_the_hosts():
    between = collective("all-reduce", [0, 1], across_slices=True)
    assert network("v5e", 2, 2).seconds(between) == 8 / 3.125


def test_peaks_are_the_published_ones():
    published = {"v4": 275e12, "v5e": 197e12, "v5p": 459e12, "v6e": 918e12}
    for name, peak in published.items():
        assert CHIPS[name].peak == pytest.approx(peak, rel=0.003)


def test_an_op_hides_one_transfer_at_a_time():
    program = hlo.parse(PROGRAM)
    found = collectives.find(program, MESH)
    gather = next(c for c in found if c.kind == "all-gather")
    where = network("v5e", 2, 2)
    alone = where.seconds(gather)
    seconds = lambda computation, op: alone * 0.75 * (op.name == "fusion.2")  # noqa: E731
    moved = roofline.transfers([gather, gather], where, seconds)
    assert [move.hidden / alone for move in moved] == pytest.approx([0.75, 0.0])
    moved = roofline.transfers([gather], where, lambda computation, op: 1.0)
    assert moved[0].hidden == moved[0].seconds


def test_times_of_a_step():
    chip = dataclasses.replace(CHIPS["v5e"], clock=1.0, flops=100, bandwidth=10.0)
    here, far = collective("all-gather", [0, 1]), collective("all-gather", [0, 1], is_open=True)
    moved = [
        roofline.Transfer(dataclasses.replace(here, times=2), 1.0, 0.25),
        roofline.Transfer(dataclasses.replace(here, across_slices=True), 0.5, 0.0),
        roofline.Transfer(far, 99.0, 0.0),
    ]
    found = roofline.times(chip, flops=400, hbm_bytes=50, moved=moved, model_flops=300)
    assert (found["compute_s"], found["hbm_s"], found["ici_s"]) == (4.0, 5.0, 2.5)
    assert (found["exposed_s"], found["dcn_s"]) == (2.0, 0.5)
    assert (found["step_s"], found["scheduled_s"], found["sum_s"]) == (5.0, 7.0, 11.5)
    assert found["mfu"] == 3 / 5 and found["scheduled_mfu"] == 3 / 7
