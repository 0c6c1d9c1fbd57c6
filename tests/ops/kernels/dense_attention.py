"""The oracle of the attention kernels' tests, dense attention in float64, and the comparison."""

import jax
import jax.numpy as jnp
import numpy as np


def dense_attention(query, key, value, dout, *, visible_BTS, scale, sinks=None, softcap=None):
    """Output and gradients of query, key, value (and sinks) from all pairs at once.

    Query, key, value and dout are [B, time, heads, H]; `visible_BTS` is bool with B or one rows.
    """
    query, key, value, dout = (np.asarray(x, np.float64) for x in (query, key, value, dout))
    B, T, N, H = query.shape
    G = N // key.shape[2]
    key, value = np.repeat(key, G, 2), np.repeat(value, G, 2)
    logits = scale * np.einsum("btnh,bsnh->bnts", query, key)
    slope = np.ones_like(logits)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        slope = 1 - (logits / softcap) ** 2
    logits = np.where(visible_BTS[:, None], logits, -np.inf)
    column = np.full((B, N, T, 1), -np.inf)
    if sinks is not None:
        column[:] = np.asarray(sinks, np.float64)[None, :, None, None]
    logits = np.concatenate([logits, column], -1)
    weights = np.exp(logits - np.maximum(logits.max(-1, keepdims=True), -1e300))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    weights, sink_weights = weights[..., :-1], weights[..., -1]
    out = np.einsum("bnts,bsnh->btnh", weights, value)
    delta = np.einsum("btnh,btnh->bnt", dout, out)
    dlogits = weights * (np.einsum("btnh,bsnh->bnts", dout, value) - delta[..., None])
    dproducts = scale * slope * dlogits

    def per_key_head(x):
        return x.reshape(*x.shape[:2], N // G, G, H).sum(3)

    gradients = [
        np.einsum("bnts,bsnh->btnh", dproducts, key),
        per_key_head(np.einsum("bnts,btnh->bsnh", dproducts, query)),
        per_key_head(np.einsum("bnts,btnh->bsnh", weights, dout)),
    ]
    if sinks is not None:
        gradients.append(-(sink_weights * delta).sum((0, 2)))
    return out, gradients


def window_mask(length, window, segments=None, query_offset=0):
    """bool [B, T, S] of a causal window over rows of S = `length` keys, their last T as queries.

    `segments` [B, S] are the documents of packed rows; T = length - query_offset.
    """
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = ((distance >= 0) & (distance < (window or length)))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None])
        visible = visible & (segments != 0)[:, None]
    return visible[:, query_offset:]


def random_inputs(length, N, K, H, dtype=jnp.float32, B=1):
    """Query, key, value, and a gradient of the output, all of `length` positions."""
    rng = np.random.default_rng(length + N)
    shapes = [(B, length, heads, H) for heads in (N, K, K, N)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def last_queries(inputs, query_offset):
    """The inputs with their last queries only, and all keys."""
    query, key, value, dout = inputs
    return query[:, query_offset:], key, value, dout[:, query_offset:]


def packed_rows(length):
    """Row 0: documents that start inside blocks, then padding. Row 1: nothing but padding."""
    row = np.repeat([1, 2, 3, 0], [5, length // 2, length - length // 2 - 9, 4])
    return np.stack([row, np.zeros(length, np.int64)]).astype(np.int32)


def run(attend, query, key, value, dout, *, segments=None, sinks=None, **options):
    """Output and gradients of query, key, value (and sinks) of a kernel.

    The queries are the last of the keys; `options` go to `attend` as they are.
    """
    offset = key.shape[1] - query.shape[1]

    @jax.jit
    def both(query, key, value, sinks, segments, dout):
        def attended(query, key, value, sinks):
            return attend(
                query,
                key,
                value,
                query_segments_BT=None if segments is None else segments[:, offset:],
                key_segments_BS=segments,
                sinks_N=sinks,
                query_offset=offset,
                **options,
            )

        out, pull = jax.vjp(attended, query, key, value, sinks)
        return out, pull(dout)

    out, gradients = both(query, key, value, sinks, segments, dout)
    return out, [gradient for gradient in gradients if gradient is not None]


def exact(inputs, *, window, scale, segments=None, sinks=None, logit_softcap=None):
    """Output and gradients of `dense_attention` for the arguments of `check`."""
    visible_BTS = _visible(inputs, window, segments)
    options = dict(scale=scale, sinks=sinks, softcap=logit_softcap)
    return dense_attention(*inputs, visible_BTS=visible_BTS, **options)


def check(attend, inputs, tolerance, *, window, segments=None, **options):
    """Compares a kernel with the oracle; returns its output and gradients."""
    found = run(attend, *inputs, window=window, segments=segments, **options)
    assert found[0].dtype == inputs[0].dtype
    wanted = exact(inputs, window=window, segments=segments, **options)
    assert_matches(found, wanted, _visible(inputs, window, segments), tolerance)
    return found


def _visible(inputs, window, segments):
    length = inputs[1].shape[1]
    return window_mask(length, window, segments, length - inputs[0].shape[1])


def assert_matches(found, exact, visible_BTS, tolerance):
    """Compares (output, gradients) with those of `dense_attention`.

    The gradients of keys and values that no query sees must be exactly 0.
    """
    (out, gradients), (expected, expected_gradients) = found, exact
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, tolerance, tolerance)
    assert len(gradients) == len(expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        gradient = np.asarray(gradient, np.float64)
        np.testing.assert_allclose(gradient, wanted, tolerance, 4 * tolerance)
    unseen_BS = np.broadcast_to(~visible_BTS.any(axis=1), gradients[1].shape[:2])
    for gradient in gradients[1:3]:
        assert (np.asarray(gradient)[unseen_BS] == 0).all()
