"""The train step on a mesh: where the state lies, how it is saved, and the compiled steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import RunConfig
from lightning_jax.runtime import compiler
from lightning_jax.train import step


def state_shardings(config: RunConfig, optimizer: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns (abstract TrainState with shardings, the shardings).

    Whatever mirrors a parameter (moments, averages) is split as the parameter is; the rest is whole
    on every device.
    """
    abstract = jax.eval_shape(lambda: step.init_state(config, optimizer))
    of_params = sharding.tree_shardings(lm.logical_axes(config.model), mesh)
    whole = sharding.replicated(mesh)
    by_path = {
        jax.tree_util.keystr(path): placement
        for path, placement in jax.tree_util.tree_leaves_with_path(of_params)
    }

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        names = [jax.tree_util.keystr(path[i:]) for i in range(len(path))]
        found = next((by_path[name] for name in names if name in by_path), whole)
        return found if len(found.spec) == leaf.ndim else whole

    shardings = jax.tree_util.tree_map_with_path(place, abstract)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
    return abstract, shardings


def state_items(state: step.TrainState) -> dict[str, Any]:
    """The state by checkpoint item: what inference needs is apart from what training needs."""
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
    """The inverse of `state_items`."""
    return step.TrainState(
        params=items["params"],
        router=items["router"],
        optimizer=items["optimizer"],
        ema=items.get("ema", {}),
        **items["progress"],
    )


class TrainSteps:
    """Jitted train steps by what they were compiled for: stages that agree in it share one."""

    def __init__(self, config: RunConfig, optimizer: optax.GradientTransformation, mesh: Mesh):
        self.abstract_state, self.shardings = state_shardings(config, optimizer, mesh)
        self._partial = functools.partial(step.train_step, config, optimizer)
        self._mesh = mesh
        self._jitted: dict[tuple[int, float], Callable[..., Any]] = {}

    def get(self, accumulate: int, rope_base_global: float) -> Callable[..., Any]:
        """Returns `(state, batch) -> (state, metrics)`; the state's buffers are reused."""
        key = (accumulate, rope_base_global)
        if key not in self._jitted:
            self._jitted[key] = jax.jit(
                functools.partial(
                    self._partial, accumulate=accumulate, rope_base_global=rope_base_global
                ),
                in_shardings=(self.shardings, sharding.batch_sharding(self._mesh)),
                out_shardings=(self.shardings, sharding.replicated(self._mesh)),
                donate_argnums=(0,),
                compiler_options=compiler.options(),
            )
        return self._jitted[key]
