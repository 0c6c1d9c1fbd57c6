"""Models in Hugging Face folders (`config.json` and safetensors), read onto a mesh and written.

`load` and `save` know the published layouts of `families.FAMILIES`, and `lightning`, our own,
which holds every model that this project can build.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, SingleDeviceSharding

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError, some_of
from lightning_jax.config.fields import require_choice
from lightning_jax.config.kinds import shorten
from lightning_jax.config.model import COMPUTE_DTYPES
from lightning_jax.interop.hf.config import LIGHTNING, read_config, read_top_p, write_config
from lightning_jax.interop.hf.families import FAMILIES
from lightning_jax.interop.hf.safetensors_files import Reader, write_folder
from lightning_jax.interop.hf.tensors import (
    SELECTION_BIAS,
    FileTensor,
    Part,
    file_tensors,
    has_selection_bias,
    known_name,
    parameter_shapes,
)
from lightning_jax.runtime.files import disk_errors, read_json, write_json
from lightning_jax.runtime.folders import new_folder

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 4 * 10**9
# Buffers that old files carry and every reader computes for itself.
_DERIVED = ".rotary_emb.inv_freq"
_HEAD, _TIED_TO = "lm_head.weight", "model.embed_tokens.weight"


class Imported(NamedTuple):
    """A model that was read. `router` has the selection bias, which is state, not a parameter."""

    config: ModelConfig
    params: Any
    router: lm.Router


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    kv_source: Sequence[int] | None = None,
) -> Imported:
    """Reads a model of any known family.

    Parameters are placed as in training, by their logical axes, one file tensor after another: host
    memory holds no more than one of them beside the parameters.

    Args:
      path: folder with `config.json` and `model.safetensors` or its shards.
      dtype: of the parameters and of the computation.
      mesh: where to put the parameters; None is the first device.
      kv_source: for each layer the layer whose keys and values it reads, itself where it owns
        them; for models that share them and do not say so in their config.

    Returns:
      `(config, params, router)`; give all three to the model.

    Raises:
      UserError: an unknown model type or setting, a missing, damaged or incomplete file, a tensor
        that is missing, left over, of another shape, no floats, or not finite.
    """
    require_choice("dtype", dtype, COMPUTE_DTYPES)
    folder = Path(path)
    file = folder / "config.json"
    described = read_json(file)
    config = read_config(described, kv_source, where=file)
    config = dataclasses.replace(config, compute_dtype=dtype)
    model_type = described["model_type"]
    router = lm.init_router(config)
    if model_type == LIGHTNING:
        router = dataclasses.replace(router, top_p=jnp.float32(read_top_p(described, file)))
    with Reader(folder, functools.partial(known_name, model_type=model_type)) as reader:
        tensors = _tensors(reader, config, model_type, folder)
        targets = _Targets(config, dtype, mesh)
        for name, tensor in tensors.items():
            for part, value in zip(tensor.parts, tensor.split(reader.read(name)), strict=True):
                lm.require_finite({name: targets.put(part, value)}, folder)
    leaves = targets.finish()
    router = dataclasses.replace(router, bias_URE=leaves.pop(SELECTION_BIAS))
    return Imported(config, traverse_util.unflatten_dict(leaves, sep="/"), router)


def _tensors(
    reader: Reader, config: ModelConfig, model_type: str, folder: Path
) -> dict[str, FileTensor]:
    """Returns the tensors by their names in the folder.

    Names, types and shapes are compared with those that the config implies, before anything is
    read.
    """
    found = {name for name in reader.names if not name.endswith(_DERIVED)}
    tensors = {tensor.name: tensor for tensor in file_tensors(config, model_type, found)}
    if config.tie_embeddings and _HEAD in found:
        if _TIED_TO in found:
            _check_head(reader, folder)
            found.remove(_HEAD)
        else:
            tensors = {_HEAD: tensors.pop(_TIED_TO), **tensors}
    for verb, names in (
        ("lacks", sorted(set(tensors) - found)),
        ("has, beyond what config.json says,", sorted(found - set(tensors))),
    ):
        if names:
            listed = some_of([shorten(name).strip("'") for name in names])
            raise UserError(f"{folder}: {verb} {listed}")
    for name, tensor in tensors.items():
        shape = reader.shape(name)
        if shape != tensor.shape:
            says = f"config.json says {list(tensor.shape)}"
            raise UserError(f"{folder}: {name} has shape {list(shape)}, {says}")
    if any(tensor.form == "linears" for tensor in tensors.values()):
        logger.info("%s: the experts of a layer are in one tensor, gate_up_proj", folder)
    return tensors


def _check_head(reader: Reader, folder: Path) -> None:
    """Some writers repeat the embedding as the head; a head that differs is another model."""
    same = reader.shape(_HEAD) == reader.shape(_TIED_TO)
    if not same or not np.array_equal(reader.read(_HEAD), reader.read(_TIED_TO)):
        raise UserError(f"{folder}: {_HEAD} differs from the embedding that it is tied to")


class _Targets:
    """Parameters on their devices, filled slice by slice in place."""

    def __init__(self, config: ModelConfig, dtype: str, mesh: Mesh | None):
        axes: dict[str, Any] = traverse_util.flatten_dict(lm.logical_axes(config), sep="/")
        self._shapes = parameter_shapes(config)
        self._dtypes = dict.fromkeys(self._shapes, jnp.dtype(dtype))
        self._dtypes[SELECTION_BIAS] = jnp.dtype(jnp.float32)
        one: Any = SingleDeviceSharding(jax.devices()[0]) if mesh is None else None
        self._placement = {
            path: one if mesh is None else sharding.tree_shardings(axes.get(path, ()), mesh)
            for path in self._shapes
        }
        self._arrays: dict[str, jax.Array] = {}

    def put(self, part: Part, value: np.ndarray) -> np.ndarray:
        """Writes `value` to its part of a parameter; returns it as it is there."""
        path, index = part.path, part.index
        with np.errstate(over="ignore"):  # said below
            value = value.astype(self._dtypes[path])
        if not index:
            self._arrays[path] = jax.device_put(np.ascontiguousarray(value), self._placement[path])
            return value
        if path not in self._arrays:
            self._arrays[path] = self._zeros(path)
        value = value.reshape((1,) * len(index) + value.shape)
        start = index + (0,) * (value.ndim - len(index))
        self._arrays[path] = _write(self._arrays[path], value, np.asarray(start, np.int32))
        return value

    def _zeros(self, path: str) -> jax.Array:
        shape, dtype = self._shapes[path], self._dtypes[path]
        return jnp.zeros(shape, dtype, device=self._placement[path])

    def finish(self) -> dict[str, jax.Array]:
        """Returns all arrays by path; a selection bias that no tensor holds is zero."""
        if SELECTION_BIAS not in self._arrays:
            self._arrays[SELECTION_BIAS] = self._zeros(SELECTION_BIAS)
        return self._arrays


@functools.partial(jax.jit, donate_argnums=(0,))
def _write(array: jax.Array, value: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(array, value, list(start))


def save(
    path: str | os.PathLike[str],
    config: ModelConfig,
    params: Any,
    router: lm.Router | None = None,
    *,
    model_type: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> str:
    """Writes a model so that `load` gives the same bits.

    Args:
      path: the folder to make; it must not exist, or be empty.
      config, params: the model.
      router: its selection bias and top-p; None: those at the start of training.
      model_type: one of `families.FAMILIES`, or "lightning"; None: the first family that can
        express the model, "lightning" if none can.
      max_shard_bytes: a larger model is written as several files.

    Returns:
      The model type.

    Raises:
      UserError: the layout cannot express a part of the model, a parameter is not finite, the
        folder has files, or the disk refuses. Nothing is left of it then.
    """
    lm.require_finite(params, path)
    router = lm.init_router(config) if router is None else router
    lm.require_finite({"router": router}, path)
    model_type = _first_that_fits(config, router) if model_type is None else model_type
    described = write_config(config, model_type)
    _check_router(router, model_type)
    if model_type == LIGHTNING:
        described["top_p"] = float(router.top_p)
    leaves: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    leaves[SELECTION_BIAS] = router.bias_URE
    values = _file_values(file_tensors(config, model_type), leaves)
    with new_folder(path, "path") as folder, disk_errors(f"cannot write {path}"):
        write_folder(folder, values, max_shard_bytes=max_shard_bytes)
        write_json(folder / "config.json", described)
    return model_type


def _file_values(
    tensors: list[FileTensor], leaves: dict[str, jax.Array]
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in tensors:
        values = [np.asarray(leaves[part.path][part.index]) for part in tensor.parts]
        yield tensor.name, tensor.join(values)


def _first_that_fits(config: ModelConfig, router: lm.Router) -> str:
    for model_type in FAMILIES:
        try:
            write_config(config, model_type)
            _check_router(router, model_type)
        except UserError:
            continue
        logger.info("saving in the %s layout", model_type)
        return model_type
    return LIGHTNING


def _check_router(router: lm.Router, model_type: str) -> None:
    if not has_selection_bias(model_type) and bool(jnp.any(router.bias_URE != 0)):
        raise UserError(
            f"router.bias: the {model_type} layout has no place for a selection bias that is not 0"
        )
