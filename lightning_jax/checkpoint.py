"""Checkpoints of a run: named trees, the data iterator and the config, saved in the background.

A checkpoint is the folder `<workdir>/checkpoints/<step>/` with one Orbax item per tree, so
inference reads parameters and router alone. It gets its number only when all of it is on disk.
Orbax and Grain are imported by the first save or restore: starting a run does not wait for them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from lightning_jax import sharding
from lightning_jax.config import CheckpointMeta, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.runtime.files import StrPath, disk_errors, read_json, write_json

DATA_ITEM, META_ITEM = "data", "meta"
_DIGESTS = "sha256.json"
_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETED = "deleted" + _TEMPORARY


class Checkpointer:
    """Saves and restores the checkpoints of one run; leaving the context waits for the last save.

    An error of a background save is raised by the next `save`, `restore`, `wait` or `close`: as a
    UserError if the disk is the cause, else unchanged.
    """

    def __init__(self, workdir: StrPath, *, keep: int, keep_steps: Collection[int] = ()) -> None:
        """Makes the folder, tries to write there, and removes leftovers of an interrupted save.

        Keeps the newest `keep` checkpoints, and also those of `keep_steps` (the ends of stages).
        """
        require(keep >= 1, "keep", keep, "at least 1")
        self._directory = checkpoints_dir(workdir)
        self._keep, self._keep_steps = keep, sorted(keep_steps)
        self._manager: Any = None
        self._saving: int | None = None
        self._task = f"cannot save a checkpoint to {self._directory}"
        with disk_errors(self._task):
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory):
                self._remove_leftovers()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"and the last checkpoint was not saved: {failure}")

    def latest_step(self) -> int | None:
        """Returns the newest complete checkpoint's step, or None."""
        return max(all_steps(self._directory), default=None)

    def save(
        self, step: int, items: Mapping[str, Any], data_iterator: Any, meta: Mapping[str, Any]
    ) -> None:
        """Copies the state, then writes it in the background; a step already saved stays as it is.

        `items` maps names to pytrees of arrays and Python numbers, which the caller may donate or
        overwrite afterwards. The position of the Grain iterator (or None) is saved in one file per
        process. `meta` is a `CheckpointMeta` as a plain dict; `load_run` reads it.
        """
        reserved = {DATA_ITEM, META_ITEM} & set(items)
        if reserved:
            raise ValueError(f"items = {sorted(items)}: {sorted(reserved)} are reserved names")
        self.wait()
        if step in all_steps(self._directory):
            return
        ocp = _orbax()
        trees = {name: _nested(_leaves(tree), _to_save) for name, tree in items.items()}
        args = {name: ocp.args.StandardSave(tree) for name, tree in trees.items() if tree}
        args[META_ITEM] = ocp.args.JsonSave(dict(meta))
        if data_iterator is not None:
            import grain.checkpoint

            args[DATA_ITEM] = grain.checkpoint.CheckpointSave(data_iterator)
        with disk_errors(self._task):
            self._remove_leftovers()
            if self._manager is None:
                self._manager = self._make_manager()
            self._saving = step
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def restore(
        self, step: int | None, abstract_items: Mapping[str, Any], data_iterator: Any = None
    ) -> dict[str, Any]:
        """Reads items onto the devices asked for, whatever devices they were saved from.

        Args:
          step: which checkpoint; None is the newest.
          abstract_items: names to trees of `jax.ShapeDtypeStruct` with shardings (arrays and Python
            numbers serve as examples); other items of the checkpoint are not read.
          data_iterator: Grain iterator to move to the saved position; or None.

        Returns the items, in the containers of `abstract_items`. Raises UserError if there is no
        such checkpoint, it is damaged, or a name, shape or dtype differs from that asked for.
        """
        self.wait()
        return _read(self._directory, _find(self._directory, step), abstract_items, data_iterator)

    def wait(self) -> None:
        """Waits until the last save is complete on disk."""
        if self._manager is None:
            return
        try:
            with disk_errors(self._task):
                self._manager.wait_until_finished()
        except BaseException:
            # The manager has already dropped from its list the steps that this save would replace.
            self._manager.reload()
            raise

    def close(self) -> None:
        """Waits for the last save, then releases threads and deletes replaced checkpoints."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
            self._manager = None
            self._remove_leftovers()

    def _make_manager(self) -> Any:
        ocp = _orbax()
        policies = ocp.checkpoint_managers.preservation_policy
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(
                    [policies.LatestN(self._keep), policies.CustomSteps(self._keep_steps)]
                ),
                # A kill while deleting in place would leave half a checkpoint; a move is atomic.
                todelete_subdir=_DELETED,
                async_options=ocp.options.AsyncOptions(
                    # So `save` itself raises when a folder cannot be made.
                    create_directories_asynchronously=False,
                    post_finalization_callback=self._seal,
                ),
            ),
        )

    def _seal(self) -> None:
        """Adds the digest of every file, before the folder gets its number."""
        (folder,) = self._directory.glob(f"{self._saving}{_TEMPORARY}*")
        files = [path for path in sorted(folder.glob("*/**/*")) if path.is_file()]
        digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
        write_json(folder / _DIGESTS, digests)

    def _remove_leftovers(self) -> None:
        if jax.process_index() == 0:
            for path in self._directory.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(path, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """The parts of a run that inference needs."""

    meta: CheckpointMeta
    params: Any
    router: Any

    @property
    def config(self) -> RunConfig:
        return self.meta.config


def load_run(
    workdir: StrPath, *, step: int | None = None, mesh: Mesh | None = None, weights: str = "auto"
) -> LoadedRun:
    """Reads config, parameters and router of a run, also while it is still training.

    Args:
      step: which checkpoint; None is the newest.
      mesh: where to put parameters, stored as in training; None is the first device.
      weights: "params", "ema" (their moving average), or "auto": "ema" where it was saved.

    Raises UserError if there are no such checkpoint or weights, or the checkpoint is damaged.
    """
    require(weights in ("auto", "params", "ema"), "weights", weights, "auto, params or ema")
    from lightning_jax import model

    meta = read_meta(workdir, step)
    directory, config = checkpoints_dir(workdir), meta.config
    params = model.abstract_params(config.model)
    router = jax.eval_shape(lambda: model.init_router(config.model))
    if mesh is None:
        whole: Any = SingleDeviceSharding(jax.devices()[0])
        split = jax.tree.map(lambda _: whole, params)
    else:
        whole = sharding.replicated(mesh)
        split = sharding.tree_shardings(model.logical_axes(config.model), mesh)
    averaged = (directory / str(meta.step) / "ema").is_dir()
    name = "ema" if weights == "ema" or (weights == "auto" and averaged) else "params"
    abstract = {
        name: jax.tree.map(_placed, params, split),
        "router": jax.tree.map(lambda leaf: _placed(leaf, whole), router),
    }
    items = _read(directory, meta.step, abstract)
    return LoadedRun(meta, items[name], items["router"])


def read_meta(workdir: StrPath, step: int | None = None) -> CheckpointMeta:
    """Returns the description in a checkpoint (None: the newest). Raises as `load_run` does."""
    directory = checkpoints_dir(workdir)
    step = _find(directory, step)
    folder = directory / str(step)
    with _read_errors(directory, step):
        _verify(folder, {META_ITEM})
        return CheckpointMeta.parse(_orbax().JsonCheckpointHandler().restore(folder / META_ITEM))


def checkpoints_dir(workdir: StrPath) -> Path:
    """Returns the absolute folder of a run's checkpoints; nothing is made."""
    require("://" not in str(workdir), "workdir", str(workdir), "a local or mounted folder")
    return Path(workdir).absolute() / "checkpoints"


