"""The kind of device that a computation is compiled for; kernels and options depend on it."""

from __future__ import annotations

import dataclasses

import jax

from lightning_jax.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class Target:
    """A kind of device: `platform` is "cpu", "gpu" or "tpu", `device_kind` the vendor's name."""

    platform: str
    device_kind: str


def current() -> Target:
    """Returns the target of the ambient mesh (`jax.set_mesh`), or the default device without one.

    A mesh may consist of devices that are not here (`jax.experimental.topologies`): a program for
    a TPU can be compiled on a laptop.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return Target(device.platform, device.device_kind)


def require_platform(field: str, value: str, needs: tuple[str, ...], platform: str) -> None:
    """Raises UserError, naming the config field and its value, unless `platform` is needed."""
    if platform not in needs:
        raise UserError(
            f"{field} = {value!r}: runs on {' and '.join(needs)}, and this run's devices are "
            f"{platform}"
        )
