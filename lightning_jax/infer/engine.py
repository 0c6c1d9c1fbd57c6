"""Batched generation with a cache: chunked prefill, then one token per step. Ids only, no text."""

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
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.infer.buckets import length_bucket, power_of_two
from lightning_jax.infer.decode_state import FINISHED, NOT_FINITE, DecodeState
from lightning_jax.infer.sampling import Sampling
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.runtime import compiler

__all__ = ["FINISHED", "Engine"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """Everything that a forward pass reads; parameters are cast for inference."""

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
    routing_top_p_B: jax.Array,
) -> lm.Output:
    top_p_BT = jnp.broadcast_to(routing_top_p_B[:, None], tokens_BT.shape)
    return lm.LightningLM(config).apply(
        {"params": weights.params},
        tokens_BT,
        segment_ids_BT=valid_BT.astype(jnp.int32),
        router=dataclasses.replace(weights.router, top_p=top_p_BT),
        rope_base_global=weights.rope_base_global,
        cache=cache,
        start_B=start_B,
    )


def _experts_used(stats: RoutingStats | None) -> jax.Array:
    """[experts assigned, tokens], both summed over routed layers; zeros without any."""
    if stats is None:
        return jnp.zeros(2)
    return jnp.stack([stats.assigned_count_E.sum(), stats.tokens.sum()])


# The functions below are jitted once for the whole process: a second engine of the same config (a
# sample at every evaluation of a training run) compiles nothing.


def compiled_for(config: ModelConfig) -> ModelConfig:
    """Returns the config that these functions are compiled for.

    Models that differ only in what decoding does not read share it, and stages with other RoPE
    bases, because the base is an argument.
    """
    attention = dataclasses.replace(config.attention, implementation="", rope_base_global=2.0)
    return dataclasses.replace(config, attention=attention)


_cast = compiler.jit(lm.inference_params, static_argnames=("config",))
_advance = compiler.jit(DecodeState.advance, static_argnames=("valid_vocab",))


@functools.cache
def _make_cache(config: ModelConfig, batch: int, length: int, mesh: Any) -> Any:
    """A jitted function without arguments that returns an empty cache."""
    placement = None if mesh is None else lm.cache_shardings(config, batch, length, mesh)
    return jax.jit(lambda: lm.init_cache(config, batch, length), out_shardings=placement)


@functools.partial(
    compiler.jit, static_argnames=("config",), donate_argnames=("cache", "logits_BV")
)
def prefill_step(
    config: ModelConfig,
    weights: Weights,
    cache: lm.Cache,
    logits_BV: jax.Array,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    start: jax.Array,
    routing_top_p_B: jax.Array,
) -> tuple[lm.Cache, jax.Array, jax.Array]:
    """Appends positions `start..start+T` of the prompts.

    Returns (cache, `logits_BV` with the rows replaced whose prompt ends here, experts used).
    """
    batch, time = tokens_BT.shape
    valid_BT = start + jnp.arange(time)[None, :] < length_B[:, None]
    start_B = jnp.full(batch, start, jnp.int32)
    output = _forward(config, weights, cache, tokens_BT, valid_BT, start_B, routing_top_p_B)
    offset_B = length_B - 1 - start
    last_B11 = jnp.clip(offset_B, 0, time - 1)[:, None, None]
    last_B1D = jnp.take_along_axis(output.hidden_BTD, last_B11, axis=1)
    ends_here_B = (offset_B >= 0) & (offset_B < time)
    last_BV = output._replace(hidden_BTD=last_B1D).logits()[:, 0]
    logits_BV = jnp.where(ends_here_B[:, None], last_BV, logits_BV)
    assert output.cache is not None  # it was given
    return output.cache, logits_BV, _experts_used(output.stats)


@functools.partial(
    compiler.jit, static_argnames=("config", "valid_vocab"), donate_argnames=("cache",)
)
def decode_step(
    config: ModelConfig, weights: Weights, cache: lm.Cache, state: DecodeState, *, valid_vocab: int
) -> tuple[lm.Cache, DecodeState, jax.Array, jax.Array, jax.Array]:
    """Reads the last token of each active row and chooses the next one.

    Returns (cache, *DecodeState.advance, experts used).
    """
    output = _forward(
        config,
        weights,
        cache,
        state.token_B[:, None],
        state.active_B[:, None],
        state.position_B,
        state.routing_top_p_B,
    )
    logits_BV = output.logits()[:, 0]
    state, token_B, logprob_B = state.advance(logits_BV, valid_vocab)
    assert output.cache is not None  # it was given
    return output.cache, state, token_B, logprob_B, _experts_used(output.stats)


