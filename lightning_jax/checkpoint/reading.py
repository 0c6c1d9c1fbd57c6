"""Reading of checkpoints: strict about names, shapes and digests, with one-line errors.

The error of a damaged checkpoint names the newest good one, and the command that uses it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from lightning_jax import sharding
from lightning_jax.checkpoint import folders, trees
from lightning_jax.checkpoint.folders import all_steps, checkpoints_dir
from lightning_jax.checkpoint.library import orbax
from lightning_jax.config import CheckpointMeta, ModelConfig, RunConfig
from lightning_jax.config.errors import UserError, some_of
from lightning_jax.config.fields import require
from lightning_jax.config.routing import EvalRouting
from lightning_jax.runtime.files import StrPath, read_json

DATA_ITEM = "data"
# Given the folder of checkpoints and the newest good step in it, says how to use that step.
Advice = Callable[[Path, int], str]


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """The parts of a run that inference needs; `weights` says which: "params" or "ema".

    `model`, `params` and `router` belong together.
    """

    meta: CheckpointMeta
    params: Any
    router: Any
    weights: str = "params"

    @property
    def config(self) -> RunConfig:
        return self.meta.config

    @property
    def model(self) -> ModelConfig:
        """The model of these weights; `config.model` has the RoPE base before any stage."""
        return self.meta.model

    def with_routing(self, routing: EvalRouting) -> LoadedRun:
        """Returns the same run with another routing of evaluation and generation.

        Raises:
          UserError: the model has no experts, or does not route as the values need it.
        """
        config = dataclasses.replace(self.config, model=routing.of(self.config.model))
        router = self.router
        if routing.top_p is not None:
            router = dataclasses.replace(router, top_p=jnp.float32(routing.top_p))
        meta = dataclasses.replace(self.meta, config=config)
        return dataclasses.replace(self, meta=meta, router=router)


def load_run(
    workdir: StrPath, *, step: int | None = None, mesh: Mesh | None = None, weights: str = "auto"
) -> LoadedRun:
    """Reads config, parameters and router of a run, also while it is still training.

    Args:
      step: which checkpoint; None is the newest.
      mesh: where to put parameters, as they are in use: only the axes of heads, MLPs, experts and
        vocabulary are split, so that no step of inference gathers one; None is the first device.
      weights: "params", "ema" (their moving average), or "auto": "ema" where it was saved.

    Raises UserError if there are no such checkpoint or weights, the checkpoint is damaged, or a
    weight is not finite.
    """
    require(weights in ("auto", "params", "ema"), "weights", weights, "auto, params or ema")
    from lightning_jax import model

    directory = checkpoints_dir(workdir)
    step = find(directory, step)
    meta = _read_meta(directory, step, _use_step)
    config = meta.config
    params = model.abstract_params(config.model)
    router = jax.eval_shape(lambda: model.init_router(config.model))
    if mesh is None:
        whole: Any = SingleDeviceSharding(jax.devices()[0])
        split = jax.tree.map(lambda _: whole, params)
    else:
        whole = sharding.replicated(mesh)
        split = sharding.tree_shardings(model.logical_axes(config.model), mesh, stored=False)
    with _read_errors(directory, step, _use_step):
        averaged = "ema" in folders.stored_items(directory / str(step))
    name = "ema" if weights == "ema" or (weights == "auto" and averaged) else "params"
    abstract = {
        name: jax.tree.map(trees.placed, params, split),
        "router": jax.tree.map(lambda leaf: trees.placed(leaf, whole), router),
    }
    items = read(directory, step, abstract, advice=_use_step)
    model.require_finite(items, directory / str(step))
    return LoadedRun(meta, items[name], items["router"], name)


def read_meta(workdir: StrPath, step: int | None = None, *, whole: bool = False) -> CheckpointMeta:
    """Returns the description in a checkpoint to resume from (None: the newest).

    With `whole` all files of the checkpoint are compared with their digests, not only those of the
    description.

    Raises UserError if there is no such checkpoint, or it is damaged.
    """
    directory = checkpoints_dir(workdir)
    return _read_meta(directory, find(directory, step), move_newer, whole=whole)


def find(directory: Path, step: int | None) -> int:
    """Returns the step, or for None the newest. Raises UserError where there is none."""
    steps = all_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory}")
    if step is not None and step not in steps:
        raise UserError(f"step {step} is not among {', '.join(map(str, steps))} in {directory}")
    return steps[-1] if step is None else step


def read(
    directory: Path,
    step: int,
    abstract_items: Mapping[str, Any],
    data_iterator: Any = None,
    *,
    advice: Advice,
    verified: bool = False,
) -> dict[str, Any]:
    """Reads items as `Checkpointer.restore` describes it; `advice` ends the errors of damage."""
    ocp = orbax()
    folder = directory / str(step)
    wanted = {name: trees.leaves(tree) for name, tree in abstract_items.items()}
    nested = {name: trees.nested(leaves, trees.to_restore) for name, leaves in wanted.items()}
    args = {name: ocp.args.StandardRestore(tree) for name, tree in nested.items() if tree}
    with _read_errors(directory, step, advice):
        if not verified:
            folders.check_number(folder, folders.meta_values(folder))
            folders.verify(folder, [*args, *([] if data_iterator is None else [DATA_ITEM])])
        for name in [name for name, tree in nested.items() if tree]:
            _check(folder / name, trees.leaves(nested[name]))
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            stored = reader.restore(folder, args=ocp.args.Composite(**args))
        if data_iterator is not None:
            data_iterator.set_state(_position(folder / DATA_ITEM))
            data_iterator.start_prefetch()
    result = {}
    for name, leaves in wanted.items():
        found = trees.leaves(stored[name]) if name in args else {}
        values = [trees.restored(leaf, found.get(key)) for key, leaf in leaves.items()]
        result[name] = jax.tree.unflatten(jax.tree.structure(abstract_items[name]), values)
    return result


def _position(folder: Path) -> dict[str, Any]:
    """Returns what the processes have saved, each in a file of its own, of the data's position.

    Each knows entries of it; what several know is the same.
    """
    position: dict[str, Any] = {}
    for path in sorted(folder.glob("process_*.json")):
        for name, value in read_json(path).items():
            is_part = isinstance(value, dict)
            position[name] = {**position.get(name, {}), **value} if is_part else value
    return position


def _read_meta(
    directory: Path, step: int, advice: Advice, *, whole: bool = False
) -> CheckpointMeta:
    folder = directory / str(step)
    with _read_errors(directory, step, advice):
        values = folders.meta_values(folder)
        meta = CheckpointMeta.parse(values)
        folders.check_number(folder, values)
        if whole:
            folders.verify(folder, folders.stored_items(folder))
    return meta


def _check(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Compares names, shapes and dtypes before reading: Orbax itself would cut arrays to size."""
    stored = trees.leaves(orbax().StandardCheckpointHandler().metadata(folder).tree)
    missing = [f"{folder.name}/{key}" for key in wanted if key not in stored]
    extra = [f"{folder.name}/{key}" for key in stored if key not in wanted]
    for verb, names in (("lacks", missing), ("has, beyond what is asked for,", extra)):
        if names:
            raise UserError(f"it {verb} {some_of(names)}")
    for key, leaf in wanted.items():
        there, here = trees.describe(stored[key]), trees.describe(leaf)
        if there != here:
            raise UserError(f"{folder.name}/{key} is {there} in it, not {here} as asked for")


@contextlib.contextmanager
def _read_errors(directory: Path, step: int, advice: Advice) -> Iterator[None]:
    """Turns the errors of a damaged or differing checkpoint into one line."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = f"cannot restore step {step} of {directory}: {lines[0][:400]}"
        if not (directory / str(step)).exists():
            message += "; the run has replaced it by a newer one meanwhile"
        elif isinstance(error, folders.Damaged):
            good = folders.newest_good(directory)
            message += (
                "; no other checkpoint is good"
                if good is None
                else (f"; checkpoint {good} is good: {advice(directory, good)}")
            )
        raise UserError(message) from error


def _use_step(directory: Path, good: int) -> str:
    return f"use it with --step={good}"


def move_newer(directory: Path, good: int) -> str:
    """Says how to train on from an older checkpoint: without the newer ones, which are damaged."""
    pairs = [
        (directory / str(step), directory.with_name(f"damaged-{step}"))
        for step in all_steps(directory)
        if step > good
    ]
    moves = [f"mv {shlex.quote(str(old))} {shlex.quote(str(new))}" for old, new in pairs]
    return f"to train on from it, first run {' && '.join(moves)}" if moves else "it is newer"
