"""Logical axis names of arrays, mesh axes of devices, and the strict rules between them.

The only file that knows mesh axes. Code above it writes logical names; pure functions in `ops/`
that communicate take the names of mesh axes as arguments, from `axes`. A parameter has two
placements: *stored* (its `embed` axis split over `fsdp` and `expert`) and *in use* (gathered), so
FSDP is one call of `shard` where a parameter meets an activation.

| mesh axis | what it splits |
|---|---|
| replica | the batch, over slices or hosts with slow links between them; parameters are whole |
| data | the batch |
| fsdp | the batch; parameters as they are stored |
| expert | the experts; for everything else it is like fsdp |
| tensor | query and key/value heads, hidden features of MLPs and experts, the vocabulary |
| sequence | the positions of each row |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lightning_jax.config import MeshConfig, ModelConfig
from lightning_jax.config.errors import UserError, suggest

MESH_AXES = ("replica", "data", "fsdp", "expert", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Mesh axes that split each logical axis of an array; `()` splits nothing."""

    batch: tuple[str, ...] = ("replica", "data", "fsdp", "expert")
    sequence: tuple[str, ...] = ("sequence",)
    embed: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    expert: tuple[str, ...] = ("expert",)
    router: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, *, stored: bool = False) -> Rules:
        """Returns the rules of a mesh for arrays in use, or for parameters as they are `stored`.

        Mesh axes of one device split nothing and are left out.
        """
        rules = cls(embed=("fsdp", "expert")) if stored else cls()
        wide = [axis for axis, size in mesh.shape.items() if size > 1]
        return cls(*(tuple(a for a in axes if a in wide) for axes in _values(rules)))

    def spec(self, *names: str | None) -> PartitionSpec:
        """Returns the PartitionSpec of an array whose leading axes have these logical names.

        An array of experts is split over the mesh axis `expert` by its experts, so its `embed` axis
        is not.

        Raises:
          ValueError: an unknown name, or two axes that would be split over the same mesh axis.
        """
        entries = [() if name is None else self.axes(name) for name in names]
        if "expert" in names:
            entries = [
                tuple(a for a in entry if name != "embed" or a not in self.expert)
                for name, entry in zip(names, entries, strict=True)
            ]
        used = [axis for entry in entries for axis in entry]
        if len(set(used)) != len(used):
            raise ValueError(f"logical axes {names} use a mesh axis twice: {entries}")
        return PartitionSpec(*(entry or None for entry in entries))

    def axes(self, name: str) -> tuple[str, ...]:
        """Returns the mesh axes that split a logical axis; a ValueError if it is unknown."""
        known = [field.name for field in dataclasses.fields(self)]
        if name not in known:
            raise ValueError(f"unknown logical axis {name!r}: {suggest(name, known)}")
        return getattr(self, name)


