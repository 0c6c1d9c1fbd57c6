"""Token cross-entropy whose logits exist for a few tokens at a time.

Letters: M tokens, D model width, V vocabulary. With a large vocabulary the [M, V] logits are the
largest array of a training step; here neither pass ever holds more than `chunk` rows of them. Where
the vocabulary is split over devices, each holds its own columns of those rows alone (the parallel
cross-entropy of Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax.ops import collectives
from lightning_jax.ops.kernels.common import precision
from lightning_jax.ops.kernels.cpu import narrow


def token_losses(
    hidden_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    *,
    chunk: int,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array]:
    """Computes `-log p(target)` and the log-sum-exp of the logits of every token.

    The matmul runs in the dtype of `hidden_MD` and accumulates in float32; softmax and logarithms
    are float32. Use it to evaluate: its gradient would keep all logits; `cross_entropy`'s does not.

    Args:
      hidden_MD: hidden states after the final norm.
      head_DV: output projection; with `vocab_axes` this device's columns of it.
      targets_M: int32 ids; one outside 0..V-1 gives the loss of a zero logit, so that padding needs
        a weight of 0 and no valid id.
      chunk: most tokens whose logits exist at one time, at least 1. No effect on the results.
      vocab_axes: mesh axes whose devices have the same tokens and share the columns, in order; ids
        count the columns of all.

    Returns:
      `(nll_M, logsumexp_M)`, float32; the same on the devices that share the columns.

    Raises:
      ValueError: `chunk` is below 1.
    """
    dtype = hidden_MD.dtype
    head = narrow.operand(head_DV, dtype)

    def one_chunk(_, tokens):
        hidden, targets = tokens
        columns = _columns(head, vocab_axes)
        logits = _product("MD,DV->MV", narrow.operand(hidden, dtype), head)
        return _, _losses(logits, columns, targets, vocab_axes)

    return _scan_chunks(one_chunk, None, (hidden_MD, targets_M), chunk)[1]


def target_ranks(
    hidden_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    *,
    chunk: int,
    vocab_axes: tuple[str, ...] = (),
) -> jax.Array:
    """Counts the ids whose logit is no smaller than the target's, of every token.

    1 is the target that greedy decoding gives; one of several equal logits is no such target. See
    `token_losses` for the arguments, dtypes and errors.

    Returns:
      `rank_M`, int32 from 1 to V; the same on the devices that share the columns.
    """
    dtype = hidden_MD.dtype
    head = narrow.operand(head_DV, dtype)

    def one_chunk(_, tokens):
        hidden, targets = tokens
        logits = _product("MD,DV->MV", narrow.operand(hidden, dtype), head)
        is_target = _is_target(_columns(head, vocab_axes), targets)
        # Only one device has the target; the others add 0 to its logit.
        own_M = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
        target_M: Any = collectives.total(own_M, vocab_axes)
        rank_M = jnp.sum(logits >= target_M[:, None], axis=-1, dtype=jnp.int32)
        return _, collectives.total(rank_M, vocab_axes)

    found: Any = _scan_chunks(one_chunk, None, (hidden_MD, targets_M), chunk)
    return found[1]


def cross_entropy(
    hidden_MD: jax.Array,
    head_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    *,
    z_weight: float | jax.Array,
    chunk: int,
    vocab_axes: tuple[str, ...] = (),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes sums over tokens, which add up over micro-batches and devices.

    The z-loss `z_weight * logsumexp ** 2` keeps the softmax normaliser near 1 (PaLM, arXiv
    2204.02311, section 5). Differentiable once, in reverse mode, in `hidden_MD` and `head_DV`. The
    gradient is computed with the loss, from the same logits, so that no logit is computed twice (as
    in Hsu et al., "Liger Kernel", arXiv 2410.10989). The gradient of the head is summed over chunks
    in float32.

    Args:
      weights_M: weight of each token, 0 for padding.
      z_weight: factor of the z-loss; may be traced.

    See `token_losses` for the other arguments and the dtypes. With `vocab_axes` the gradient of
    `hidden_MD` is that of this device's columns, to be summed over those that share them (as
    `jax.shard_map` does), and the cotangents are to be equal parts as in `collectives.total`.

    Returns:
      `(loss_sum, nll_sum, z_sum)`, float32 scalars. `loss_sum` is the sum of the other two and the
      only one with a gradient.

    Raises:
      ValueError: `chunk` is below 1.
    """
    sums: Any = _sums(hidden_MD, head_DV, targets_M, weights_M, z_weight, chunk, vocab_axes)
    return sums[0], *jax.lax.stop_gradient(sums[1:])


def _product(equation, left, right):
    return jnp.einsum(
        equation, left, right, precision=precision(left.dtype), preferred_element_type=jnp.float32
    )


