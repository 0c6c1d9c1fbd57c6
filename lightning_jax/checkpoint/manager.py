"""The checkpoints of a run in training: saved in the background, restored, and the old deleted."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax

from lightning_jax.checkpoint import reading, trees
from lightning_jax.checkpoint.folders import META_ITEM, all_steps, checkpoints_dir
from lightning_jax.checkpoint.library import orbax, sealed_path
from lightning_jax.checkpoint.reading import DATA_ITEM
from lightning_jax.config.fields import require
from lightning_jax.runtime.files import StrPath, disk_errors, remove_leftovers, sync_folder

_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETED = "deleted" + _TEMPORARY


class Checkpointer:
    """Saves and restores the checkpoints of one run; leaving the context waits for the last save.

    An error of a background save is raised by the next `save`, `restore`, `wait` or `close`: as a
    UserError if the disk is the cause, else unchanged.
    """

    def __init__(self, workdir: StrPath, *, keep: int, keep_steps: Collection[int] = ()) -> None:
        """Makes the folder, tries to write there, and removes what killed writers of the run left.

        Keeps the newest `keep` checkpoints, and also those of `keep_steps` (the ends of stages).
        Only one process at a time may have a run's folder, of which this is not the lock.
        """
        require(keep >= 1, "keep", keep, "at least 1")
        self._directory = checkpoints_dir(workdir)
        self._keep, self._keep_steps = keep, sorted(keep_steps)
        self._manager: Any = None
        self._task = f"cannot save a checkpoint to {self._directory}"
        with disk_errors(self._task):
            self._directory.mkdir(parents=True, exist_ok=True)
            sync_folder(self._directory.parent)
            with tempfile.TemporaryFile(dir=self._directory):
                self._remove_leftovers()
                if jax.process_index() == 0:
                    remove_leftovers(self._directory.parent)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"and the last checkpoint was not saved: {failure}")

    def save(
        self, step: int, items: Mapping[str, Any], data_iterator: Any, meta: Mapping[str, Any]
    ) -> None:
        """Copies the state, then writes it in the background; a step already saved stays as it is.

        `items` maps names to pytrees of arrays and Python numbers, which the caller may donate or
        overwrite afterwards. The position of the Grain iterator (or None) is saved in one file per
        process: what each knows of a nested dict. `meta` is a `CheckpointMeta` as a plain dict;
        `load_run` reads it.
        """
        reserved = {DATA_ITEM, META_ITEM} & set(items)
        if reserved:
            raise ValueError(f"items = {sorted(items)}: {sorted(reserved)} are reserved names")
        if meta.get("step") != step:
            raise ValueError(f"meta: step = {meta.get('step')!r} in checkpoint {step}")
        self.wait()
        if step in all_steps(self._directory):
            return
        ocp = orbax()
        nested = {
            name: trees.nested(trees.leaves(tree), trees.to_save) for name, tree in items.items()
        }
        args = {name: ocp.args.StandardSave(tree) for name, tree in nested.items() if tree}
        args[META_ITEM] = ocp.args.JsonSave(dict(meta))
        if data_iterator is not None:
            import grain.checkpoint

            args[DATA_ITEM] = grain.checkpoint.CheckpointSave(data_iterator)
        with self._errors_of_a_save():
            self._remove_leftovers()
            if self._manager is None:
                self._manager = self._make_manager()
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def restore(
        self,
        step: int | None,
        abstract_items: Mapping[str, Any],
        data_iterator: Any = None,
        *,
        verified: bool = False,
    ) -> dict[str, Any]:
        """Reads items onto the devices asked for, whatever devices they were saved from.

        Args:
          step: which checkpoint; None is the newest.
          abstract_items: names to trees of `jax.ShapeDtypeStruct` with shardings (arrays and Python
            numbers serve as examples); other items of the checkpoint are not read.
          data_iterator: Grain iterator to move to the saved position; or None. It gets what all the
            processes that saved know, in one dict.
          verified: whether `read_meta` has compared the whole checkpoint with its digests already,
            since this process has the folder.

        Returns the items, in the containers of `abstract_items`. Raises UserError if there is no
        such checkpoint, it is damaged, or a name, shape or dtype differs from that asked for.
        """
        self.wait()
        found = reading.find(self._directory, step)
        return reading.read(
            self._directory,
            found,
            abstract_items,
            data_iterator,
            advice=reading.move_newer,
            verified=verified,
        )

    def wait(self) -> None:
        """Waits until the last save is complete on disk."""
        if self._manager is not None:
            with self._errors_of_a_save():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save, then releases threads and deletes replaced checkpoints."""
        try:
            self.wait()
            if self._manager is not None:
                with self._errors_of_a_save():
                    self._manager.close()
        finally:
            self._manager = None
            self._remove_leftovers()

    @contextlib.contextmanager
    def _errors_of_a_save(self) -> Iterator[None]:
        try:
            with disk_errors(self._task):
                yield
        except Exception:
            # It would report more of the same failure later, and it no longer knows which
            # checkpoints there are; the next save makes another.
            manager, self._manager = self._manager, None
            if manager is not None:
                with contextlib.suppress(Exception):
                    manager.close()
            raise

    def _make_manager(self) -> Any:
        ocp = orbax()
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
                    create_directories_asynchronously=False
                ),
                temporary_path_class=sealed_path(),
                # Nothing of older checkpoints is read, which may be damaged.
                lightweight_initialize=True,
            ),
        )

    def _remove_leftovers(self) -> None:
        if jax.process_index() == 0:
            for path in self._directory.glob(f"*{_TEMPORARY}*"):
                shutil.rmtree(path, ignore_errors=True)
