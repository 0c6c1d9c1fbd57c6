"""Logical axis names of arrays, mesh axes of devices, and the strict rules between them.

The only file that knows mesh axes. Code above it writes logical names; code in `ops/` knows
neither. A parameter has two placements: *stored* (its `embed` axis split over `fsdp`) and *in use*
(gathered), so FSDP is one call of `in_use` where a parameter meets an activation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lightning_jax.config import MeshConfig, ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import suggest

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
_RESERVED = ("expert", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes that split each logical axis; `None` splits nothing."""

    batch: tuple[str, ...] | None = BATCH_AXES
    sequence: str | None = None
    embed: str | None = "fsdp"
    vocab: str | None = None
    heads: str | None = None
    kv_heads: str | None = None
    head: str | None = None
    mlp: str | None = None
    expert: str | None = None
    router: str | None = None
    layers: str | None = None

    def spec(self, *names: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array whose axes have these logical names.

        Raises:
          ValueError: an unknown name, or two axes that would be split over the same mesh axis.
        """
        known = [field.name for field in dataclasses.fields(self)]
        entries, used = [], []
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"unknown logical axis {name!r}: {suggest(name, known)}")
            entry = None if name is None else getattr(self, name)
            used += [entry] if isinstance(entry, str) else list(entry or ())
            entries.append(entry)
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {names} use a mesh axis twice: {entries}")
        return PartitionSpec(*entries)


STORED = Rules()
IN_USE = Rules(embed=None)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the device mesh; an axis of -1 takes the devices that the others leave.

    Raises:
      UserError: a reserved axis larger than 1, or sizes whose product is not the device count.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {name: getattr(config, name) for name in MESH_AXES}
    for name in _RESERVED:
        if sizes[name] != 1:
            raise UserError(
                f"mesh.{name} = {sizes[name]}: this axis is reserved and not implemented yet; "
                "use mesh.data and mesh.fsdp"
            )
    rest = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != len(devices):
        raise UserError(f"mesh = {sizes}: its product must be the {len(devices)} devices at hand")
    return jax.make_mesh(
        tuple(sizes.values()),
        MESH_AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def check_divisible(model: ModelConfig, batch_size: int, field: str, mesh: Mesh) -> None:
    """Raises UserError where the model's width or a batch does not divide over the mesh."""
    if model.model_dim % mesh.shape["fsdp"]:
        raise UserError(
            f"model.model_dim = {model.model_dim}: must be a multiple of "
            f"mesh.fsdp = {mesh.shape['fsdp']}"
        )
    shards = batch_shards(mesh)
    if batch_size % shards:
        raise UserError(f"{field} = {batch_size}: must be a multiple of the {shards} batch shards")


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def tree_shardings(axes: Any, mesh: Mesh, rules: Rules = STORED) -> Any:
    """Maps a tree of tuples of logical names to NamedShardings."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, rules.spec(*names)),
        axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def _ambient_size() -> int:
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def ambient_batch_shards() -> int:
    """Number of pieces of a batch under the ambient mesh: the smallest batch that divides."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation to its logical axes; without an ambient mesh returns it as it is."""
    if _ambient_size() == 1:
        return x
    return jax.lax.with_sharding_constraint(x, IN_USE.spec(*names))


def in_use(x: jax.Array, *names: str | None) -> jax.Array:
    """Gathers a parameter for use: the inverse of FSDP's split, once where it meets activations."""
    return shard(x, *names)


def batch_local(function: Callable[..., Any], batched: Sequence[bool]) -> Callable[..., Any]:
    """Runs `function` on each device's own part of the batch.

    For computations that a partitioner cannot split by itself (sorting tokens by expert, loops over
    blocks). Positional argument i is a pytree whose arrays lead with the batch axis if
    `batched[i]`, and is whole on every device otherwise (its gradient is summed over devices).
    Every output leads with the batch axis.
    """
    if _ambient_size() == 1:
        return function
    batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    # check_vma off: the custom gradients of ops/ know no mesh axes; shard_map itself then sums the
    # cotangents of whole arguments over the devices.
    return jax.shard_map(
        function,
        in_specs=tuple(batch if flag else whole for flag in batched),
        out_specs=batch,
        check_vma=False,
    )