def all_steps(directory: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in `directory`, ascending."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdecimal())


def _placed(leaf: Any, where: Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _find(directory: Path, step: int | None) -> int:
    steps = all_steps(directory)
    if not steps:
        raise UserError(f"no checkpoint in {directory}")
    if step is not None and step not in steps:
        raise UserError(f"step {step} is not among {', '.join(map(str, steps))} in {directory}")
    return steps[-1] if step is None else step


def _read(
    directory: Path, step: int, abstract_items: Mapping[str, Any], data_iterator: Any = None
) -> dict[str, Any]:
    ocp = _orbax()
    folder = directory / str(step)
    wanted = {name: _leaves(tree) for name, tree in abstract_items.items()}
    trees = {name: _nested(leaves, _to_restore) for name, leaves in wanted.items()}
    args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items() if tree}
    if data_iterator is not None:
        import grain.checkpoint

        args[DATA_ITEM] = grain.checkpoint.CheckpointRestore(data_iterator)
    with _read_errors(directory, step):
        for name in [name for name, tree in trees.items() if tree]:
            _check(folder / name, _leaves(trees[name]))
        _verify(folder, args)
        with contextlib.closing(ocp.Checkpointer(ocp.CompositeCheckpointHandler())) as reader:
            restored = reader.restore(folder, args=ocp.args.Composite(**args))
    result = {}
    for name, leaves in wanted.items():
        found = _leaves(restored[name]) if name in args else {}
        values = [_restored(leaf, found.get(key)) for key, leaf in leaves.items()]
        result[name] = jax.tree.unflatten(jax.tree.structure(abstract_items[name]), values)
    return result


def _check(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Compares names, shapes and dtypes before reading: Orbax itself would cut arrays to size."""
    if not folder.is_dir():
        raise UserError(f"it lacks {folder.name}")
    stored = _leaves(_orbax().StandardCheckpointHandler().metadata(folder).tree)
    missing = [f"{folder.name}/{key}" for key in wanted if key not in stored]
    extra = [f"{folder.name}/{key}" for key in stored if key not in wanted]
    for verb, names in (("lacks", missing), ("has, beyond what is asked for,", extra)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"it {verb} {', '.join(names[:3])}{more}")
    for key, leaf in wanted.items():
        there, here = _describe(stored[key]), _describe(leaf)
        if there != here:
            raise UserError(f"{folder.name}/{key} is {there} in it, not {here} as asked for")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path, items: Collection[str]) -> None:
    """Compares files with their digests: Orbax would read flipped bits as other numbers."""
    for name, digest in read_json(folder / _DIGESTS).items():
        if name.split("/")[0] in items and _digest(folder / name) != digest:
            raise UserError(f"{name} is damaged")


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as `units/0_L/moe/gate_EDF`: these names are the format."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _nested(leaves: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Nests converted leaves; those without elements stay out, because Orbax refuses them."""
    flat = {key: convert(leaf) for key, leaf in leaves.items() if np.size(leaf)}
    return traverse_util.unflatten_dict(flat, sep="/")


def _to_save(leaf: Any) -> Any:
    # A copy, for an array of numpy may change under the background writer.
    return leaf if isinstance(leaf, jax.Array) else np.array(leaf)


def _to_restore(leaf: Any) -> Any:
    if not hasattr(leaf, "sharding"):
        return np.asarray(leaf)
    if leaf.sharding is None:
        raise TypeError(f"{leaf}: an abstract array to restore needs a sharding")
    return _placed(leaf, leaf.sharding)


def _restored(leaf: Any, value: Any) -> Any:
    if value is None:
        return jnp.zeros(leaf.shape, leaf.dtype, device=getattr(leaf, "sharding", None))
    return type(leaf)(value) if isinstance(leaf, bool | int | float) else value


@functools.cache
def _orbax() -> Any:
    """Imports Orbax, whose logging on every save and load is silenced: it also raises."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(lambda record: "orbax" not in Path(record.pathname).parts)
    return ocp


@contextlib.contextmanager
def _read_errors(directory: Path, step: int) -> Iterator[None]:
    """Turns the errors of a damaged or differing checkpoint into one line."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = f"cannot restore step {step} of {directory}: {lines[0][:400]}"
        raise UserError(message) from error
