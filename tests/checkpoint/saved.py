"""Trees to save, and what the tests of checkpoints share."""

from __future__ import annotations

from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from lightning_jax.checkpoint import Checkpointer

FIRST = SingleDeviceSharding(jax.devices()[0])


def make_params(layers=4, dtype=jnp.float32):
    """Parameters stacked over layers, as the model's units are."""
    random = np.random.default_rng(0)
    return {
        "embed": {"table_VD": jnp.asarray(random.normal(size=(24, 16)), jnp.float32)},
        "units": {"mlp": {"up_DF": jnp.asarray(random.normal(size=(layers, 16, 8)), dtype)}},
    }


def abstract(tree, where=FIRST):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def assert_bitwise(result, expected):
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert type(new) is type(old) or isinstance(old, jax.Array)
        new, old = np.asarray(new), np.asarray(old)
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert new.tobytes() == old.tobytes()


def save_one(workdir, step=10, data_iterator=None, meta=None, **items):
    with Checkpointer(workdir, keep=3) as checkpointer:
        checkpointer.save(step, items, data_iterator, meta or {"step": step})


def steps_on_disk(workdir):
    return sorted(path.name for path in (Path(workdir) / "checkpoints").iterdir())


def dataset():
    return grain.MapDataset.range(1000).shuffle(seed=3).repeat().batch(4).to_iter_dataset()
