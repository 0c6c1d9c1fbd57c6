"""Trees as Orbax stores them: nested dicts of arrays, whose paths are the format on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding


def leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as `units/0_L/moe/gate_EDF`: these names are the format."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def nested(leaves: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Nests converted leaves; those without elements stay out, because Orbax refuses them."""
    flat = {key: convert(leaf) for key, leaf in leaves.items() if np.size(leaf)}
    return traverse_util.unflatten_dict(flat, sep="/")


def to_save(leaf: Any) -> Any:
    """Returns what Orbax saves for a leaf: a copy of what is not of jax, which may change."""
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def to_restore(leaf: Any) -> Any:
    """Returns what tells Orbax the shape, dtype and place of a leaf to restore.

    Raises:
      TypeError: an abstract array without a sharding.
    """
    if not hasattr(leaf, "sharding"):
        return np.asarray(leaf)
    if leaf.sharding is None:
        raise TypeError(f"{leaf}: an abstract array to restore needs a sharding")
    return placed(leaf, leaf.sharding)


def placed(leaf: Any, where: Sharding) -> jax.ShapeDtypeStruct:
    """Returns the abstract array of a leaf with the given sharding."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def restored(leaf: Any, value: Any) -> Any:
    """Returns a value in the kind of its example; None stands for one without elements."""
    if value is None:
        return jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))
    return type(leaf)(value) if isinstance(leaf, bool | int | float) else value


def describe(leaf: Any) -> str:
    """Returns dtype and shape as text, such as `float32[4, 16]`."""
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
