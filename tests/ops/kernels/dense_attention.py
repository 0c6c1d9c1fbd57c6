"""The oracle of the attention kernels: dense softmax attention and its gradients in float64."""

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


def window_mask(length, window, segments=None):
    """bool [B, T, S] of a causal window over aligned rows, with segments [B, T] if packed."""
    distance = np.arange(length)[:, None] - np.arange(length)[None]
    visible = ((distance >= 0) & (distance < (window or length)))[None]
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None])
        visible = visible & (segments != 0)[:, None]
    return visible
