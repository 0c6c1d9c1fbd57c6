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
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require_choice
from lightning_jax.config.model import COMPUTE_DTYPES
from lightning_jax.interop.hf.config import LIGHTNING, read_config, write_config
from lightning_jax.interop.hf.families import FAMILIES
from lightning_jax.interop.hf.safetensors_files import Reader, write_folder
from lightning_jax.interop.hf.tensors import (
    SELECTION_BIAS,
    FileTensor,
    file_tensors,
    has_selection_bias,
)
from lightning_jax.runtime.files import read_json, write_json

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
        that is missing, left over, or of another shape.
    """
    require_choice("dtype", dtype, COMPUTE_DTYPES)
    folder = Path(path)
    described = read_json(folder / "config.json")
    config = read_config(described, kv_source)
    config = dataclasses.replace(config, compute_dtype=dtype)
    tensors = file_tensors(config, described["model_type"])
    targets = _Targets(config, dtype, mesh)
    with Reader(folder) as reader:
        _check(reader, tensors, config, folder)
        for tensor in tensors:
            read = reader.read(tensor.name)
            lm.require_finite({tensor.name: read}, folder)
            for part, value in zip(tensor.parts, tensor.split(read), strict=True):
                targets.put(part.path, part.index, value)
    leaves = targets.finish()
    router = lm.init_router(config)
    router = dataclasses.replace(router, bias_URE=leaves.pop(SELECTION_BIAS))
    if described["model_type"] == LIGHTNING:
        router = dataclasses.replace(router, top_p=jnp.float32(described["top_p"]))
    return Imported(config, traverse_util.unflatten_dict(leaves, sep="/"), router)


def _check(reader: Reader, tensors: list[FileTensor], config: ModelConfig, folder: Path) -> None:
    """Compares names and shapes with those that the config implies, before anything is read."""
    wanted = {tensor.name: tensor.shape for tensor in tensors}
    found = {name for name in reader.names if not name.endswith(_DERIVED)}
    if config.tie_embeddings and _HEAD in found and _TIED_TO in found:
        # Some writers repeat the embedding as the head; a head that differs is another model.
        if not np.array_equal(reader.read(_HEAD), reader.read(_TIED_TO)):
            raise UserError(f"{folder}: {_HEAD} differs from the embedding that it is tied to")
        found.remove(_HEAD)
    for verb, names in (
        ("lacks", sorted(set(wanted) - found)),
        ("has, beyond what config.json says,", sorted(found - set(wanted))),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{folder}: {verb} {', '.join(names[:3])}{more}")
    for name, shape in wanted.items():
        if reader.shape(name) != shape:
            raise UserError(
                f"{folder}: {name} has shape {list(reader.shape(name))}, "
                f"config.json says {list(shape)}"
            )


class _Targets:
    """Parameters on their devices, filled slice by slice in place."""

    def __init__(self, config: ModelConfig, dtype: str, mesh: Mesh | None):
        abstract = traverse_util.flatten_dict(lm.abstract_params(config), sep="/")
        axes = traverse_util.flatten_dict(lm.logical_axes(config), sep="/")
        self._shapes = {path: leaf.shape for path, leaf in abstract.items()}
        self._dtypes = dict.fromkeys(abstract, jnp.dtype(dtype))
        bias = jax.eval_shape(lambda: lm.init_router(config)).bias_URE
        self._shapes[SELECTION_BIAS], self._dtypes[SELECTION_BIAS] = bias.shape, bias.dtype
        whole: Any = SingleDeviceSharding(jax.devices()[0]) if mesh is None else None
        self._placement = {
            path: whole or sharding.tree_shardings(axes.get(path, ()), mesh)
            for path in self._shapes
        }
        self._arrays: dict[str, jax.Array] = {}

    def put(self, path: str, index: tuple[int, ...], value: np.ndarray) -> None:
        """Writes `value` to `parameter[index]`."""
        value = value.astype(self._dtypes[path])
        if not index:
            self._arrays[path] = jax.device_put(np.ascontiguousarray(value), self._placement[path])
            return
        if path not in self._arrays:
            self._arrays[path] = self._zeros(path)
        value = value.reshape((1,) * len(index) + value.shape)
        start = index + (0,) * (value.ndim - len(index))
        self._arrays[path] = _write(self._arrays[path], value, np.asarray(start, np.int32))

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
      path: the folder; made if it is not there.
      config, params: the model.
      router: its selection bias and top-p; None: those at the start of training.
      model_type: one of `families.FAMILIES`, or "lightning"; None: the first family that can
        express the model, "lightning" if none can.
      max_shard_bytes: a larger model is written as several files.

    Returns:
      The model type.

    Raises:
      UserError: the layout cannot express a part of the model, or the disk refuses.
    """
    lm.require_finite(params, path)
    router = lm.init_router(config) if router is None else router
    model_type = _first_that_fits(config, router) if model_type is None else model_type
    described = write_config(config, model_type)
    _check_router(router, model_type)
    if model_type == LIGHTNING:
        described["top_p"] = float(router.top_p)
    leaves = traverse_util.flatten_dict(params, sep="/")
    leaves[SELECTION_BIAS] = router.bias_URE
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(
            folder,
            _file_values(file_tensors(config, model_type), leaves),
            max_shard_bytes=max_shard_bytes,
        )
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
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
