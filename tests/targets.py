"""Meshes of devices that are not here, to compile or choose for."""

from jax.sharding import AbstractDevice, AbstractMesh

TPU = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))
HOPPER = AbstractMesh(
    (1,), ("data",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
)
