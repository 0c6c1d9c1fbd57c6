"""A trained run as one object: text in; logits, losses, experts per token or more text out.

    run = lightning_jax.load_run("runs/a")
    run.logits("def f(x):")                       # [T, V]
    run.routing("def f(x):").experts_per_token    # mean over tokens and layers
    run.with_top_p(0.3).generate("def ")          # fewer experts, more text

The RoPE base, the router's top-p and the tokenizer are those that the weights were trained with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lightning_jax import checkpoint, sharding
from lightning_jax import model as lm
from lightning_jax.checkpoint import LoadedRun
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import suggest
from lightning_jax.config.fields import require
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer
from lightning_jax.infer.buckets import length_bucket
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from lightning_jax.infer.text import encode_prompt, stream_text
from lightning_jax.runtime import compiler
from lightning_jax.runtime.files import StrPath


@dataclasses.dataclass(frozen=True)
class TextRouting:
    """The experts that each token of a text took.

    pieces: text of each of the T tokens; joined, the text. Tokens that end inside a character, and
      the bos token, have an empty one.
    layers: indices, in the model, of the R layers that have experts.
    expert_index_RTC: int32 `[R, T, C]`, chosen experts in order; E marks an empty slot.
    num_experts: E, experts that a layer holds.
    """

    pieces: tuple[str, ...]
    layers: tuple[int, ...]
    expert_index_RTC: np.ndarray
    num_experts: int

    @property
    def count_RT(self) -> np.ndarray:
        """int `[R, T]`: experts of each token in each layer."""
        return (self.expert_index_RTC < self.num_experts).sum(-1)

    @property
    def load_RE(self) -> np.ndarray:
        """int `[R, E]`: tokens of each expert of each layer."""
        return np.stack(
            [np.bincount(i.ravel(), minlength=self.num_experts + 1) for i in self.expert_index_RTC]
        )[:, : self.num_experts]

    @property
    def experts_per_token(self) -> float:
        """Mean over tokens and layers."""
        return float(self.count_RT.mean())


@dataclasses.dataclass(frozen=True)
class TextScore:
    """How well a run predicts some texts, and with how many experts.

    bits_per_byte: over all tokens but the first of each text, per UTF-8 byte of them.
    experts_per_token: mean over tokens and layers; NaN for a model without experts.
    tokens: that were predicted.
    """

    bits_per_byte: float
    experts_per_token: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's model with its weights, its tokenizer and its router; make it with `load_run`."""

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

    def encode(self, text: str) -> list[int]:
        """Returns the T token ids that the methods below read: a document that begins with `text`.

        They begin with bos if the model was taught so.
        """
        return encode_prompt(self.tokenizer, text)

    def logits(self, text: str) -> np.ndarray:
        """Returns float32 logits `[T, V]`: row t scores the token after token t of `encode`."""
        ids = self.encode(text)
        return np.asarray(self._forward(ids).logits_TV[: len(ids)])

    def token_losses(self, text: str) -> np.ndarray:
        """Returns float32 `[T - 1]`: nats that each token of `encode` costs, but the first."""
        ids = self.encode(text)
        return _losses(self._forward(ids), ids)

    def routing(self, text: str) -> TextRouting:
        """Returns the experts of each token of `encode` in each layer.

        Raises:
          UserError: the model has no experts.
        """
        moe, ids = self.model.moe, self.encode(text)
        require(moe.num_experts > 0, "model.moe.num_experts", 0, "above 0 to have a routing")
        decoder = self.tokenizer.stream_decoder()
        pieces = [decoder.push(token) for token in ids]
        pieces[-1] += decoder.flush()
        index_RTC = np.asarray(self._forward(ids).expert_index_RTC)
        routed = [i for i, spec in enumerate(self.model.layers) if spec.routed]
        return TextRouting(tuple(pieces), tuple(routed), index_RTC[:, : len(ids)], moe.num_experts)

    def score(self, texts: Iterable[str]) -> TextScore:
        """Returns bits per byte and experts per token over texts, each read by itself.

        `experiments.evaluate` measures whole held-out documents, packed as in training; this is for
        comparing routers, or runs, on a few texts at hand.

        Raises:
          UserError: no text has more than one token.
        """
        nats, num_bytes, tokens, counts = 0.0, 0, 0, []
        for text in texts:
            ids = self.encode(text)
            forward = self._forward(ids)
            nats, tokens = nats + float(_losses(forward, ids).sum()), tokens + len(ids) - 1
            num_bytes += len(self.tokenizer.decode(ids[1:]).encode())
            if forward.expert_index_RTC is not None:
                index_RTC = np.asarray(forward.expert_index_RTC)[:, : len(ids)]
                counts.append((index_RTC < self.model.moe.num_experts).sum(-1))
        require(
            num_bytes > 0, "texts", f"{tokens} tokens to predict", "at least one, of some bytes"
        )
        experts = float(np.concatenate(counts, axis=1).mean()) if counts else math.nan
        return TextScore(nats / math.log(2) / num_bytes, experts, tokens)

    def held_out(self, name: str) -> Iterator[str]:
        """Yields the held-out documents of one of the run's sources, in the order of a hash.

        Raises:
          UserError: no source of that name, or its files are no longer there.
        """
        known = self.config.data.source_names
        require(name in known, "source", name, suggest(name, known))
        source = Sources.open(self.config.data).eval[name]
        return (source[document]["text"] for document in source.hash_order())

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        seed: int = 0,
    ) -> str:
        """Returns the text that follows `prompt`; the same seed gives the same text.

        Args:
          max_new_tokens: tokens at the most; a token that ends a text ends it.
          temperature: divides the logits; 0: greedy.
          top_k: draw from the k most probable tokens; 0: all.
          top_p: draw from the most probable tokens of this mass (not the router's: `with_top_p`).
          seed: of the draws.

        Raises:
          UserError: a number out of its range.
        """
        ids = self.encode(prompt)
        engine = Engine(
            self.model,
            self.params,
            self.router,
            max_length=len(ids) + max_new_tokens,
            valid_vocab=self.tokenizer.vocab_size,
        )
        pieces = stream_text(
            engine,
            self.tokenizer,
            ids,
            Sampling(temperature, top_k, top_p),
            max_new_tokens=max_new_tokens,
            key=jax.random.key(seed),
            rows=sharding.ambient_shards("batch"),
        )
        return "".join(pieces)

    def _forward(self, ids: list[int]) -> _Forward:
        tokens_T = np.zeros(length_bucket(len(ids)), np.int32)
        tokens_T[: len(ids)] = ids
        tokens_BT = np.tile(tokens_T, (sharding.ambient_shards("batch"), 1))
        return _forward(self.model, self.params, self.router, tokens_BT, jnp.int32(len(ids)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Forward:
    logits_TV: jax.Array
    expert_index_RTC: jax.Array | None


def _losses(forward: _Forward, ids: Sequence[int]) -> np.ndarray:
    """Nats that each token costs, but the first."""
    # Over the whole bucket: each length would be compiled.
    scores_TV = np.asarray(jax.nn.log_softmax(forward.logits_TV))[: len(ids) - 1]
    return -np.take_along_axis(scores_TV, np.asarray(ids[1:])[:, None], 1)[:, 0]


@functools.partial(compiler.jit, static_argnames=("config",))
def _forward(
    config: ModelConfig,
    params: Any,
    router: lm.Router,
    tokens_BT: jax.Array,
    length: jax.Array,
) -> _Forward:
    """One row's logits and choices; the batch repeats it, and positions from `length` on are 0."""
    valid_T = jnp.arange(tokens_BT.shape[1]) < length
    output = lm.LightningLM(config).apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=jnp.broadcast_to(valid_T.astype(jnp.int32), tokens_BT.shape),
        router=router,
        keep_choices=True,
    )
    index_RTC = None
    if output.stats is not None and output.stats.choices is not None:
        index_URBTC = output.stats.choices.expert_index_MC
        index_RTC = index_URBTC[:, :, 0].reshape(-1, *index_URBTC.shape[3:])
    return _Forward(output.logits()[0], index_RTC)


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
