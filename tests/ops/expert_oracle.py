"""Routed experts in float64, one expert at a time, and what the tests feed them."""

from __future__ import annotations

import numpy as np

D, F = 12, 10
M = 37
COTANGENT = np.random.default_rng(4).standard_normal((M, D))


def weights(experts, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((experts, D, F), (experts, D, F), (experts, F, D))
    return tuple((rng.standard_normal(s) * 0.3).astype(dtype) for s in shapes)


def tokens(count, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).standard_normal((count, D)).astype(dtype)


def assignment(kind, count, experts, choices, seed=2):
    """expert_index_MC of a named shape; `experts` marks empty slots."""
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((count, experts)), -1)[:, :choices]
    if kind == "ragged":
        index = np.where(np.arange(choices) < rng.integers(0, choices + 1, (count, 1)), index, -1)
    elif kind == "one_expert":
        index = np.where(np.arange(choices) == 0, experts - 1, -1) + 0 * index
    elif kind == "half_the_experts":
        index = index // 2 * 2
        index = np.where((index[:, :, None] == index[:, None, :]).argmax(-1) == np.arange(choices),
                         index, -1)  # fmt: skip
        index = -np.sort(-index, -1)
    elif kind == "padding":
        index = np.full_like(index, -1)
    return np.where(index < 0, experts, index).astype(np.int32)


def gates(index, experts, dtype=np.float64, seed=3):
    rng = np.random.default_rng(seed)
    return np.where(index < experts, rng.random(index.shape), 0.0).astype(dtype)


def oracle(x, index, gate, gate_w, up_w, down_w):
    """Output and gradients in float64, one expert at a time."""
    dy = COTANGENT[: len(x)]
    y, dx, dgate = np.zeros_like(x), np.zeros_like(x), np.zeros_like(gate)
    dws = [np.zeros_like(w) for w in (gate_w, up_w, down_w)]
    for e in range(len(gate_w)):
        m, c = np.nonzero(index == e)
        g, h, u = gate[m, c][:, None], x[m] @ gate_w[e], x[m] @ up_w[e]
        sigmoid = 1 / (1 + np.exp(-h))
        act = h * sigmoid * u
        dact = g * dy[m] @ down_w[e].T
        dh, du = dact * u * sigmoid * (1 + h * (1 - sigmoid)), dact * h * sigmoid
        np.add.at(y, m, g * act @ down_w[e])
        np.add.at(dx, m, dh @ gate_w[e].T + du @ up_w[e].T)
        dgate[m, c] = np.sum(act @ down_w[e] * dy[m], -1)
        for dw, value in zip(dws, (x[m].T @ dh, x[m].T @ du, act.T @ (g * dy[m])), strict=True):
            dw[e] = value
    return y, dx, dgate, *dws


def expert_biases(experts, lead=()):
    rng = np.random.default_rng(5)
    shapes = ((*lead, experts, F), (*lead, experts, F), (*lead, experts, D))
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
