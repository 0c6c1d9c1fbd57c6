"""Batched generation with a cache: chunked prefill, then one token a step. Knows ids, no text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import ModelConfig
from lightning_jax.config.fields import require
from lightning_jax.infer.sampling import Sampling, sample
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.runtime import compiler

FINISHED = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """All that a forward pass reads."""

    params: Any
    router: lm.Router
    rope_base_global: jax.Array


def _forward(
    config: ModelConfig,
    weights: Weights,
    cache: lm.Cache,
    tokens_BT: jax.Array,
    valid_BT: jax.Array,
    start_B: jax.Array,
) -> lm.Output:
    return lm.LightningLM(config).apply(
        {"params": weights.params},
        tokens_BT,
        segment_ids_BT=valid_BT.astype(jnp.int32),
        router=weights.router,
        rope_base_global=weights.rope_base_global,
        cache=cache,
        start_B=start_B,
    )


def _experts_used(stats: RoutingStats | None) -> jax.Array:
    """[experts assigned, tokens], both summed over routed layers; zeros without any."""
    if stats is None:
        return jnp.zeros(2)
    return jnp.stack([stats.assigned_count_E.sum(), stats.tokens.sum()])


# The three functions below are jitted once for the whole process: a second engine of the same
# config (a sample at every evaluation of a training run) compiles nothing.


@functools.partial(jax.jit, static_argnames=("config", "batch", "length"))
def _empty_cache(config: ModelConfig, batch: int, length: int) -> lm.Cache:
    return lm.init_cache(config, batch, length)


@functools.partial(
    compiler.jit, static_argnames=("config",), donate_argnames=("cache", "logits_BV")
)
def _prefill_chunk(
    config: ModelConfig,
    weights: Weights,
    cache: lm.Cache,
    logits_BV: jax.Array,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    start: jax.Array,
) -> tuple[lm.Cache, jax.Array, jax.Array]:
    """Appends positions `start..start+T` of the prompts.

    Returns (cache, `logits_BV` with the rows replaced whose prompt ends here, experts used).
    """
    batch, time = tokens_BT.shape
    valid_BT = start + jnp.arange(time)[None, :] < length_B[:, None]
    start_B = jnp.full(batch, start, jnp.int32)
    output = _forward(config, weights, cache, tokens_BT, valid_BT, start_B)
    offset_B = length_B - 1 - start
    last_B11 = jnp.clip(offset_B, 0, time - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
    ends_here_B = (offset_B >= 0) & (offset_B < time)
    last_BV = output._replace(hidden_BTD=last_B1D).logits()[:, 0]
    logits_BV = jnp.where(ends_here_B[:, None], last_BV, logits_BV)
    return output.cache, logits_BV, _experts_used(output.stats)


@functools.partial(jax.jit, static_argnames=("sampling", "valid_vocab"))
def _choose(
    logits_BV: jax.Array,
    active_B: jax.Array,
    eos_id: jax.Array,
    key: jax.Array,
    step: jax.Array,
    *,
    sampling: Sampling,
    valid_vocab: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns (next tokens, `FINISHED` in rows that are not active; rows active afterwards)."""
    token_B = sample(
        logits_BV,
        jax.random.fold_in(key, step),
        **dataclasses.asdict(sampling),
        valid_vocab=valid_vocab,
    )
    made_B = jnp.where(active_B, token_B, FINISHED)
    active_B = active_B & (token_B != eos_id)
    # The host reads both, so every process of a mesh must hold them whole.
    return sharding.shard(made_B, None), sharding.shard(active_B, None)


@functools.partial(
    compiler.jit, static_argnames=("config", "sampling", "valid_vocab"), donate_argnames=("cache",)
)
def _decode(
    config: ModelConfig,
    weights: Weights,
    cache: lm.Cache,
    token_B: jax.Array,
    active_B: jax.Array,
    length_B: jax.Array,
    eos_id: jax.Array,
    key: jax.Array,
    step: jax.Array,
    *,
    sampling: Sampling,
    valid_vocab: int,
) -> tuple[lm.Cache, jax.Array, jax.Array, jax.Array]:
    """Appends token `step` (of the new ones, from 1) of each row and chooses the next one."""
    output = _forward(
        config,
        weights,
        cache,
        jnp.maximum(token_B, 0)[:, None],
        active_B[:, None],
        length_B + step - 1,
    )
    token_B, active_B = _choose(
        output.logits()[:, 0],
        active_B,
        eos_id,
        key,
        step,
        sampling=sampling,
        valid_vocab=valid_vocab,
    )
    return output.cache, token_B, active_B, _experts_used(output.stats)


