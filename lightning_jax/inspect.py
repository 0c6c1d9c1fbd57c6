"""Look inside a model while it reads a text: a run's, or that of a Hugging Face folder.

    model = lightning_jax.inspect.open("runs/a")
    model.logits(text)                      # [T, V]
    model.attention(text).probs_LNTS        # where each token looks, by layer and head
    model.routing(text).count_RT            # experts of each token, by layer
    model.router_probs(text)                # [R, T, E]
    model.kv_bytes(text)                    # of the cache after the text

`lightning_jax.plots` draws what these return.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lightning_jax import model as lm
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.data.tokenizer import Tokenizer, load_tokenizer
from lightning_jax.infer.inspector import Inspector
from lightning_jax.infer.readings import TextAttention, TextRouting, TextScore
from lightning_jax.infer.run import load_run
from lightning_jax.interop import convert, hf
from lightning_jax.runtime.files import StrPath

__all__ = ["ImportedModel", "Inspector", "TextAttention", "TextRouting", "TextScore", "open"]


@dataclasses.dataclass(frozen=True)
class ImportedModel(Inspector):
    """The model of a Hugging Face folder; make it with `open`."""

    loaded: hf.Imported
    tokenizer: Tokenizer

    @property
    def model(self) -> ModelConfig:
        """The model of these weights."""
        return self.loaded.config

    @property
    def params(self) -> Any:
        """Parameters in float32, as nested dicts."""
        return self.loaded.params

    @property
    def router(self) -> lm.Router:
        """Selection bias of the router, and the top-p that it routes with."""
        return self.loaded.router


def open(path: StrPath) -> Inspector:
    """Reads the folder of a run, the newest weights, or one in a layout of Hugging Face.

    `lightning_jax.load_run` reads another checkpoint of a run, or onto a mesh.

    Args:
      path: the folder. Of Hugging Face, it holds the tokenizer too.

    Returns:
      A `Run` (see `infer.run`), or an `ImportedModel`.

    Raises:
      UserError: no such folder, or a config, weights or tokenizer that cannot be read.
    """
    right = "the folder of a run, or one of Hugging Face: there is no config.json in it"
    require((Path(path) / "config.json").is_file(), "path", str(path), right)
    if convert.is_run(path):
        return load_run(path)
    _, tokenizer = convert.describe(path)
    if tokenizer is None:
        raise UserError(f"path = {str(path)!r}: must have a tokenizer beside its weights")
    loaded = hf.load(path)
    found = load_tokenizer(tokenizer).within(loaded.config.vocab_size)
    return ImportedModel(loaded, found)
