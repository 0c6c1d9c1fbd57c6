"""Conversion between folders of runs and folders of Hugging Face."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lightning_jax import accounting
from lightning_jax.checkpoint import all_steps, checkpoints_dir, load_run, read_meta
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import resolve_tokenizer
from lightning_jax.data.tokenizer_folder import VOCABULARIES
from lightning_jax.interop import hf
from lightning_jax.interop.hf.config import read_config
from lightning_jax.interop.tokenizer_export import export_tokenizer
from lightning_jax.runtime.files import StrPath, read_json
from lightning_jax.runtime.folders import new_folder
from lightning_jax.train.start import write_start


def is_run(path: StrPath) -> bool:
    """Whether a folder is a run's, by its `config.json`."""
    return "stages" in read_json(Path(path) / "config.json")


def describe(path: StrPath, *, step: int | None = None) -> tuple[ModelConfig, str | None]:
    """Returns the model of a run's or a Hugging Face folder, and where its tokenizer is (or None).

    The model of a run is that of a checkpoint's weights (None: the newest).

    Raises:
      UserError: no such folder, or a config or checkpoint that cannot be read.
    """
    folder = Path(path)
    file = folder / "config.json"
    config = read_json(file)
    if "stages" in config:
        run = RunConfig.parse(config, file)
        trained = bool(all_steps(checkpoints_dir(folder)))
        return read_meta(folder, step).model if trained else run.model, run.data.tokenizer
    has_tokenizer = any((folder / name).exists() for name in VOCABULARIES)
    return read_config(config, where=file), str(folder) if has_tokenizer else None


def load_any(path: StrPath, *, step: int | None = None) -> hf.Imported:
    """Reads the float32 weights of a run's or a Hugging Face folder, all of them finite."""
    if not is_run(path):
        return hf.load(path)
    run = load_run(path, step=step)
    return hf.Imported(run.model, run.params, run.router)


def from_hugging_face(
    path: StrPath,
    workdir: StrPath,
    config: RunConfig,
    *,
    kv_source: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Makes a run's folder of a Hugging Face folder.

    Args:
      path: the Hugging Face folder.
      workdir: the run's folder to make.
      config: stages, data and optimizer of the run; its model is replaced by the folder's, and its
        tokenizer where the folder has one.
      kv_source: see `hf.load`.

    Returns:
      A summary of the model: model type, layers, parameters, tokenizer.

    Raises:
      UserError: a folder that cannot be read, or a workdir that has files or cannot be written.
        Nothing is left of it then.
    """
    _, tokenizer = describe(path)
    with new_folder(workdir, "workdir") as folder:
        loaded = hf.load(path, kv_source=kv_source)
        data = dataclasses.replace(config.data, tokenizer=tokenizer or config.data.tokenizer)
        run = dataclasses.replace(config, model=loaded.config, data=data)
        model_type = read_json(Path(path) / "config.json")["model_type"]
        origin = {"path": str(Path(path).absolute()), "model_type": model_type}
        write_start(folder, run, loaded.params, loaded.router, origin=origin)
    return {"workdir": str(workdir), **_summary(loaded.config, model_type), "tokenizer": tokenizer}


def to_hugging_face(
    workdir: StrPath,
    path: StrPath,
    *,
    step: int | None = None,
    weights: str = "auto",
    model_type: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Writes a checkpoint of a run as a Hugging Face folder, with the run's tokenizer.

    Args:
      workdir: the run's folder.
      path: the folder to make.
      step, weights: which checkpoint and which of its weights; see `checkpoint.load_run`.
      model_type: see `hf.save`.
      dtype: of the file; "bfloat16" rounds.

    Returns:
      A summary of the model: model type, layers, parameters, step, weights ("params" or "ema"),
      tokenizer (what other readers get of it).

    Raises:
      UserError: a workdir that is no run's, weights that the layout cannot express or that are not
        finite, or a path that has files or cannot be written. Nothing is left of it then.
    """
    if not is_run(workdir):
        raise UserError(f"workdir = {str(workdir)!r}: not the folder of a run")
    with new_folder(path, "path") as folder:
        run = load_run(workdir, step=step, weights=weights)
        model = dataclasses.replace(run.model, compute_dtype=dtype)
        rows = model.vocab_size
        tokenizer = resolve_tokenizer(Sources.open(run.config.data), workdir, rows=rows)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), run.params)
        model_type = hf.save(folder, model, params, run.router, model_type=model_type)
        exported = export_tokenizer(tokenizer, workdir, folder, rows=rows)
    about = {"step": run.meta.step, "weights": run.weights, "tokenizer": exported}
    return {"path": str(path), **_summary(model, model_type), **about}


def _summary(model: ModelConfig, model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "layers": "".join(spec.letter for spec in model.layers),
        "parameters": accounting.parameters(model).total,
    }
