"""Training on a mesh: placement of state and batches, items of a checkpoint, the compiled step.

Nothing here computes until `TrainProgram.init` or `.step` is called, so everything also works under
a mesh of devices that are not present.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import RunConfig
from lightning_jax.data.batch import Batch
from lightning_jax.ops import attention as attention_op
from lightning_jax.ops import experts
from lightning_jax.ops.exchange import check_transport
from lightning_jax.runtime import compiler
from lightning_jax.train import step
from lightning_jax.train.optimizer import make_optimizer
from lightning_jax.train.plan import Knobs, Plan, Segment


def make_mesh(plan: Plan, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh of a run, of all devices or of those given.

    Raises:
      UserError: as `sharding.make_mesh`, the model or a micro-batch does not divide over it, or the
        attention, the experts or the transport named do not run on its devices.
    """
    mesh = sharding.make_mesh(plan.config.mesh, devices)
    attention = plan.config.model.attention
    platform = mesh.devices.flat[0].platform
    attention_op.check_device(attention.implementation, platform, attention.head_dim)
    experts.check_device(plan.config.model.moe.implementation, platform)
    if sharding.Rules.of(mesh).expert:
        check_transport(plan.config.model.moe.transport, platform)
    for segment in plan.segments:
        at = f"stages.{segment.stage.name}"
        sharding.check_divisible(
            plan.config.model,
            mesh,
            batch={f"{at}.batch_size / accumulate": segment.micro_batch},
            seq_len={f"{at}.seq_len": segment.seq_len},
        )
    return mesh


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Places a global batch, of which this process has the rows `sharding.rows_here`, on the mesh.

    Processes that hold parts of the same rows must have equal ones.
    """
    shards = sharding.batch_shards(mesh)
    size = len(batch.tokens) * shards // len(sharding.rows_here(mesh, shards))
    return _put(batch, mesh, sharding.rows_here(mesh, size), size)


def put_whole(batch: Batch, mesh: Mesh) -> Batch:
    """Places a global batch, which every process holds whole, onto the mesh."""
    size = len(batch.tokens)
    return _put(batch, mesh, range(size), size)


def _put(batch: Batch, mesh: Mesh, rows: Sequence[int], size: int) -> Batch:
    """Places a batch of `size` rows, of which `batch` has `rows`, ascending."""
    placement = sharding.batch_sharding(mesh)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            return array[np.searchsorted(rows, np.arange(size)[index[0]]), index[1]]

        return jax.make_array_from_callback((size, array.shape[1]), placement, part)

    return jax.tree.map(place, batch)


def abstract_batch(segment: Segment, mesh: Mesh) -> Batch:
    """Returns shapes, dtypes and shardings of the batches of a segment: for compiling ahead."""
    shape, placement = (segment.batch_size, segment.seq_len), sharding.batch_sharding(mesh)
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(shape, array.dtype, sharding=placement), Batch.empty(0)
    )


def abstract_state(
    config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> step.TrainState:
    """Returns shapes, dtypes and shardings of the state.

    Arrays that mirror a parameter (moments, averages) are split as the parameter is; the others are
    whole on every device.
    """
    of_params = sharding.tree_shardings(lm.logical_axes(config.model), mesh)
    whole = sharding.replicated(mesh)
    by_path = {
        jax.tree_util.keystr(path): placement
        for path, placement in jax.tree_util.tree_leaves_with_path(of_params)
    }

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = [jax.tree_util.keystr(path[i:]) for i in range(len(path))]
        found = next((by_path[name] for name in names if name in by_path), whole)
        placement = found if len(found.spec) == leaf.ndim else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    return jax.tree_util.tree_map_with_path(
        place, jax.eval_shape(lambda: step.init_state(config, optimizer, config.seed))
    )


def state_bytes(state: step.TrainState) -> dict[str, int]:
    """Returns the bytes of each part of an abstract state on one device, largest parts only.

    Arrays that are split have equal parts on all devices.
    """
    parts = {
        "parameters": state.params,
        "optimizer state": state.optimizer,
        "averaged parameters": state.ema,
    }
    return {
        name: sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )
        for name, tree in parts.items()
        if tree
    }


def items_from_state(state: step.TrainState) -> dict[str, Any]:
    """Splits the state into checkpoint items, those for inference apart from those for training."""
    items = {
        "params": state.params,
        "router": state.router,
        "optimizer": state.optimizer,
        "progress": {
            "step": state.step,
            "bad_steps": state.bad_steps,
            "controller": state.controller,
        },
    }
    return {**items, "ema": state.ema} if state.ema else items


def state_from_items(items: dict[str, Any]) -> step.TrainState:
    """The inverse of `items_from_state`."""
    return step.TrainState(
        params=items["params"],
        router=items["router"],
        optimizer=items["optimizer"],
        ema=items.get("ema", {}),
        **items["progress"],
    )


class TrainProgram:
    """The jitted functions of a training; make and call it under `jax.set_mesh(mesh)`.

    Attributes:
      abstract_state: see the function of this name.
      init: `() -> state` before the first step.
      step: `(state, batch, knobs, accumulate) -> (state, metrics)`, see `step.train_step`. It
        reuses the state's buffers, and compiles once for each shape of batch and `accumulate`.
    """

    def __init__(self, config: RunConfig, mesh: Mesh):
        optimizer = make_optimizer(config.optimizer, lm.logical_axes(config.model))
        self.abstract_state = abstract_state(config, optimizer, mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        whole = sharding.replicated(mesh)

        def init_state(seed: jax.Array) -> step.TrainState:
            return step.init_state(config, optimizer, seed)

        def train_step(state: step.TrainState, batch: Batch, knobs: Knobs, accumulate: int) -> Any:
            return step.train_step(config, optimizer, state, batch, knobs, accumulate=accumulate)

        init = jax.jit(
            init_state,
            in_shardings=whole,
            out_shardings=shardings,
            compiler_options=compiler.options(),
        )
        self.init = lambda: init(np.uint32(config.seed))
        self.step = jax.jit(
            train_step,
            static_argnums=3,
            in_shardings=(shardings, sharding.batch_sharding(mesh), whole),
            out_shardings=(shardings, whole),
            donate_argnums=0,
            compiler_options=compiler.options(),
        )
