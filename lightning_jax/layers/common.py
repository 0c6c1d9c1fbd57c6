"""Parts of every layer: named parameters, RMSNorm and the gated MLP.

Initialisation, in one place:

| parameter | normal, cut at two deviations |
|---|---|
| embedding, head | std D^-0.5: logits of a tied head start near unit scale |
| query, key, value, gate, up, router | std fan_in^-0.5 |
| attention output, down | std fan_in^-0.5 (2 x layers)^-0.5 |
| norm scales | ones |
| biases, attention sinks, head gates | zeros |
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.ops import norm
from lightning_jax.ops.activation import gated_unit
from lightning_jax.ops.collectives import total
from lightning_jax.ops.projection import project


@dataclasses.dataclass(frozen=True)
class Init:
    """Distribution of a fresh parameter: `mean + std * truncated_normal` (cut at 2 deviations)."""

    std: float
    mean: float = 0.0

    def sample(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Draws a float32 array."""
        if self.std == 0:
            return jnp.full(shape, self.mean, jnp.float32)
        return self.mean + self.std * standard_normal(key, shape)


def standard_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A float32 normal cut at two deviations and rescaled to standard deviation 1."""
    # Drawn flat: XLA takes seven times longer to compile the generator for a four-axis shape.
    flat = jax.random.truncated_normal(key, -2.0, 2.0, (math.prod(shape),), jnp.float32)
    return flat.reshape(shape) / 0.87962566103423978


# The collection of values that layers hand out where the caller of `apply` lists it as mutable.
KEPT = "intermediates"
# Logical names of the leading axes of an array [B, T, ...].
TOKENS = ("batch", "sequence")
ZEROS, ONES = Init(0.0), Init(0.0, mean=1.0)


class Declared(nn.LogicallyPartitioned):
    """A boxed parameter: value, logical name of each axis, distribution, and its dtype in use."""

    init: Init = flax.struct.field(default=ZEROS, pytree_node=False)
    in_use: str = flax.struct.field(default="float32", pytree_node=False)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stacked:
    """The parameter `array_U[unit]` of a stack over units, still inside the stack.

    A decode step reads few of a unit's experts. They are taken out of the stack where they are
    used, so the others are never copied.
    """

    array_U: jax.Array
    unit: jax.Array


def keep(module: nn.Module, name: str, value: Any) -> None:
    """Hands a value out of a forward pass, under the module's path, if the caller asked for it."""
    module.sow(KEPT, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def fan_in(size: int, scale: float = 1.0) -> Init:
    """Standard deviation `scale * size ** -0.5`."""
    return Init(scale * size**-0.5)


def output_scale(num_layers: int) -> float:
    """Scale that keeps the residual stream's variance at depth, two additions per layer (GPT-2)."""
    return (2 * num_layers) ** -0.5


def param(
    module: nn.Module,
    name: str,
    init: Init,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Declares a float32 parameter with one logical name per axis; returns it ready for use.

    Ready means gathered from its FSDP shards and cast to `dtype`. A `Stacked` one comes back as it
    was passed in, whatever the annotation says.
    """
    if isinstance(module.get_variable("params", name), Stacked):
        return module.get_variable("params", name)
    in_use = jnp.dtype(dtype).name
    stored: Any = module.param(
        name, lambda key: Declared(init.sample(key, shape), axes, init=init, in_use=in_use)
    )
    # Cast before the gather: half the bytes travel when computing in bfloat16.
    return sharding.shard(stored.astype(dtype), *axes)


def summed_in_float32(weights: Any) -> Any:
    """Weights for an island, which sums their gradients over devices in the dtype they come in.

    A sum in bfloat16 loses what is below 1/256 of it: on a pod, every device's part. So the weights
    become float32 after they were gathered; the island rounds them back, which changes nothing. On
    one device they stay as they are.
    """
    wide = lambda w: w.astype(jnp.promote_types(w.dtype, jnp.float32))  # noqa: E731
    return jax.tree.map(wide, weights) if sharding.is_split() else weights


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis with a learned scale (arXiv 1910.07467)."""

    eps: float
    axis: str = "embed"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = param(self, "scale", ONES, (x.shape[-1],), (self.axis,))
        return norm.rms_norm(x, scale, eps=self.eps)


class GatedMLP(nn.Module):
    """`unit(x gate, x up) down`, where unit is SwiGLU or clamped (`ops.activation.gated_unit`)."""

    hidden_dim: int
    num_layers: int
    clamp: float | None = None

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        dim, hidden, dtype = x_BTD.shape[-1], self.hidden_dim, x_BTD.dtype
        inward, outward = fan_in(dim), fan_in(hidden, output_scale(self.num_layers))
        gate_DF = param(self, "gate_DF", inward, (dim, hidden), ("embed", "mlp"), dtype)
        up_DF = param(self, "up_DF", inward, (dim, hidden), ("embed", "mlp"), dtype)
        down_FD = param(self, "down_FD", outward, (hidden, dim), ("mlp", "embed"), dtype)
        mlp_axes = sharding.axes("mlp")

        def local(x_BTD, gate_DF, up_DF, down_FD):
            hidden_BTF = gated_unit(
                project("BTD,DF->BTF", x_BTD, gate_DF),
                project("BTD,DF->BTF", x_BTD, up_DF),
                clamp=self.clamp,
            )
            return total(project("BTF,FD->BTD", hidden_BTF, down_FD), mlp_axes)

        # One sum over devices each way. A partitioner would sum the gradients of x through the gate
        # and through up over devices one by one.
        into, out = (None, "mlp"), ("mlp", None)
        run = sharding.island(local, inputs=(TOKENS, into, into, out), outputs=TOKENS)
        return run(x_BTD, *summed_in_float32((gate_DF, up_DF, down_FD)))
