"""Checkpoints of a run: named trees, the data iterator and the config, saved in the background.

A checkpoint is the folder `<workdir>/checkpoints/<step>/` with one Orbax item per tree, so
inference reads parameters and router alone. It gets its number only when all of it is on disk.
Orbax and Grain are imported by the first save or restore: starting a run does not wait for them.
"""

from lightning_jax.checkpoint.folders import all_steps, checkpoints_dir
from lightning_jax.checkpoint.manager import Checkpointer
from lightning_jax.checkpoint.reading import LoadedRun, load_run, read_meta

__all__ = [
    "Checkpointer",
    "LoadedRun",
    "all_steps",
    "checkpoints_dir",
    "load_run",
    "read_meta",
]
