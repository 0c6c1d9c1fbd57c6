"""Both ends of the network on a mesh: the embedding of tokens, and the loss of the head.

Each device has its own tokens (`batch`, `sequence`) and its own part of the vocabulary (`vocab`).
Tokens are flattened inside the islands only, so `chunk` counts the tokens of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.layers.common import TOKENS, summed_in_float32
from lightning_jax.ops import embed, loss
from lightning_jax.ops.collectives import total


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Returns the embeddings [B, T, D] of tokens; see `ops.embed.lookup`."""
    vocab_axes, dtype = sharding.axes("vocab"), table_VD.dtype

    def local(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return embed.lookup(table_VD.astype(dtype), tokens_BT, vocab_axes=vocab_axes)

    run = sharding.island(local, inputs=(("vocab", None), TOKENS), outputs=TOKENS)
    return run(summed_in_float32(table_VD), tokens_BT)


def cross_entropy(
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    z_weight: float | jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the sums (loss, cross-entropy, z-loss) over all tokens; see `ops.loss`."""
    token_axes, vocab_axes = sharding.axes(*TOKENS), sharding.axes("vocab")

    def local(hidden_BTD, head_DV, targets_BT, weights_BT, z_weight):
        sums = loss.cross_entropy(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head_DV,
            targets_BT.reshape(-1),
            weights_BT.reshape(-1),
            z_weight=z_weight,
            chunk=chunk,
            vocab_axes=vocab_axes,
        )
        return total(jnp.stack(sums), token_axes)

    names = TOKENS, (None, "vocab"), TOKENS, TOKENS, ()
    run = sharding.island(local, inputs=names, outputs=())
    # The head is rounded to the dtype of the hidden states where it is used.
    head_DV = summed_in_float32(head_DV)
    return tuple(run(hidden_BTD, head_DV, targets_BT, weights_BT, jnp.asarray(z_weight)))


def token_losses(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> jax.Array:
    """Returns the cross-entropy of each token, [B, T] in nats; see `ops.loss.token_losses`."""

    def losses(*args: Any, **kwargs: Any) -> jax.Array:
        return loss.token_losses(*args, **kwargs)[0]

    return _of_tokens(losses, hidden_BTD, head_DV, targets_BT, chunk)


def target_ranks(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, *, chunk: int
) -> jax.Array:
    """Returns the rank of each target among all ids, int32 [B, T]; see `ops.loss.target_ranks`."""
    return _of_tokens(loss.target_ranks, hidden_BTD, head_DV, targets_BT, chunk)


def _of_tokens(
    function: Callable[..., jax.Array],
    hidden_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
) -> jax.Array:
    """One number of each token, by a function of `ops.loss`."""
    vocab_axes = sharding.axes("vocab")

    def local(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array) -> jax.Array:
        found_M = function(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head_DV,
            targets_BT.reshape(-1),
            chunk=chunk,
            vocab_axes=vocab_axes,
        )
        return found_M.reshape(targets_BT.shape)

    names = TOKENS, (None, "vocab"), TOKENS
    return sharding.island(local, inputs=names, outputs=TOKENS)(hidden_BTD, head_DV, targets_BT)