def _columns(head_DV: jax.Array, vocab_axes: tuple[str, ...]) -> jax.Array:
    """The ids whose logits this device computes."""
    columns = jnp.arange(head_DV.shape[1])
    if vocab_axes:
        columns += jax.lax.axis_index(vocab_axes) * head_DV.shape[1]
    return columns


def _is_target(columns: jax.Array, targets_M: jax.Array) -> jax.Array:
    # A comparison fuses with its reader; a gather's gradient would be a scatter into [M, V].
    return columns.astype(targets_M.dtype)[None, :] == targets_M[:, None]


def _losses(
    logits_MV: jax.Array, columns: jax.Array, targets_M: jax.Array, vocab_axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array]:
    logsumexp_M = jax.nn.logsumexp(logits_MV, axis=-1)
    target_M = jnp.sum(jnp.where(_is_target(columns, targets_M), logits_MV, 0), axis=-1)
    if vocab_axes:
        # One exchange for both; the target's logit is 0 on all devices but the one that has it.
        parts = jax.lax.all_gather(jnp.stack([logsumexp_M, target_M]), vocab_axes)
        logsumexp_M, target_M = jax.nn.logsumexp(parts[:, 0], axis=0), parts[:, 1].sum(axis=0)
    return logsumexp_M - target_M, logsumexp_M


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _sums(hidden_MD, head_DV, targets_M, weights_M, z_weight, chunk, vocab_axes):
    losses = token_losses(hidden_MD, head_DV, targets_M, chunk=chunk, vocab_axes=vocab_axes)
    return _weigh(*losses, weights_M, z_weight)


def _weigh(nll_M, logsumexp_M, weights_M, z_weight):
    weights_M = weights_M.astype(jnp.float32)
    nll_sum = jnp.sum(weights_M * nll_M)
    z_sum = z_weight * jnp.sum(weights_M * jnp.square(logsumexp_M))
    return nll_sum + z_sum, nll_sum, z_sum


def _sums_and_gradients(hidden_MD, head_DV, targets_M, weights_M, z_weight, chunk, vocab_axes):
    """Returns the sums, and the gradients of the first one."""
    dtype = hidden_MD.dtype
    head = narrow.operand(head_DV, dtype)

    def one_chunk(dhead, tokens):
        hidden, targets, weights = tokens
        hidden = narrow.operand(hidden, dtype)
        columns = _columns(head, vocab_axes)
        logits = _product("MD,DV->MV", hidden, head)
        nll, logsumexp = _losses(logits, columns, targets, vocab_axes)
        dlogsumexp = weights * (1 + 2 * z_weight * logsumexp)
        dlogits = jnp.exp(logits - logsumexp[:, None]) * dlogsumexp[:, None]
        dlogits -= jnp.where(_is_target(columns, targets), weights[:, None], 0)
        dlogits = narrow.operand(dlogits, dtype)
        dhidden = _product("MV,DV->MD", dlogits, head)
        dhead += narrow.dot(narrow.transposed(hidden), dlogits)
        return dhead, (nll, logsumexp, dhidden.astype(dtype))

    tokens = (hidden_MD, targets_M, weights_M.astype(jnp.float32))
    dhead, (nll_M, logsumexp_M, dhidden) = _scan_chunks(
        one_chunk, jnp.zeros(head_DV.shape, jnp.float32), tokens, chunk
    )
    return _weigh(nll_M, logsumexp_M, weights_M, z_weight), (dhidden, dhead.astype(head_DV.dtype))


def _scale_gradients(chunk, vocab_axes, gradients, cotangents):
    cotangent = cotangents[0] * collectives.size(vocab_axes)  # as `collectives.total`
    dhidden, dhead = (
        (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype) for gradient in gradients
    )
    return dhidden, dhead, None, None, None


_sums.defvjp(_sums_and_gradients, _scale_gradients)


def _scan_chunks(body, carry, tokens, chunk):
    """Runs `body(carry, tokens)` over chunks of the leading axis M of every array in `tokens`."""
    if chunk < 1:
        raise ValueError(f"chunk = {chunk}: must be at least 1")
    length = jax.tree.leaves(tokens)[0].shape[0]
    if length <= chunk:
        return body(carry, tokens)
    count = math.ceil(length / chunk)
    size = math.ceil(length / count)

    def split(x):
        x = jnp.pad(x, [(0, size * count - length)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, size, *x.shape[1:])

    def join(x):
        return x.reshape(count * size, *x.shape[2:])[:length]

    carry, results = jax.lax.scan(body, carry, jax.tree.map(split, tokens))
    return carry, jax.tree.map(join, results)
