import jax

from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.tpu import blocks as tpu_blocks
from lightning_jax.runtime import target
from lightning_jax.runtime.target import Target
from tests.targets import HOPPER, TPU


def test_the_default_device_without_a_mesh():
    assert target.current() == Target("cpu", jax.devices()[0].device_kind)
    assert tpu_blocks.device_kind() == ""


def test_the_ambient_mesh_goes_before_the_machine():
    with jax.sharding.use_abstract_mesh(TPU):
        assert target.current() == Target("tpu", "TPU v5 lite")
        assert tpu_blocks.device_kind() == "TPU v5 lite"
    with jax.sharding.use_abstract_mesh(HOPPER):
        assert target.current().platform == "gpu"
        assert gpu_blocks.device_class() == "hopper"


def test_a_mesh_of_devices_that_are_here():
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert target.current().platform == "cpu"
