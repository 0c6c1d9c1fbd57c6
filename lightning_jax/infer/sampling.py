"""From logits to the next token: greedy, temperature, top-k, nucleus; each row by its own rule."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from lightning_jax.config.fields import require

MIN_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one request chooses its next token.

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
        require(0 <= self.top_k < 2**31, "top_k", self.top_k, "0 (off) or more")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")


def sample(
    logits_BV: jax.Array,
    key_B: jax.Array,
    *,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    valid_vocab: int,
) -> jax.Array:
    """Draws one token per row.

    The logits are divided by the temperature, cut to the `top_k` largest, then to the nucleus: the
    fewest tokens, most probable first, whose renormalised mass reaches `top_p`, with the one that
    crosses it (arXiv 1904.09751). Among equal logits lower ids come first. A row's draw depends on
    its own key, logits and settings alone; a setting that no row uses costs nothing.

    Args:
      logits_BV: logits of any float dtype; the computation is in float32.
      key_B: a PRNG key per row; not read by greedy rows.
      temperature_B: float32; see `Sampling`.
      top_k_B: int32.
      top_p_B: float32.
      valid_vocab: ids from here on only pad the embedding, and are never drawn.

    Returns:
      int32 tokens_B.
    """
    logits_BV = logits_BV[:, :valid_vocab].astype(jnp.float32)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        by_B1 = jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
        scaled_BV = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / by_B1
        is_cut_B = (temperature_B > 0) & ((top_k_B > 0) | (top_p_B < 1))
        allowed_BV = jax.lax.cond(
            is_cut_B.any(),
            lambda: jnp.where(_allowed(scaled_BV, top_k_B, top_p_B), scaled_BV, -jnp.inf),
            lambda: scaled_BV,
        )
        return jax.vmap(jax.random.categorical)(key_B, allowed_BV).astype(jnp.int32)

    drawn_B = jax.lax.cond((temperature_B > 0).any(), draw, lambda: greedy_B)
    return jnp.where(temperature_B > 0, drawn_B, greedy_B)


def _allowed(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """True for the tokens that top-k and then the nucleus leave."""
    B, V = logits_BV.shape
    sorted_BV, token_BV = jax.lax.top_k(logits_BV, V)
    is_top_BV = jnp.arange(V)[None] < jnp.where(top_k_B > 0, top_k_B, V)[:, None]
    probs_BV = jax.nn.softmax(jnp.where(is_top_BV, sorted_BV, -jnp.inf), axis=-1)
    # A parallel prefix sum may dip by a rounding error, which would leave a hole in the nucleus.
    mass_BV = jax.lax.cummax(jnp.cumsum(probs_BV, axis=-1), axis=1)
    before_BV = jnp.pad(mass_BV[:, :-1], ((0, 0), (1, 0)))
    is_nucleus_BV = (before_BV < top_p_B[:, None]) | (top_p_B >= 1)[:, None]
    rows_B1 = jnp.arange(B)[:, None]
    return jnp.zeros((B, V), bool).at[rows_B1, token_BV].set(is_top_BV & is_nucleus_BV)
