"""Strict rules between names and mesh axes, and errors of meshes that do not fit."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from lightning_jax import sharding
from lightning_jax.config.errors import UserError
from lightning_jax.sharding import Rules
from tests.tiny import mesh_config, tiny_model


def test_rules_map_names_and_refuse_typos_and_collisions():
    mesh = sharding.make_mesh(mesh_config(fsdp=4, replica=2))
    stored, in_use = Rules.of(mesh, stored=True), Rules.of(mesh)
    assert stored.spec("embed", "heads", "head") == P("fsdp", None, None)
    assert in_use.spec("batch", None, "embed") == P(("replica", "fsdp"), None, None)
    with pytest.raises(ValueError, match='did you mean "embed"'):
        stored.spec("embd")
    with pytest.raises(ValueError, match="twice"):
        stored.spec("batch", "embed")


def abstract_mesh(**sizes):
    sizes = {**dict.fromkeys(sharding.MESH_AXES, 1), **sizes}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_the_expert_axis_is_data_for_all_but_experts():
    mesh = abstract_mesh(replica=2, data=2, fsdp=2, expert=4, tensor=2, sequence=2)
    stored, in_use = Rules.of(mesh, stored=True), Rules.of(mesh)
    assert in_use.axes("batch") == ("replica", "data", "fsdp", "expert")
    assert sharding.batch_shards(mesh) == 2 * 2 * 2 * 4
    assert stored.spec("embed", "mlp") == P(("fsdp", "expert"), ("tensor",))
    assert stored.spec("expert", "embed", "mlp") == P(("expert",), ("fsdp",), ("tensor",))
    assert in_use.spec("expert", "embed", "mlp") == P(("expert",), None, ("tensor",))


def test_mesh_sizes():
    assert sharding.make_mesh(mesh_config(data=-1)).shape["data"] == 8
    mesh = sharding.make_mesh(mesh_config(data=2, fsdp=-1))
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == (2, 4)
    with pytest.raises(UserError, match="8 devices"):
        sharding.make_mesh(mesh_config(data=3))
    # As it was written: not with the 2, or the 0, that would come of it.
    with pytest.raises(
        UserError, match=r"'replica': 3, 'data': -1,.* 8 devices.*, where -1 stands"
    ):
        sharding.make_mesh(mesh_config(replica=3, data=-1))
    sharding.make_mesh(mesh_config(data=8))  # its advice


class Elsewhere:
    """A device of a process, as process `here` sees it."""

    platform = device_kind = "cpu"

    def __init__(self, index, process, here):
        self.id, self.process_index = index, process
        self.client = types.SimpleNamespace(process_index=lambda: here, platform="cpu")


@pytest.mark.parametrize(
    ("sizes", "owners", "rows"),
    [
        ({"data": 4}, [0, 0, 1, 1], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ({"data": 4}, [0, 1, 0, 1], [(0, 1, 4, 5), (2, 3, 6, 7)]),
        ({"replica": 2, "expert": 2}, [1, 0, 0, 1], [(2, 3, 4, 5), (0, 1, 6, 7)]),
        # Both processes need all rows, if not all columns of them.
        ({"data": 2, "sequence": 2}, [0, 1, 0, 1], [tuple(range(8))] * 2),
        ({"fsdp": 2, "tensor": 2}, [0, 0, 1, 1], [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
    ids=str,
)
def test_a_process_has_the_rows_of_its_devices(sizes, owners, rows):
    shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
    for here, expected in enumerate(rows):
        devices = [Elsewhere(index, owner, here) for index, owner in enumerate(owners)]
        mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), sharding.MESH_AXES)
        assert sharding.rows_here(mesh, 8) == expected


def test_slices_are_divided_by_replicas(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Device:
        id: int
        slice_index: int
        process_index: int = 0
        platform: str = "cpu"
        device_kind: str = "cpu"

    devices = [Device(i, slice_index=i % 2) for i in range(8)]
    grid = sharding.make_mesh(mesh_config(replica=4, fsdp=2), devices).devices
    assert grid.shape == (4, 1, 2, 1, 1, 1)
    assert [{d.slice_index for d in replica.flat} for replica in grid] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh.replica = 1: must be a multiple of the 2 slices"):
        sharding.make_mesh(mesh_config(fsdp=8), devices)
    sharding.make_mesh(mesh_config(replica=2, fsdp=4), devices)  # its advice


@pytest.mark.parametrize(
    ("field", "changes", "sizes", "fits"),
    [
        ("model.model_dim", {"model_dim": 36}, {"fsdp": 4, "expert": 2}, 40),
        (
            "model.attention.num_heads",
            {"attention__num_heads": 6, "attention__num_kv_heads": 2},
            {"tensor": 4},
            8,
        ),
        ("model.attention.num_kv_heads", {"attention__num_kv_heads": 2}, {"tensor": 4}, 4),
        ("model.moe.num_experts", {"moe__num_experts": 6, "moe__num_groups": 1}, {"expert": 4}, 8),
        ("model.moe.expert_dim", {"moe__expert_dim": 10}, {"tensor": 4}, 12),
        ("model.mlp_dim", {"mlp_dim": 10, "prefix": "G"}, {"tensor": 4}, 12),
        ("model.vocab_size", {"vocab_size": 65}, {"tensor": 4}, 68),
        ("batch", {}, {"data": 3, "expert": 2}, 12),
        ("length", {}, {"sequence": 5}, 25),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(field, changes, sizes, fits):
    enough = {"attention__num_kv_heads": 4, "attention__num_heads": 4, "moe__num_partitions": 1}
    model, mesh = tiny_model(**{**enough, **changes}), abstract_mesh(**sizes)
    check = functools.partial(sharding.check_divisible, mesh=mesh)
    with pytest.raises(UserError, match=rf"^{field} = \d+: must be a mult.*mesh.*such as {fits}$"):
        check(model, batch={"batch": 8}, seq_len={"length": 24})
    advised = {name: fits for name in changes if field.endswith(name.split("__")[-1])}
    model = tiny_model(**{**enough, **changes, "attention__num_kv_heads": 4, **advised})
    check(model, batch={"batch": 24}, seq_len={"length": 125})
