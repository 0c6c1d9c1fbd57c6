"""Token cross-entropy whose logits exist for a few tokens at a time.

Letters: M tokens, D model width, V vocabulary. With a large vocabulary the [M, V] logits are the
largest array of a training step; here neither pass ever holds more than `chunk` rows of them.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from lightning_jax.ops.kernels import narrow


def token_losses(
    hidden_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    *,
    chunk: int,
    valid_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes `-log p(target)` and the log-sum-exp of the logits of every token.

    The matmuls run in the dtype of `hidden_MD` and accumulate in float32; the gradient of the head
    is summed over chunks in float32. Softmax and logarithms are float32. Differentiable once, in
    reverse mode, in `hidden_MD` and `head_DV`.

    Args:
      hidden_MD: hidden states after the final norm.
      head_DV: output projection.
      targets_M: int32 ids; one outside 0..V-1 gives the loss of a zero logit, so that padding needs
        a weight of 0 and no valid id.
      chunk: most tokens whose logits exist at one time, at least 1. No effect on the results.
      valid_vocab: columns from this one on are padding of the table: no probability, no gradient.

    Returns:
      `(nll_M, logsumexp_M)`, float32.

    Raises:
      ValueError: `chunk` is below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    return _token_losses(hidden_MD, head_DV, targets_M, chunk, valid_vocab)


def cross_entropy(
    hidden_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    *,
    z_weight: float,
    chunk: int,
    valid_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes sums over tokens, which add up over micro-batches and devices.

    The mean loss is `(nll_sum + z_sum) / weight_sum`. The z-loss `z_weight * logsumexp ** 2` keeps
    the softmax normaliser near 1 (PaLM, arXiv 2204.02311, section 5).

    Args:
      weights_M: weight of each token, 0 for padding.
      z_weight: factor of the z-loss; it is in `z_sum` already.

    See `token_losses` for the other arguments.

    Returns:
      `(nll_sum, weight_sum, z_sum)`, float32 scalars.
    """
    nll_M, logsumexp_M = token_losses(
        hidden_MD, head_DV, targets_M, chunk=chunk, valid_vocab=valid_vocab
    )
    weights_M = weights_M.astype(jnp.float32)
    z_sum = z_weight * jnp.sum(weights_M * jnp.square(logsumexp_M))
    return jnp.sum(weights_M * nll_M), jnp.sum(weights_M), z_sum


def _logits(hidden_MD: jax.Array, head_DV: jax.Array, valid_vocab: int | None) -> jax.Array:
    logits_MV = jnp.einsum("MD,DV->MV", hidden_MD, head_DV, preferred_element_type=jnp.float32)
    if valid_vocab is None:
        return logits_MV
    return jnp.where(jnp.arange(logits_MV.shape[1])[None, :] < valid_vocab, logits_MV, -jnp.inf)


def _is_target(logits_MV: jax.Array, targets_M: jax.Array) -> jax.Array:
    # A comparison fuses with what reads it; a gather's gradient would be a scatter into [M, V].
    columns = jnp.arange(logits_MV.shape[1], dtype=targets_M.dtype)
    return columns[None, :] == targets_M[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_losses(hidden_MD, head_DV, targets_M, chunk, valid_vocab):
    return _forward(hidden_MD, head_DV, targets_M, chunk, valid_vocab)[0]


def _forward(hidden_MD, head_DV, targets_M, chunk, valid_vocab):
    dtype = hidden_MD.dtype
    head = narrow.operand(head_DV, dtype)

    def one_chunk(_, tokens):
        hidden, targets = tokens
        hidden = narrow.operand(hidden, dtype)
        logits = _logits(hidden, head, valid_vocab)
        logsumexp = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.sum(jnp.where(_is_target(logits, targets), logits, 0), axis=-1)
        return _, (logsumexp - target, logsumexp)

    _, losses = _scan_chunks(one_chunk, None, (hidden_MD, targets_M), chunk)
    return losses, (hidden_MD, head_DV, targets_M, losses[1])


def _backward(chunk, valid_vocab, saved, cotangents):
    hidden_MD, head_DV, targets_M, logsumexp_M = saved
    dtype = hidden_MD.dtype
    head = narrow.operand(head_DV, dtype)

    def one_chunk(dhead, tokens):
        hidden, targets, logsumexp, dnll, dlogsumexp = tokens
        hidden = narrow.operand(hidden, dtype)
        logits = _logits(hidden, head, valid_vocab)
        dlogits = jnp.exp(logits - logsumexp[:, None]) * (dnll + dlogsumexp)[:, None]
        dlogits -= jnp.where(_is_target(logits, targets), dnll[:, None], 0)
        dlogits = narrow.operand(dlogits, dtype)
        dhidden = jnp.einsum("MV,DV->MD", dlogits, head, preferred_element_type=jnp.float32)
        dhead += narrow.dot(narrow.transposed(hidden), dlogits)
        return dhead, dhidden.astype(dtype)

    tokens = (hidden_MD, targets_M, logsumexp_M, *cotangents)
    dhead, dhidden = _scan_chunks(one_chunk, jnp.zeros(head_DV.shape, jnp.float32), tokens, chunk)
    return dhidden, dhead.astype(head_DV.dtype), None


_token_losses.defvjp(_forward, _backward)


def _scan_chunks(body, carry, tokens, chunk):
    """Runs `body(carry, tokens)` over chunks of the leading axis M of every array in `tokens`.

    A chunk takes every n-th token, so that where M is split over devices each chunk is too.
    """
    length = jax.tree.leaves(tokens)[0].shape[0]
    if length <= chunk:
        return body(carry, tokens)
    count = math.ceil(length / chunk)
    size = math.ceil(length / count)

    def split(x):
        x = jnp.pad(x, [(0, size * count - length)] + [(0, 0)] * (x.ndim - 1))
        return jnp.swapaxes(x.reshape(size, count, *x.shape[1:]), 0, 1)

    def join(x):
        return jnp.swapaxes(x, 0, 1).reshape(size * count, *x.shape[2:])[:length]

    carry, results = jax.lax.scan(body, carry, jax.tree.map(split, tokens))
    return carry, jax.tree.map(join, results)
