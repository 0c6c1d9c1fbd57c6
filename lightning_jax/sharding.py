"""Logical axis names of arrays, mesh axes of devices, and the strict rules between them.

The only file that knows mesh axes. Code above it writes logical names; code in `ops/` knows
neither. A parameter has two placements: *stored* (its `embed` axis split over `fsdp`) and *in use*
(gathered), so FSDP is one call of `shard` where a parameter meets an activation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lightning_jax.config import MeshConfig, ModelConfig
from lightning_jax.config.errors import UserError, suggest

MESH_AXES = ("data", "fsdp", "expert", "tensor", "sequence")
_RESERVED = ("expert", "tensor", "sequence")

Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes that split each logical axis of an array; `()` splits nothing."""

    batch: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    kv_heads: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    router: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, *, stored: bool = False) -> Rules:
        """Returns the rules of a mesh for arrays in use, or for parameters as they are `stored`."""
        rules = cls(batch=("data", "fsdp"), embed=("fsdp",) if stored else ())
        return cls(*(tuple(a for a in axes if a in mesh.shape) for axes in _values(rules)))

    def spec(self, *names: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array whose leading axes have these logical names.

        Raises:
          ValueError: an unknown name, or two axes that would be split over the same mesh axis.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in names:
            if name is not None and name not in known:
                raise ValueError(f"unknown logical axis {name!r}: {suggest(name, known)}")
        entries = [() if name is None else getattr(self, name) for name in names]
        used = [axis for entry in entries for axis in entry]
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {names} use a mesh axis twice: {entries}")
        return PartitionSpec(*(entry or None for entry in entries))


def _values(rules: Rules) -> tuple[tuple[str, ...], ...]:
    return tuple(getattr(rules, field.name) for field in dataclasses.fields(rules))


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


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of pieces into which a batch is split."""
    return math.prod(mesh.shape[axis] for axis in Rules.of(mesh).batch)


def tree_shardings(axes: Any, mesh: Mesh) -> Any:
    """Maps a tree of tuples of logical names to the NamedShardings of stored parameters."""
    rules = Rules.of(mesh, stored=True)
    return jax.tree.map(
        lambda names: NamedSharding(mesh, rules.spec(*names)), axes, is_leaf=_are_names
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, Rules.of(mesh).spec("batch"))


def _ambient() -> AbstractMesh | None:
    """The ambient mesh if it splits anything."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def is_split() -> bool:
    """Whether the ambient mesh has more than one device."""
    return _ambient() is not None


def ambient_batch_shards() -> int:
    """Number of pieces of a batch under the ambient mesh: the smallest batch that divides."""
    mesh = _ambient()
    return 1 if mesh is None else batch_shards(mesh)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an array in use to its logical axes; returns it as it is without an ambient mesh.

    For a parameter that is stored split this gathers it: the inverse of FSDP's split.
    """
    mesh = _ambient()
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, Rules.of(mesh).spec(*names))


def island(function: Callable[..., Any], *, inputs: Sequence[Any], outputs: Any) -> Callable:
    """Runs `function` on each device's own part of its arguments.

    For computations that a partitioner cannot split by itself: sorting tokens by expert, loops over
    blocks. A gradient of an argument that every device holds whole is summed over the devices.

    Args:
      function: of pytrees of arrays.
      inputs: for each positional argument the logical names of its arrays' leading axes, a tuple;
        or, where its arrays differ, a tree of such tuples that the argument's tree extends.
      outputs: likewise for the result; or a function from the abstract result to such names.
    """
    mesh = _ambient()
    if mesh is None:
        return function
    rules = Rules.of(mesh)

    def run(*arguments: Any) -> Any:
        names = outputs(jax.eval_shape(function, *arguments)) if callable(outputs) else outputs
        in_specs, out_specs = jax.tree.map(
            lambda names: rules.spec(*names), (tuple(inputs), names), is_leaf=_are_names
        )
        # check_vma off: the custom gradients of ops/ know no mesh axes; shard_map itself then sums
        # the cotangents of whole arguments over the devices.
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*arguments)

    return run


def _are_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(n is None or isinstance(n, str) for n in value)
