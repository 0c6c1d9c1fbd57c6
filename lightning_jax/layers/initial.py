"""Initial values: a parameter's depend on the seed, its layer, its name and its shape alone.

So models that differ in one place (the letters of some layers, the window, the experts) begin with
the same values everywhere else, which pairs the arms of an ablation.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax.config import ModelConfig
from lightning_jax.layers.common import Declared, standard_normal


def draw(config: ModelConfig, declared: Any, key: jax.Array) -> Any:
    """Returns a float32 array for each `Declared` leaf of a model's parameters."""
    leaves, tree = jax.tree.flatten_with_path(declared, is_leaf=lambda a: isinstance(a, Declared))
    values = [jnp.full(leaf.value.shape, leaf.init.mean, jnp.float32) for _, leaf in leaves]
    # One call draws all parameters of a shape: one call per parameter would take longer to compile
    # than the train step.
    groups: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
    for index, (path, leaf) in enumerate(leaves):
        names = [entry.key for entry in path]
        if leaf.init.std:
            shape = leaf.value.shape[names[0] == "units" :]
            identities = [(index, *identity) for identity in _identities(config, names)]
            groups.setdefault(shape, []).extend(identities)
    fold = jax.vmap(lambda layer, name: jax.random.fold_in(jax.random.fold_in(key, layer), name))
    for shape, identities in groups.items():
        indices, *both = np.array(identities, np.uint32).T
        drawn = jax.vmap(functools.partial(standard_normal, shape=shape))(fold(*both))
        # Without the barrier XLA fuses (recompiles and recomputes) the generator into every slice.
        drawn = jax.lax.optimization_barrier(drawn)
        for index in np.unique(indices):
            first, last = np.flatnonzero(indices == index)[[0, -1]]
            rows = drawn[first : last + 1].reshape(values[index].shape)
            values[index] += leaves[index][1].init.std * rows
    return jax.tree.unflatten(tree, values)


def _identities(config: ModelConfig, names: list[str]) -> list[tuple[int, int]]:
    """What tells a parameter from all others of a model: (number of its layer, hash of its name).

    Those of a layer in `units` have one for each unit. Parameters outside of layers have number 0,
    the first layer has 1. The letter of the layer is no part of the name.
    """
    in_layer = names[0] in ("prefix", "units")
    name = zlib.crc32("/".join(names[2:] if in_layer else names).encode())
    if not in_layer:
        return [(0, name)]
    place = 1 + int(names[1].partition("_")[0])
    if names[0] == "prefix":
        return [(place, name)]
    start, step = place + len(config.prefix), len(config.unit)
    return [(start + unit * step, name) for unit in range(config.num_units)]
