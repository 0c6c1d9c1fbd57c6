"""From logits to the next token: greedy, temperature, top-k, nucleus."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lightning_jax.config.fields import require

MIN_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; hashable, so it can be a static argument of a jitted function.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 restrict nothing.

    Raises:
      UserError: a field out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        # A lower temperature than that is greedy within float32, or divides by zero.
        require(
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature < float("inf"),
            "temperature",
            self.temperature,
            f"0 (greedy) or at least {MIN_TEMPERATURE}",
        )
        require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")


def sample(
    logits_BV: jax.Array,
    key: jax.Array,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    valid_vocab: int,
) -> jax.Array:
    """Draws one token a row.

    The logits are divided by the temperature, cut to the `top_k` largest, then to the nucleus: the
    fewest tokens, most probable first, whose renormalised mass reaches `top_p`, with the one that
    crosses it (arXiv 1904.09751). Among equal logits lower ids come first. Row b's draw depends on
    `key`, b and that row's logits alone.

    Args:
      logits_BV: logits of any float dtype; computed with in float32.
      key: a PRNG key; not read when greedy.
      temperature, top_k, top_p: see `Sampling`; Python numbers.
      valid_vocab: ids from here up are rows that only pad the embedding, and are never drawn.

    Returns:
      int32 tokens_B.
    """
    logits_BV = logits_BV[:, :valid_vocab].astype(jnp.float32)
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_BV.shape[0]))
    draw = jax.vmap(jax.random.categorical)
    if not top_k and top_p == 1:
        return draw(keys_B, logits_BV).astype(jnp.int32)
    vocab = logits_BV.shape[1]
    logits_BC, token_BC = jax.lax.top_k(logits_BV, min(top_k or vocab, vocab))
    logits_BC = jnp.where(_in_nucleus(logits_BC, top_p), logits_BC, -jnp.inf)
    choice_B = draw(keys_B, logits_BC)
    return jnp.take_along_axis(token_BC, choice_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def _in_nucleus(logits_BC: jax.Array, top_p: float) -> jax.Array:
    """True for tokens, given in falling order, with less than `top_p` of the mass before them."""
    if top_p == 1:
        return jnp.ones(logits_BC.shape, bool)
    probs_BC = jax.nn.softmax(logits_BC, axis=-1)
    # A parallel prefix sum may dip by a rounding error, which would leave a hole in the nucleus.
    before_BC = jax.lax.cummax(jnp.cumsum(probs_BC, axis=-1), axis=1)[:, :-1]
    return jnp.pad(before_BC, ((0, 0), (1, 0))) < top_p
