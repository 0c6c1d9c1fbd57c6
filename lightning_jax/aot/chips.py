"""Public figures of TPU chips, and of the links between them.

From the pages "System architecture" of Google Cloud's TPU documentation (v4, v5e, v5p, v6e; peak,
memory, "bidirectional ICI bandwidth per chip", "DCN bandwidth"), and for v4's links from "TPU v4:
An Optically Reconfigurable Supercomputer" (arXiv 2304.01433, six links of 50 GB/s). One link
carries the bidirectional figure divided by two directions and by the number of links.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one chip.

    Attributes:
      topology: smallest that libtpu accepts.
      kind: `device_kind` of its devices.
      clock: cycles per second.
      flops: bfloat16 FLOPs per cycle of one core.
      cores: tensor cores that share the bandwidth; a parallel grid axis is split among them.
      bandwidth: bytes per second of the main memory.
      hbm: bytes of the main memory that libtpu 0.0.42 lets a program use.
      link: bytes per second of one link in one direction.
      dcn: bytes per second of one chip's share of its host's network.
      largest: sizes of the largest slice; its number is that of the axes of the torus.
      config: libtpu's name of the configuration with one device a chip.
    """

    topology: str
    kind: str
    clock: float
    flops: int
    cores: int
    bandwidth: float
    hbm: float
    link: float
    dcn: float
    largest: tuple[int, ...]
    config: str = "default"

    @property
    def peak(self) -> float:
        """bfloat16 FLOPs per second of all its cores."""
        return self.clock * self.flops * self.cores

    def wraps(self, sizes: tuple[int, ...]) -> tuple[bool, ...]:
        """Of each axis of a slice: whether its last chip has a link to its first.

        v4 and v5p close rings in slices of whole cubes of 4x4x4; v5e and v6e only along the sides
        of a whole pod.
        """
        if len(self.largest) == 3:
            return (all(size % 4 == 0 for size in sizes),) * len(sizes)
        return tuple(size == most for size, most in zip(sizes, self.largest, strict=True))


_GIB = 2.0**30

CHIPS = {
    "v4": Chip(
        "v4:2x2x1", "TPU v4", 1.05e9, 131_072, 2, 1200e9, 30.75 * _GIB, 50e9, 6.25e9,
        (16, 16, 16), "megacore",
    ),
    "v5e": Chip(
        "v5e:2x2", "TPU v5 lite", 1.5e9, 131_072, 1, 819e9, 15.75 * _GIB, 50e9, 3.125e9, (16, 16)
    ),
    "v5p": Chip(
        "v5p:2x2x1", "TPU v5", 1.75e9, 131_072, 2, 2765e9, 95.74 * _GIB, 100e9, 6.25e9, (16, 16, 24)
    ),
    "v6e": Chip(
        "v6e:2x2", "TPU v6 lite", 1.75e9, 524_288, 1, 1640e9, 31.25 * _GIB, 100e9, 12.5e9, (16, 16)
    ),
}  # fmt: skip