def _values(rules: Rules) -> tuple[tuple[str, ...], ...]:
    return tuple(getattr(rules, field.name) for field in dataclasses.fields(rules))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the device mesh; an axis of -1 takes the devices that the others leave.

    TPU slices are divided by the axis `replica`, so that only it crosses the network between them.

    Raises:
      UserError: sizes whose product is not the device count, or a number of replicas that the
        slices cannot share.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = {name: getattr(config, name) for name in MESH_AXES}
    rest = len(devices) // math.prod(size for size in asked.values() if size != -1)
    sizes = {name: rest if size == -1 else size for name, size in asked.items()}
    if math.prod(sizes.values()) != len(devices):
        raise UserError(
            f"mesh = {asked}: its product must be the {len(devices)} devices at hand"
            + ", where -1 stands for any number" * (-1 in asked.values())
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["replica"] % slices:
        raise UserError(
            f"mesh.replica = {sizes['replica']}: must be a multiple of the {slices} slices at hand"
        )
    shape = tuple(sizes.values())
    kinds = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
    # A mesh axis may be a part of an axis of the torus: 16 x 32 on 8 x 8 x 8 chips.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, **split)
    else:
        inside = (sizes["replica"] // slices, *shape[1:])
        across = (slices, *(1,) * len(shape[1:]))
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split)
    return Mesh(grid, MESH_AXES, axis_types=kinds)


def check_divisible(
    model: ModelConfig, mesh: Mesh | AbstractMesh, *, batch: dict[str, int], seq_len: dict[str, int]
) -> None:
    """Raises UserError where a size of the model, of a batch or of a row does not divide.

    Args:
      batch, seq_len: a field of the config, to name in the error, and its size.
    """
    rules, stored = Rules.of(mesh), Rules.of(mesh, stored=True)
    attention, moe = model.attention, model.moe
    sizes = [
        ("embed", {"model.model_dim": model.model_dim}),
        ("heads", {"model.attention.num_heads": attention.num_heads}),
        ("kv_heads", {"model.attention.num_kv_heads": attention.num_kv_heads}),
        ("vocab", {"model.vocab_size": model.vocab_size}),
        ("batch", batch),
        ("sequence", seq_len),
    ]
    if moe.num_experts:
        sizes += [
            ("expert", {"model.moe.num_experts": moe.num_experts}),
            ("mlp", {"model.moe.expert_dim": moe.expert_dim}),
        ]
    if not all(spec.routed for spec in model.layers):
        sizes.append(("mlp", {"model.mlp_dim": model.mlp_dim}))
    for name, fields in sizes:
        axes = (stored if name == "embed" else rules).axes(name)
        parts = _devices(mesh, axes)
        for field, size in fields.items():
            if size % parts:
                factors = " * ".join(f"mesh.{axis}" for axis in axes)
                raise UserError(
                    f"{field} = {size}: must be a multiple of {factors} = {parts}, "
                    f"such as {-(-size // parts) * parts}"
                )


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Number of pieces into which a batch is split."""
    return _devices(mesh, Rules.of(mesh).batch)


def _devices(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    """Number of devices along mesh axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def rows_here(mesh: Mesh, batch_size: int) -> tuple[int, ...]:
    """Rows of a global batch of which devices of this process hold a part, ascending."""
    placement = NamedSharding(mesh, Rules.of(mesh).spec("batch"))
    held = placement.addressable_devices_indices_map((batch_size,)).values()
    return tuple(np.unique(np.concatenate([np.arange(batch_size)[index] for index in held])))


def tree_shardings(axes: Any, mesh: Mesh, *, stored: bool = True) -> Any:
    """Maps a tree of tuples of logical names to NamedShardings.

    They are those of parameters as they are stored, or without `stored` as they are in use: for
    serving, where no step should gather them.
    """
    rules = Rules.of(mesh, stored=stored)
    return jax.tree.map(
        lambda names: NamedSharding(mesh, rules.spec(*names)), axes, is_leaf=_are_names
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array [B, T] of a batch."""
    return NamedSharding(mesh, Rules.of(mesh).spec("batch", "sequence"))


def _ambient() -> AbstractMesh | None:
    """The ambient mesh if it splits anything."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def is_split() -> bool:
    """Whether the ambient mesh has more than one device."""
    return _ambient() is not None


def ambient_shards(name: str) -> int:
    """Pieces into which the ambient mesh splits a logical axis: the smallest size that divides."""
    mesh = _ambient()
    return 1 if mesh is None else _devices(mesh, Rules.of(mesh).axes(name))


def lies_as_used(*names: str | None) -> bool:
    """Whether the ambient mesh stores an array of these logical axes as it is used, ungathered."""
    mesh = _ambient()
    return mesh is None or Rules.of(mesh, stored=True).spec(*names) == Rules.of(mesh).spec(*names)


def axes(*names: str) -> tuple[str, ...]:
    """Mesh axes of more than one device that split logical axes: for collectives in an island."""
    mesh = _ambient()
    return () if mesh is None else tuple(a for name in names for a in Rules.of(mesh).axes(name))


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
