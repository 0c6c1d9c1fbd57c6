"""Suite `train`: one optimizer step, ours and that of `transformers` on the same shape.

The shape is that of `--config` (configs/mixtral_28m.py): a Mixtral, so that the peer is the whole
model of transformers with AdamW (fused), its experts eager and by grouped matmul; bfloat16 is
autocast there and `model.compute_dtype` here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Call, Options, interleave, peer, temp_mb
from benchmarks.peers import mixtral_train_call
from benchmarks.profile import profiles
from lightning_jax import accounting, sharding
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.data.batch import Batch
from lightning_jax.train import placement
from lightning_jax.train.plan import Plan, Segment
from lightning_jax.train.resolve import resolve

DTYPES = ("float32", "bfloat16")


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: one per dtype.

    Raises:
      UserError: no config.
    """
    if options.config is None:
        raise UserError(
            "--config is missing: the train suite times the step of a run's first stage"
        )
    config = resolve(options.config).config
    return [_row(dtype, options, config) for dtype in DTYPES if options.wants(f"step_{dtype}")]


def _row(dtype: str, options: Options, config: RunConfig) -> dict[str, Any]:
    model = dataclasses.replace(config.model, compute_dtype=dtype)
    config = dataclasses.replace(config, model=model)
    segment = Plan.of(config).segments[0]
    program, ours = our_step(config)
    peers, note = {}, "torch or transformers is not installed (extra peers): rows are skipped"
    if peer("torch") and peer("transformers"):
        note = ""
        shape = (segment.batch_size, segment.seq_len)
        peers = {
            f"transformers_{kind}": mixtral_train_call(model, shape, dtype, kind)
            for kind in ("eager", "grouped_mm")
        }
    found = interleave({"ours": ours, **peers}, rounds=options.rounds, probe=np.dtype("float32"))
    tokens = segment.step_tokens
    flops = tokens * accounting.flops_per_token(model, seq_len=segment.seq_len)
    row = {
        "table": "train step",
        "name": f"step_{dtype}",
        "tokens": tokens,
        "ours_ms": found.median_ms("ours"),
        "ours_tokens_s": 1e3 * tokens / found.median_ms("ours"),
        **{f"{name}_tokens_s": 1e3 * tokens / found.median_ms(name) for name in peers},
        "ours_cpu_ms": found.cpu_ms("ours"),
        **{f"{name}_cpu_ms": found.cpu_ms(name) for name in peers},
        "gflops": found.gflops("ours", flops),
        "of_peak_float32": found.of_peak("ours", flops),
        "temp_mb": temp_mb(program),
        **profiles(options, {"ours": (program, ours)}),
    }
    if peers:
        row["best_peer"] = min(peers, key=found.median_ms)
        row["vs_best"] = found.ratio(row["best_peer"], "ours")
        row["vs_best_cpu"] = found.cpu_ratio(row["best_peer"], "ours")
    return row | ({"note": note} if note else {})


def our_step(config: RunConfig) -> tuple[Any, Call]:
    """The compiled step of a run's first stage on one device, and a call that takes it.

    As in the loop, every call takes the state that the previous call returned.
    """
    mesh = sharding.make_mesh(dataclasses.replace(config.mesh, data=1), jax.devices()[:1])
    plan = Plan.of(config)
    segment, knobs = plan.segments[0], plan.knobs(0)
    with jax.set_mesh(mesh):
        program = placement.TrainProgram(config, mesh)
        batch = placement.abstract_batch(segment, mesh)
        lowered = program.step.lower(program.abstract_state, batch, knobs, segment.accumulate)
        train_step = lowered.compile()
        state = program.init()
        batch = placement.put_batch(_batch(segment, config.model.vocab_size), mesh)

    def call() -> Any:
        nonlocal state
        state, metrics = train_step(state, batch, knobs)
        return metrics["loss"]

    return train_step, call


def _batch(segment: Segment, vocab_size: int) -> Batch:
    """Random tokens, one document per row."""
    shape = (segment.batch_size, segment.seq_len)
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(segment.seq_len, dtype=np.int32), shape)
    ones = np.ones(shape, np.int32)
    targets = np.roll(tokens, -1, axis=1)
    positions = np.ascontiguousarray(positions)
    return Batch(tokens, targets, ones, positions, ones.astype(np.float32))
