"""Slices of TPUs that are not here: their names, their devices, and libtpu's environment.

libtpu reads its environment once and aborts the process for some slices that cannot be, so it is
used in a process of its own (`aot.child`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from lightning_jax.aot.chips import CHIPS, Chip
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import require
from lightning_jax.runtime.invocation import install


@dataclasses.dataclass(frozen=True)
class Slice:
    """Equal slices of TPUs, written `v5p:4x8x8`.

    Attributes:
      generation: a key of `CHIPS`.
      sizes: chips along each axis of the torus.
      count: number of slices, which only the data centre's network joins.
    """

    generation: str
    sizes: tuple[int, ...]
    count: int = 1

    @classmethod
    def parse(cls, name: str, count: int = 1) -> Slice:
        """Reads a name such as `v5e:16x16`.

        Raises:
          UserError: no such chip, or no slice of it.
        """
        generation, _, text = name.lower().partition(":")
        if generation not in CHIPS:
            raise UserError(
                f"topology = {name!r}: the chip must be {suggest(generation, CHIPS)}, as in v5e:4x4"
            )
        largest = CHIPS[generation].largest
        right = f"{generation}:{'x'.join(map(str, largest))} or smaller, such as " + (
            CHIPS[generation].topology
        )
        require(re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", text) is not None, "topology", name, right)
        sizes = tuple(int(size) for size in text.split("x"))
        fits = len(sizes) == len(largest) and all(
            size <= most for size, most in zip(sorted(sizes), sorted(largest), strict=True)
        )
        require(fits, "topology", name, right)
        require(count >= 1, "slices", count, "at least 1")
        return cls(generation, sizes, count)

    @property
    def chip(self) -> Chip:
        """Figures of its chips."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return self.count * math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.sizes))}"

    def devices(self) -> Sequence[Any]:
        """Returns the devices, none of which is here; the process needs `environment`.

        libtpu knows whole hosts only: of a host, slices that are smaller get the first devices.

        Raises:
          UserError: libtpu refuses the slice.
        """
        from jax.experimental import topologies

        hosts = "x".join(map(str, _whole_hosts(self.sizes)))
        several = {"num_slices": self.count} if self.count > 1 else {}
        try:
            topology = topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{self.generation}:{hosts}",
                chip_config_name=self.chip.config,
                **several,
            )
        except RuntimeError as error:
            words = " ".join(str(error).split())
            raise UserError(f"topology = {str(self)!r}: {words[:300]}") from error
        return [
            device
            for device in topology.devices
            if all(at < size for at, size in zip(device.coords, self.sizes, strict=False))
        ]


def _whole_hosts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes rounded up to hosts of 2 x 2 (x 1) chips."""
    return tuple(-(-size // 2) * 2 if axis < 2 else size for axis, size in enumerate(sizes))


def versions() -> dict[str, str]:
    """Versions of the packages that a compiled program depends on.

    Raises:
      UserError: libtpu is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"package libtpu is missing: {install('tpu-aot')}")
    return {name: metadata.version(name) for name in ("jax", "libtpu")}


def environment(flags: Sequence[str] = ()) -> dict[str, str]:
    """Returns the environment in which libtpu compiles without a TPU, given its own `flags`."""
    return dict(
        os.environ,
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        # Otherwise one process at a time.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        LIBTPU_INIT_ARGS=" ".join(flags),
    )