class Engine:
    """Generates token ids from token ids with one model.

    Prompts may have different lengths; rows do not see each other, and a finished row uses no
    expert. Memory is that of `model.init_cache`: rings for local layers, nothing for borrowers.
    Rows and lengths are rounded up to few sizes, so that new shapes seldom compile; the cost of a
    step follows the filled part of the cache, not its capacity.

    Make and use it under `jax.set_mesh` to serve on several devices. Rows and caches are then split
    over them, also by heads. Parameters stay where they are: as `checkpoint.load_run` puts them on
    a mesh, no step gathers any; as they lie in training, each step gathers them.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        router: lm.Router,
        *,
        max_length: int,
        valid_vocab: int | None = None,
        prefill_chunk: int = 128,
    ):
        """Args:
          config: with its vocabulary resolved (not 0). Its `attention.implementation` is for
            training and is not read: with a cache, attention is chosen by shape.
          params, router: of that model.
          max_length: tokens of a prompt and its continuation for which the cache has room.
          valid_vocab: only ids below it are generated; default: the whole vocabulary.
          prefill_chunk: prompt tokens per row that one step of the prefill takes.

        Raises:
          UserError: a number out of its range, or a size that the ambient mesh does not divide.
        """
        valid_vocab = config.vocab_size if valid_vocab is None else valid_vocab
        require(config.vocab_size >= 1, "model.vocab_size", config.vocab_size, "resolved, above 0")
        require(
            1 <= valid_vocab <= config.vocab_size,
            "valid_vocab",
            valid_vocab,
            f"between 1 and model.vocab_size = {config.vocab_size}",
        )
        require(max_length >= 2, "max_length", max_length, "at least 2")
        require(prefill_chunk >= 1, "prefill_chunk", prefill_chunk, "at least 1")
        if sharding.is_split():
            mesh = jax.sharding.get_abstract_mesh()
            sharding.check_divisible(config, mesh, batch={}, seq_len={})
        self.config = config
        self._compiled_for = compiled_for(config)
        base = jnp.float32(config.attention.rope_base_global)
        self.max_length, self.valid_vocab = max_length, valid_vocab
        self._weights = Weights(_cast(self._compiled_for, params), router, base)
        self._chunk = min(prefill_chunk, length_bucket(max_length))
        self._experts_used = np.zeros(2)

    @property
    def experts_per_token(self) -> float | None:
        """Routed experts per token, mean over layers and over all tokens (prompt and new) of the
        last run, as far as it was consumed; None before the first or without routed layers.
        """
        used, seen = self._experts_used
        return float(used / seen) if seen else None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        max_new_tokens: int,
        key: jax.Array,
        stop_ids: Sequence[int] = (),
    ) -> list[list[int]]:
        """Returns the new tokens of each row; see `stream`."""
        rows: list[list[int]] = [[] for _ in prompts]
        for token_B in self.stream(
            prompts, sampling, max_new_tokens=max_new_tokens, key=key, stop_ids=stop_ids
        ):
            for row, token in zip(rows, token_B.tolist(), strict=True):
                if token != FINISHED:
                    row.append(token)
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        max_new_tokens: int,
        key: jax.Array,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[np.ndarray]:
        """Yields int32 tokens_B as they are made, until all rows are finished.

        A row is finished after `max_new_tokens` tokens or after one of `stop_ids`, which is yielded
        as its last token; from then on it yields -1. The same key gives the same tokens, and a
        row's tokens do not depend on the other rows. `sampling` is that of all rows, or one per
        row.

        Raises:
          UserError: no prompt, an empty one, an id outside of the vocabulary, a prompt that leaves
            no room for `max_new_tokens` in `max_length`, or another number of `sampling` than of
            prompts: raised by the call itself. Logits that are not finite: raised by the iterator.
        """
        self._check(prompts, max_new_tokens)
        sampling = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        require(len(sampling) == len(prompts), "sampling", sampling, "one, or one per prompt")
        state = DecodeState.start(
            prompts,
            sampling,
            max_new_tokens=max_new_tokens,
            key=key,
            stop_ids=stop_ids,
            routing_top_p=self._weights.router.top_p,
            rows=self._rows(len(prompts)),
        )
        return self._run(prompts, state, max_new_tokens)

    def _rows(self, prompts: int) -> int:
        """Rows of the batch that `prompts` are rounded up to."""
        shards = sharding.ambient_shards("batch")
        return -(-power_of_two(prompts) // shards) * shards

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
        self, prompts: Sequence[Sequence[int]], state: DecodeState, max_new_tokens: int
    ) -> Iterator[np.ndarray]:
        self._experts_used = np.zeros(2)
        cache, logits_BV = self._prefill(prompts, state)
        state, made_B, goes_on = _advance(state, logits_BV, valid_vocab=self.valid_vocab)
        for _ in range(1, max_new_tokens):
            # Dispatched before the last tokens are fetched: the device never waits for the reader.
            cache, state, next_B, next_goes_on, used = decode_step(
                self._compiled_for, self._weights, cache, state, valid_vocab=self.valid_vocab
            )
            yield self._tokens(made_B, len(prompts))
            if not goes_on:
                return
            self._experts_used += np.asarray(used, np.float64)
            made_B, goes_on = next_B, next_goes_on
        yield self._tokens(made_B, len(prompts))

    def _tokens(self, made_B: jax.Array, prompts: int) -> np.ndarray:
        token_B = np.asarray(made_B)[:prompts]
        if (token_B == NOT_FINITE).any():
            lm.require_finite(self._weights, "generation")
            row = int(np.argmax(token_B == NOT_FINITE))
            raise UserError(
                f"generation: the logits of prompt {row} are not finite, though all weights are: "
                f"values beyond {self.config.compute_dtype}"
            )
        return token_B

    def _prefill(
        self, prompts: Sequence[Sequence[int]], state: DecodeState
    ) -> tuple[lm.Cache, jax.Array]:
        batch, chunk = len(state.token_B), self._chunk
        padded = -(-max(map(len, prompts)) // chunk) * chunk
        tokens_BT = np.zeros((batch, padded), np.int32)
        length_B = np.zeros(batch, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
            length_B[row] = len(prompt)
        mesh = jax.sharding.get_mesh() if sharding.is_split() else None
        cache = _make_cache(self._compiled_for, batch, length_bucket(self.max_length), mesh)()
        logits_BV = jnp.zeros((batch, self.config.vocab_size), jnp.float32)
        counts = []
        for start in range(0, padded, chunk):
            cache, logits_BV, used = prefill_step(
                self._compiled_for,
                self._weights,
                cache,
                logits_BV,
                tokens_BT[:, start : start + chunk],
                length_B,
                jnp.int32(start),
                state.routing_top_p_B,
            )
            counts.append(used)
        self._experts_used += np.sum([np.asarray(used, np.float64) for used in counts], axis=0)
        return cache, logits_BV
