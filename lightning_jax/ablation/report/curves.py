"""Learning curves of a sweep's arms, averaged over windows of training tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_jax.ablation.results import Run
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.workdir import METRICS

_POINTS = 40

# By arm: tokens `[points]`, and by seed the loss `[points]` in nats per token.
Curves = dict[str, tuple[np.ndarray, dict[int, np.ndarray]]]


def curves(runs: Sequence[Run], workdir: Path) -> Curves:
    """Returns the training loss by arm, averaged over windows that divide the tokens evenly.

    A curve ends where the shortest of its seeds does.
    """
    logs: dict[str, dict[int, np.ndarray]] = {}
    for run in runs:
        rows = read_rows(run.folder(workdir) / METRICS)
        pairs = [(row["tokens"], row["loss"]) for row in rows if row.get("loss") is not None]
        if pairs:
            logs.setdefault(run.arm, {})[run.seed] = np.array(pairs, float)
    return {arm: _averaged(by_seed) for arm, by_seed in logs.items()}


def _averaged(by_seed: dict[int, np.ndarray]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    end = min(pairs[-1, 0] for pairs in by_seed.values())
    rows = min(int((pairs[:, 0] <= end).sum()) for pairs in by_seed.values())
    points = min(_POINTS, max(1, rows // 2))
    edges = np.linspace(0, end, points + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    return centres, {s: _window_means(pairs, edges, centres) for s, pairs in by_seed.items()}


def _window_means(pairs: np.ndarray, edges: np.ndarray, centres: np.ndarray) -> np.ndarray:
    tokens, loss = pairs[pairs[:, 0] <= edges[-1]].T
    window = np.clip(np.searchsorted(edges, tokens, side="left") - 1, 0, len(centres) - 1)
    count = np.bincount(window, minlength=len(centres))
    total = np.bincount(window, weights=loss, minlength=len(centres))
    filled = count > 0
    return np.interp(centres, centres[filled], total[filled] / count[filled])


def paired(curve: Curves, arm: str, baseline: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns tokens `[points]` and the arm's loss minus the baseline's, `[seeds, points]`.

    Over the seeds and the tokens that both have; None where there are none.
    """
    if arm not in curve or baseline not in curve:
        return None
    (tokens, mine), (base_tokens, base) = curve[arm], curve[baseline]
    seeds = [seed for seed in mine if seed in base]
    reach = tokens <= base_tokens[-1]
    if not seeds or not reach.any():
        return None
    tokens = tokens[reach]
    found = [mine[s][reach] - np.interp(tokens, base_tokens, base[s]) for s in seeds]
    return tokens, np.stack(found)
