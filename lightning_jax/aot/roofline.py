"""The shortest time of a step on a slice: its products, its memory traffic, its transfers.

A bound, not a forecast: every unit runs at its published peak. Transfers over the links of a slice
follow the usual model of rings: a gather or reduction over several axes of the torus uses the links
of all of them, in both directions where the axis closes a ring; an all-to-all is bound by the
middle of its longest axis. What crosses slices goes through the hosts' network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lightning_jax.aot.chips import Chip
from lightning_jax.aot.collectives import Collective
from lightning_jax.aot.hlo import Op


@dataclasses.dataclass(frozen=True)
class Network:
    """Where the devices of a mesh are.

    Attributes:
      chip: their figures.
      sizes: chips along each axis of a slice.
      coords: place of each device of one slice [devices, axes], in the order of the mesh.
    """

    chip: Chip
    sizes: tuple[int, ...]
    coords: np.ndarray

    def seconds(self, collective: Collective) -> float:
        """Seconds of one run of a collective."""
        groups = collective.groups
        if collective.across_slices:
            return collective.moved_bytes / self.chip.dcn
        if collective.kind == "collective-permute":
            return collective.moved_bytes / self.chip.link
        axes = self._axes(groups)
        if not axes:  # All on one chip.
            return 0.0
        if "all-to-all" in collective.kind:
            # Half of the bytes of half of the devices pass the middle of an axis.
            pressed = max(size * stride / (2 if ring else 1) for size, stride, ring in axes)
            return collective.operand_bytes * pressed / 4 / self.chip.link
        links = sum((2 if ring else 1) / stride for _, stride, ring in axes)
        return collective.moved_bytes / (links * self.chip.link)

    def _axes(self, groups: np.ndarray) -> list[tuple[int, int, bool]]:
        """Of each axis of the torus that a group spans: (members, stride, whether it is a ring).

        Groups that lie between each other's members share links, as many as the stride.
        """
        wraps, found = self.chip.wraps(self.sizes), []
        for axis, size in enumerate(self.sizes):
            places = np.unique(self.coords[groups[0], axis])
            if len(places) > 1:
                stride = int(places[1] - places[0])
                found.append((len(places), stride, wraps[axis] and len(places) * stride == size))
        return found


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective and its seconds in one run.

    During `hidden` of them other ops run; an op hides one transfer at a time, and no longer than it
    takes itself.
    """

    collective: Collective
    seconds: float
    hidden: float


def transfers(
    collectives: Sequence[Collective],
    network: Network,
    seconds_of: Callable[[str, Op], float],
) -> list[Transfer]:
    """Times the collectives of a program.

    Args:
      collectives: in the order of the schedule.
      network: the devices.
      seconds_of: seconds of one run of an op, given its computation.
    """
    found = []
    left: dict[tuple[str, str], float] = {}
    for collective in collectives:
        seconds = network.seconds(collective)
        hidden = 0.0
        for computation, op in collective.between:
            key = computation, op.name
            spare = left.setdefault(key, seconds_of(computation, op))
            used = min(spare, seconds - hidden)
            left[key] = spare - used
            hidden += used
        found.append(Transfer(collective, seconds, hidden))
    return found


def times(
    chip: Chip, *, flops: float, hbm_bytes: float, moved: Sequence[Transfer], model_flops: float
) -> dict[str, float]:
    """Returns seconds of a step and the utilisation at them.

    Args:
      chip: the figures of one device.
      flops: of one device, recomputation included.
      hbm_bytes: that one device moves to and from its memory.
      moved: its transfers; those in open loops are left out.
      model_flops: that the model needs, of one device: without recomputation.

    Returns:
      `compute_s`, `hbm_s`, `ici_s` (all transfers; `dcn_s` of them between slices), `exposed_s`
      (transfers behind which nothing runs), `step_s` (the largest of the first three: everything
      overlaps), `scheduled_s` (the larger of the first two, and the exposed transfers), `sum_s`
      (nothing overlaps), `mfu` at `step_s` and `scheduled_mfu`.
    """
    compute, hbm = flops / chip.peak, hbm_bytes / chip.bandwidth
    counted = [(move, move.collective.times) for move in moved if not move.collective.is_open]
    total = sum(move.seconds * times for move, times in counted)
    exposed = total - sum(move.hidden * times for move, times in counted)
    across = sum(move.seconds * times for move, times in counted if move.collective.across_slices)
    step = max(compute, hbm, total)
    scheduled = max(compute, hbm) + exposed
    needed = model_flops / chip.peak
    return {
        "compute_s": compute,
        "hbm_s": hbm,
        "ici_s": total,
        "dcn_s": across,
        "exposed_s": exposed,
        "step_s": step,
        "scheduled_s": scheduled,
        "sum_s": compute + hbm + total,
        "mfu": needed / step if step else 0.0,
        "scheduled_mfu": needed / scheduled if scheduled else 0.0,
    }
