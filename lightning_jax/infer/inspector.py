"""A model that reads text: logits, losses, experts, attention maps and more text out.

`Inspector` needs a model, its weights, its router and a tokenizer, wherever they come from: a run
(`infer.run`) or a Hugging Face folder (`inspect`).
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.accounting import binary, kv_cache_bytes
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.infer.buckets import length_bucket
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.readings import TextAttention, TextRouting, TextScore
from lightning_jax.infer.sampling import Sampling
from lightning_jax.infer.text import encode_prompt, stream_text
from lightning_jax.runtime import compiler

_LARGEST_MAPS = 2**32


class Inspector(abc.ABC):
    """A model with its weights, its router and its tokenizer, which reads and writes text.

    Make one with `lightning_jax.load_run` or `lightning_jax.inspect.open`. A text of another length
    seldom compiles: lengths are rounded up to few sizes.
    """

    tokenizer: Tokenizer

    @property
    @abc.abstractmethod
    def model(self) -> ModelConfig:
        """The model of these weights."""

    @property
    @abc.abstractmethod
    def params(self) -> Any:
        """Parameters in float32, as nested dicts."""

    @property
    @abc.abstractmethod
    def router(self) -> lm.Router:
        """Selection bias of the router, and the top-p that it routes with."""

    def encode(self, text: str) -> list[int]:
        """Returns the T token ids that the methods below read: a document that begins with `text`.

        They begin with bos if the model was taught so.

        Raises:
          UserError: it is no string, or not valid Unicode.
        """
        require(isinstance(text, str), "text", text, "a string")
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
        index_RTC = np.asarray(self._forward(ids).expert_index_RTC)[:, : len(ids)]
        return TextRouting(self._pieces(ids), self._routed, index_RTC, moe.num_experts)

    def router_probs(self, text: str) -> np.ndarray:
        """Returns float32 `[R, T, E]`: the router's probabilities of all experts, which sum to 1.

        The R layers are those of `routing`. Selection bias and group limits, which only order the
        choice of experts, are in none of them.

        Raises:
          UserError: the model has no experts.
        """
        held, ids = self.model.moe.num_experts, self.encode(text)
        require(held > 0, "model.moe.num_experts", 0, "above 0 to have a router")
        return np.asarray(self._kept(ids, "moe", self._routed))[:, : len(ids)]

    def attention(self, text: str, *, layers: Sequence[int] | None = None) -> TextAttention:
        """Returns where each token of `encode` looks, as the reference attention computes it.

        A layer that borrows keys looks at those of their owner. A head's weights sum to 1, or to
        less where the model has sinks.

        Args:
          layers: indices of layers, from 0; None: all. Each takes N T^2 floats, and while they are
            computed as many again for each unit.

        Raises:
          UserError: no such layer, or maps that would take more than 4 GiB.
        """
        ids, last = self.encode(text), self.model.num_layers - 1
        layers = range(last + 1) if layers is None else layers
        wanted = tuple(layers) if isinstance(layers, Sequence) else ()
        valid = bool(wanted) and all(type(i) is int and 0 <= i <= last for i in wanted)
        require(valid, "layers", layers, f"numbers from 0 to {last}")
        shards = sharding.ambient_shards("sequence")
        require(shards == 1, "mesh.sequence", shards, "1 to have maps of whole rows")
        # The scan over units stacks the maps of a layer in all of them.
        prefix = len(self.model.prefix_layers)
        in_units = {self.model.layers[i].key for i in wanted if i >= prefix}
        maps = len(wanted) + self.model.num_units * len(in_units)
        size = 4 * maps * self.model.attention.num_heads * length_bucket(len(ids)) ** 2
        if size > _LARGEST_MAPS:
            raise UserError(
                f"text of {len(ids):,} tokens: must be shorter, or seen by fewer layers: their "
                f"maps would take {binary(size)}"
            )
        probs_LNTS = np.asarray(self._kept(ids, "attention", wanted))
        return TextAttention(self._pieces(ids), wanted, probs_LNTS[..., : len(ids), : len(ids)])

    def kv_bytes(self, text: str) -> int:
        """Returns the bytes of keys and values that decoding keeps after the tokens of `encode`.

        In the model's compute dtype: `window` tokens of a local layer, all of a global one, nothing
        of a layer that borrows.
        """
        width = jnp.dtype(self.model.compute_dtype).itemsize
        return kv_cache_bytes(self.model, len(self.encode(text)), bytes_per_value=width)

    def score(self, texts: Iterable[str]) -> TextScore:
        """Returns bits per byte and experts per token over texts, each read by itself.

        `experiments.evaluate` measures whole held-out documents, packed as in training; this is for
        comparing routers, or runs, on a few texts at hand.

        Raises:
          UserError: no text has more than one token, or `texts` is one text.
        """
        require(not isinstance(texts, str), "texts", texts, "a list of texts")
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

    @property
    def _routed(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, spec in enumerate(self.model.layers) if spec.routed)

    def _pieces(self, ids: list[int]) -> tuple[str, ...]:
        decoder = self.tokenizer.stream_decoder()
        pieces = [decoder.push(token) for token in ids]
        pieces[-1] += decoder.flush()
        return tuple(pieces)

    def _forward(self, ids: list[int]) -> _Forward:
        return _forward(*self._arguments(ids))

    def _kept(self, ids: list[int], part: str, layers: tuple[int, ...]) -> jax.Array:
        return _kept(*self._arguments(ids), part, layers)

    def _arguments(self, ids: list[int]) -> tuple[Any, ...]:
        tokens_T = np.zeros(length_bucket(len(ids)), np.int32)
        tokens_T[: len(ids)] = ids
        tokens_BT = np.tile(tokens_T, (sharding.ambient_shards("batch"), 1))
        return self.model, self.params, self.router, tokens_BT, jnp.int32(len(ids))


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
    output = lm.LightningLM(config).apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=_segments(tokens_BT, length),
        router=router,
        keep_choices=True,
    )
    index_RTC = None
    if output.stats is not None and output.stats.choices is not None:
        index_URBTC = output.stats.choices.expert_index_MC
        index_RTC = index_URBTC[:, :, 0].reshape(-1, *index_URBTC.shape[3:])
    return _Forward(output.logits()[0], index_RTC)


@functools.partial(compiler.jit, static_argnames=("config", "part", "layers"))
def _kept(
    config: ModelConfig,
    params: Any,
    router: lm.Router,
    tokens_BT: jax.Array,
    length: jax.Array,
    part: str,
    layers: tuple[int, ...],
) -> jax.Array:
    """The array that `part` of each of these layers hands out of a row, as in `_forward`."""
    found: Any = lm.LightningLM(config).apply(
        {"params": params},
        tokens_BT,
        segment_ids_BT=_segments(tokens_BT, length),
        router=router,
        mutable=[lm.KEPT],
    )
    kept = lm.kept_by_layer(config, found[1][lm.KEPT])
    return jnp.stack([next(iter(kept[layer][part].values()))[0] for layer in layers])


def _segments(tokens_BT: jax.Array, length: jax.Array) -> jax.Array:
    valid_T = jnp.arange(tokens_BT.shape[1]) < length
    return jnp.broadcast_to(valid_T.astype(jnp.int32), tokens_BT.shape)
