"""A trained run as one object: text in; logits, losses, experts per token or more text out.

    run = lightning_jax.load_run("runs/a")
    run.logits("def f(x):")                       # [T, V]
    run.routing("def f(x):").experts_per_token    # mean over tokens and layers
    run.attention("def f(x):").probs_LNTS         # where each token looks
    run.with_top_p(0.3).generate("def ")          # fewer experts, more text

The RoPE base, the router's top-p and the tokenizer are those that the weights were trained with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from lightning_jax import checkpoint
from lightning_jax import model as lm
from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import suggest
from lightning_jax.config.fields import require
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer
from lightning_jax.infer.inspector import Inspector
from lightning_jax.runtime.files import StrPath


@dataclasses.dataclass(frozen=True)
class Run(Inspector):
    """A run's model with its weights, its tokenizer and its router; make it with `load_run`.

    What it does with a text are the methods of `infer.inspector.Inspector`.
    """

    loaded: LoadedRun
    tokenizer: Tokenizer

    @property
    def config(self) -> RunConfig:
        """What the run was trained with."""
        return self.loaded.config

    @property
    def model(self) -> ModelConfig:
        """The model of these weights; `config.model` has the RoPE base before any stage."""
        return self.loaded.model

    @property
    def params(self) -> Any:
        """Parameters in float32, as nested dicts: those of the last step, or their average."""
        return self.loaded.params

    @property
    def router(self) -> lm.Router:
        """Selection bias of the router, and the top-p that it routes with."""
        return self.loaded.router

    @property
    def step(self) -> int:
        """Optimizer steps that these weights have seen."""
        return self.loaded.meta.step

    def with_top_p(self, top_p: float) -> Run:
        """Returns the same run with another probability mass for the experts of a token to reach.

        Raises:
          UserError: the model does not route by top-p, or `top_p` is not in (0, 1].
        """
        return dataclasses.replace(self, loaded=self.loaded.with_routing(EvalRouting(top_p=top_p)))

    def held_out(self, name: str) -> Iterator[str]:
        """Yields the held-out documents of one of the run's sources, in the order of a hash.

        Raises:
          UserError: no source of that name, or its files are no longer there.
        """
        known = self.config.data.source_names
        require(name in known, "source", name, suggest(name, known))
        source = Sources.open(self.config.data).eval[name]
        return (source[document]["text"] for document in source.hash_order())


def load_run(
    workdir: StrPath, *, step: int | None = None, mesh: Mesh | None = None, weights: str = "auto"
) -> Run:
    """Reads a run from its folder, also while it is still training.

    Args:
      workdir: folder of the run, of `experiments.train` or `experiments.convert`.
      step: which checkpoint; None is the newest.
      mesh: devices to split the parameters over, see `checkpoint.load_run`; the methods of the
        result are then called under `jax.set_mesh(mesh)`. None: the first device.
      weights: "params", "ema" (their moving average), or "auto": "ema" where it was saved.

    Raises:
      UserError: no such checkpoint or weights, a damaged checkpoint, a weight that is not finite,
        or a tokenizer that cannot be read.
    """
    loaded = checkpoint.load_run(workdir, step=step, mesh=mesh, weights=weights)
    config = loaded.config
    rows = config.model.vocab_size
    tokenizer = resolve_tokenizer(Sources.open(config.data), workdir, rows=rows)
    return Run(loaded, tokenizer)
