"""The requests that are being answered, as rows of arrays.

Nothing about a request is static, so another temperature, key or stop id compiles nothing, and
nothing about a row depends on its neighbours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import sharding
from lightning_jax.infer.buckets import power_of_two
from lightning_jax.infer.sampling import Sampling, sample

# No token: the output of a finished row, of one whose logits are not finite, and a stop id that no
# token matches.
FINISHED = -1
NOT_FINITE = -2
_NO_STOP = -3


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """B requests between two decode steps.

    Attributes:
      token_B: int32, the last token of each row, which the next step reads.
      position_B: int32, its position in the row.
      active_B: bool, False once a row has ended, or where a row only fills the batch.
      left_B: int32, tokens that may still be generated.
      key_B: a PRNG key per row; the token at position p is drawn with `fold_in(key, p)`.
      temperature_B, top_k_B, top_p_B: float32, int32 and float32, see `sampling.Sampling`.
      stop_BJ: int32 ids that end a row.
      routing_top_p_B: float32, the router's top-p for each row's tokens.
    """

    token_B: jax.Array
    position_B: jax.Array
    active_B: jax.Array
    left_B: jax.Array
    key_B: jax.Array
    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    stop_BJ: jax.Array
    routing_top_p_B: jax.Array

    @classmethod
    def start(
        cls,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        *,
        max_new_tokens: int,
        key: jax.Array,
        stop_ids: Sequence[int],
        routing_top_p: float | jax.Array,
        rows: int,
    ) -> DecodeState:
        """Returns the state before the prompts are read; row b has the key `fold_in(key, b)`.

        Args:
          prompts: token ids.
          sampling: of each prompt.
          max_new_tokens: most new tokens per row.
          key: a PRNG key.
          stop_ids: tokens that end a row; the same for all rows.
          routing_top_p: the router's top-p; the same for all rows.
          rows: B; the rows after the prompts are never active.
        """
        fill = rows - len(prompts)

        def row_array(values: Sequence[float], dtype: str) -> jax.Array:
            return jnp.asarray(np.pad(np.asarray(values, dtype), (0, fill)))

        stops_J = np.full(power_of_two(max(len(stop_ids), 1)), _NO_STOP, np.int32)
        stops_J[: len(stop_ids)] = stop_ids
        return cls(
            token_B=row_array([prompt[-1] for prompt in prompts], "int32"),
            position_B=row_array([len(prompt) - 1 for prompt in prompts], "int32"),
            active_B=jnp.arange(rows) < len(prompts),
            left_B=jnp.full(rows, max_new_tokens, jnp.int32),
            key_B=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)),
            temperature_B=row_array([s.temperature for s in sampling], "float32"),
            top_k_B=row_array([s.top_k for s in sampling], "int32"),
            top_p_B=row_array([s.top_p for s in sampling], "float32"),
            stop_BJ=jnp.asarray(np.tile(stops_J, (rows, 1))),
            routing_top_p_B=jnp.full(rows, routing_top_p, jnp.float32),
        )

    def advance(
        self, logits_BV: jax.Array, valid_vocab: int
    ) -> tuple[DecodeState, jax.Array, jax.Array]:
        """Chooses each row's next token from the logits after its last one.

        Returns:
          The state with the new tokens; int32 made_B, `FINISHED` in rows that had ended and
          `NOT_FINITE` where a logit is NaN or infinite; whether any row goes on. The last two are
          whole on every process of a mesh.
        """
        position_B = self.position_B + 1

        def choose(logits_BV, key_B, temperature_B, top_k_B, top_p_B):
            return sample(
                logits_BV,
                key_B,
                temperature_B=temperature_B,
                top_k_B=top_k_B,
                top_p_B=top_p_B,
                valid_vocab=valid_vocab,
            )

        # Each row whole on the devices that have it, for a partitioner would gather all to sort.
        token_B = sharding.island(choose, inputs=[("batch",)] * 5, outputs=("batch",))(
            logits_BV,
            jax.vmap(jax.random.fold_in)(self.key_B, position_B),
            self.temperature_B,
            self.top_k_B,
            self.top_p_B,
        )
        is_finite_B = jnp.isfinite(logits_BV[:, :valid_vocab]).all(axis=-1)
        made_B = jnp.where(is_finite_B, token_B, NOT_FINITE)
        made_B = jnp.where(self.active_B, made_B, FINISHED)
        left_B = self.left_B - self.active_B
        stopped_B = (token_B[:, None] == self.stop_BJ).any(axis=1)
        state = dataclasses.replace(
            self,
            token_B=jnp.where(self.active_B, token_B, self.token_B),
            position_B=jnp.where(self.active_B, position_B, self.position_B),
            active_B=self.active_B & ~stopped_B & (left_B > 0),
            left_B=left_B,
        )
        return state, sharding.shard(made_B, None), state.active_B.any()
