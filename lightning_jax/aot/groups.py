"""Which devices take part in a collective, and which axes of the mesh it runs over.

XLA writes the groups of a collective as lists, as an iota that is reshaped and transposed, or as
axes of a mesh of its own. Devices are numbered in the order of `Mesh.devices.flat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from lightning_jax.aot.hlo import Op

_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")


def groups_of(op: Op, num_devices: int) -> np.ndarray:
    """Returns the devices [groups, members] of a collective; those of a permute are its pairs.

    Raises:
      ValueError: the op names its groups in no known way.
    """
    text = op.attributes
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return np.array(re.findall(r"\{(\d+),(\d+)", pairs[1] + "}"), dtype=int)
    if mesh := _MESH.search(text):
        return _mesh_groups(mesh[1], mesh[2], mesh[3])
    if lists := re.search(r"replica_groups=\{(\{.*?\})?\}", text):
        rows = re.findall(r"\{([\d,]+)\}", lists[1] or "")
        if not rows:  # No groups are one group of all.
            return np.arange(num_devices)[None]
        return np.array([[int(d) for d in row.split(",")] for row in rows])
    if iota := re.search(r"replica_groups=(\[\S+)", text):
        return _iota(iota[1].rstrip(","))
    raise ValueError(f"{op.opcode} {op.name} has no groups")


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes of a mesh along which the members of some group differ.

    Args:
      groups: devices [groups, members].
      mesh: the size of each axis, in order.
    """
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(
        name for name, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any()
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: iota of 8, reshaped to [4,2], transposed, reshaped to [2,4]."""
    shape, source, order = _IOTA.findall(text)[0]
    values = np.arange(math.prod(_numbers(shape)))
    if source:
        values = values.reshape(_numbers(source))
    if order:
        values = values.transpose(_numbers(order))
    return values.reshape(_numbers(shape))


def _mesh_groups(axes: str, devices: str | None, chosen: str) -> np.ndarray:
    """`mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`; `'a':(2)4` is a part of an axis."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    order = np.arange(math.prod(sizes.values()))
    if devices:
        shape, _, permutation = _IOTA.findall(devices)[0]
        order = order.reshape(_numbers(shape))
        order = order.transpose(_numbers(permutation)) if permutation else order
    parts, members = [], []
    wanted = {name: (before, size) for name, before, size in _AXIS.findall(chosen)}
    for name, size in sizes.items():
        before, inside = wanted.get(name, ("", ""))
        split = (int(before), int(inside)) if before else (1, size)
        if name in wanted:
            members.append(len(parts) + 1)
        parts += [*split, size // math.prod(split)]
    grid = order.reshape(parts)
    others = [axis for axis in range(len(parts)) if axis not in members]
    return grid.transpose(others + members).reshape(-1, math.prod(parts[m] for m in members))
