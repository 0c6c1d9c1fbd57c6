"""Folders of runs as `train.loop` leaves them, without any training."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation.sweep import Sweep, build_sweep
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import to_dict
from tests.tiny import tiny_config

VOCAB = 64
# Bits per byte on code by arm and seed: `shared` is undecided, `hybrid` better.
SCORES = {
    "full": (2.00, 2.10, 1.95),
    "shared": (2.01, 2.12, 1.95),
    "hybrid": (1.90, 2.01, 1.84),
}
DOMAINS = {"code": (900, 3000), "docs": (100, 500)}  # tokens and bytes held out


def small_sweep(**changes: Any) -> Sweep:
    """Three arms of two dense layers, three seeds."""
    values = dict(
        question="Is sharing <free>?",
        base=tiny_config(model__moe__num_experts=0, model__num_units=1),
        baseline="full",
        arms={
            "full": {"model.unit": "GG"},
            "shared": {"model.unit": "Gg"},
            "hybrid": {"model.unit": "LG"},
        },
        seeds=(0, 1, 2),
    )
    return build_sweep({**values, **changes})


def domain(bits_per_byte: float, tokens: int, size: int, experts: float | None) -> dict[str, Any]:
    """One row of evaluation.json."""
    loss = bits_per_byte * size * math.log(2) / tokens
    row = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte}
    row |= {"tokens": tokens, "bytes": size, "loss_by_position": {"0-15": loss}}
    return row if experts is None else {**row, "experts_per_token": experts}


def write_rows(folder: Path, steps: int, *, final_loss: float = 2.0) -> None:
    """metrics.jsonl: a row per step of 100 tokens, one second each but the first (compilation)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "step": step,
            "stage": "stable",
            "tokens": 100 * step,
            "loss": final_loss + 3 * math.exp(-5 * step / steps),
            "tokens_per_second": 10.0 if step == 1 else 100.0,
            "seconds": 9.0 + step,
        }
        for step in range(1, steps + 1)
    ]
    rows.insert(1, {"step": 1, "eval": {"code": domain(3.0, 10, 40, None)}})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")


def write_sweep(
    root: Path,
    sweep: Sweep | None = None,
    scores: Mapping[str, Sequence[float | None]] = SCORES,
    **about: Any,
) -> Sweep:
    """Writes a sweep's folder: bits per byte on code by arm and seed; docs have 0.5 more.

    Runs that `scores` does not reach are left out; `about` is for `write_run`.
    """
    sweep = sweep or small_sweep()
    for run in sweep.runs():
        values = scores.get(run.arm, ())
        code = values[run.seed] if run.seed < len(values) else None
        if code is not None:
            write_run(sweep.config(run), run.folder(root), code=code, docs=code + 0.5, **about)
    fields = {**dataclasses.asdict(sweep), "seeds": list(sweep.seeds)}
    (root / "sweep.json").write_text(json.dumps(fields), encoding="utf-8")
    return sweep


def decoded(speed: float, prefill: float = 0.25) -> dict[str, Any]:
    """What decode.json says of an arm."""
    about = {"context": 1024, "rounds": 5, "device": "cpu"}
    return {"tokens_per_second": speed, "prefill_seconds": prefill, **about}


def searched(factor: float, edge: str | None = None) -> dict[str, Any]:
    """What search.json says of an arm."""
    about = {"trials": [], "seconds": 60.0, "train_flops": 1e9}
    return {"factor": factor, "edge": edge, **about}


def pooled(code: float) -> float:
    """Bits per byte over all text of a run of `write_sweep`."""
    sizes = [size for _, size in DOMAINS.values()]
    return (code * sizes[0] + (code + 0.5) * sizes[1]) / sum(sizes)


def write_run(
    config: RunConfig,
    folder: Path,
    *,
    code: float = 2.0,
    docs: float = 2.5,
    experts: float | None = None,
    steps: int = 20,
) -> dict[str, Any]:
    """A finished run with the given bits per byte by domain."""
    write_rows(folder, steps, final_loss=code)
    model = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or VOCAB)
    recorded = to_dict(dataclasses.replace(config, model=model))
    session = {
        "first_step": 1,
        "command": ["/somewhere/experiments/sweep.py", "--sweep=a b.py"],
        "versions": {"jax": "0.10"},
        "git_commit": "abc",
    }
    about = {"sessions": [session]}
    scores = {"code": code, "docs": docs}
    result = {name: domain(scores[name], *DOMAINS[name], experts) for name in DOMAINS}
    for name, value in (("config", recorded), ("run", about), ("evaluation", result)):
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return result