class Engine:
    """Generates token ids from token ids with one model.

    Prompts may have different lengths; rows do not see each other, and a row costs no expert once
    it is finished. Memory is that of `model.init_cache`: rings for local layers, nothing for
    borrowers.

    Under an ambient mesh the number of prompts must be a multiple of its batch shards.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        router: lm.Router,
        *,
        max_length: int,
        rope_base_global: float | None = None,
        valid_vocab: int | None = None,
        prefill_chunk: int = 128,
    ):
        """Args:
          config: with its vocabulary resolved (not 0). Its `attention.implementation` is that of
            training and is not read: with a cache, attention is chosen by shape.
          params, router: of that model.
          max_length: tokens of a prompt and its continuation for which the cache has room.
          rope_base_global: RoPE base of global layers; default: the config's.
          valid_vocab: ids from here up are never generated; default: the whole vocabulary.
          prefill_chunk: prompt tokens a row that one step of the prefill takes.

        Raises:
          UserError: a number out of its range.
        """
        valid_vocab = config.vocab_size if valid_vocab is None else valid_vocab
        base = config.attention.rope_base_global if rope_base_global is None else rope_base_global
        require(config.vocab_size >= 1, "model.vocab_size", config.vocab_size, "resolved, above 0")
        require(
            1 <= valid_vocab <= config.vocab_size,
            "valid_vocab",
            valid_vocab,
            f"between 1 and model.vocab_size = {config.vocab_size}",
        )
        require(max_length >= 2, "max_length", max_length, "at least 2")
        require(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1")
        require(base > 1, "rope_base_global", base, "above 1")
        attention = dataclasses.replace(config.attention, implementation="")
        self.config = dataclasses.replace(config, attention=attention)
        self.max_length, self.valid_vocab = max_length, valid_vocab
        self._weights = Weights(params, router, jnp.float32(base))
        self._chunk = min(prefill_chunk, max_length)
        self._experts_used = np.zeros(2)

    @property
    def experts_per_token(self) -> float | None:
        """Routed experts a token, mean over layers and over all tokens (prompt and new) of the last
        run, as far as it was consumed; None before the first or without routed layers.
        """
        used, seen = self._experts_used
        return float(used / seen) if seen else None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        key: jax.Array,
        eos_id: int | None = None,
    ) -> list[list[int]]:
        """Returns the new tokens of each row; see `stream`."""
        rows: list[list[int]] = [[] for _ in prompts]
        for token_B in self.stream(
            prompts, sampling, max_new_tokens=max_new_tokens, key=key, eos_id=eos_id
        ):
            for row, token in zip(rows, token_B.tolist(), strict=True):
                if token != FINISHED:
                    row.append(token)
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        key: jax.Array,
        eos_id: int | None = None,
    ) -> Iterator[np.ndarray]:
        """Yields int32 tokens_B as they are made, until all rows are finished.

        A row is finished after `max_new_tokens` tokens or after its `eos_id`, which is yielded as
        its last token; from then on it yields -1. The same key gives the same tokens.

        Raises:
          UserError: no prompt, an empty one, an id outside of the vocabulary, or a prompt that
            leaves no room for `max_new_tokens` in `max_length`. Raised by the call itself.
        """
        self._check(prompts, max_new_tokens)
        return self._run(prompts, sampling, max_new_tokens, key, eos_id)

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        require(len(prompts) >= 1, "prompts", prompts, "at least one prompt")
        require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "at least 1")
        vocab = self.config.vocab_size
        for row, prompt in enumerate(prompts):
            require(len(prompt) >= 1, f"prompts[{row}]", list(prompt), "at least one token")
            require(
                len(prompt) + max_new_tokens <= self.max_length,
                "max_new_tokens",
                max_new_tokens,
                f"at most max_length - prompt = {self.max_length} - {len(prompt)} tokens",
            )
            for token in (min(prompt), max(prompt)):
                require(0 <= token < vocab, f"prompts[{row}]", token, f"ids in [0, {vocab})")

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        key: jax.Array,
        eos_id: int | None,
    ) -> Iterator[np.ndarray]:
        self._experts_used = np.zeros(2)
        length_B = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
        eos = jnp.int32(FINISHED if eos_id is None else eos_id)
        static = {"sampling": sampling, "valid_vocab": self.valid_vocab}
        cache, logits_BV = self._prefill(prompts, length_B)
        active_B = jnp.ones(len(prompts), bool)
        token_B, active_B = _choose(logits_BV, active_B, eos, key, jnp.int32(0), **static)
        for step in range(1, max_new_tokens):
            # Dispatched before the last tokens are fetched: the device never waits for the reader.
            made, made_active = token_B, active_B
            cache, token_B, active_B, used = _decode(
                self.config,
                self._weights,
                cache,
                token_B,
                active_B,
                length_B,
                eos,
                key,
                jnp.int32(step),
                **static,
            )
            yield np.asarray(made)
            if not np.asarray(made_active).any():
                return
            self._experts_used += np.asarray(used, np.float64)
        yield np.asarray(token_B)

    def _prefill(
        self, prompts: Sequence[Sequence[int]], length_B: jax.Array
    ) -> tuple[lm.Cache, jax.Array]:
        batch, chunk = len(prompts), self._chunk
        padded = -(-max(map(len, prompts)) // chunk) * chunk
        tokens_BT = np.zeros((batch, padded), np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        cache = _empty_cache(self.config, batch, self.max_length)
        logits_BV = jnp.zeros((batch, self.config.vocab_size), jnp.float32)
        counts = []
        for start in range(0, padded, chunk):
            piece_BT = tokens_BT[:, start : start + chunk]
            cache, logits_BV, used = _prefill_chunk(
                self.config, self._weights, cache, logits_BV, piece_BT, length_B, jnp.int32(start)
            )
            counts.append(used)
        self._experts_used += np.sum([np.asarray(used, np.float64) for used in counts], axis=0)
        return cache, logits_BV
