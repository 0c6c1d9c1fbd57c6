"""Upcycling from a folder to the start of a run, with the loss of both models."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.fields import require
from lightning_jax.data.sources import Sources
from lightning_jax.interop.convert import describe, is_run, load_any
from lightning_jax.interop.upcycle import is_exact, upcycle
from lightning_jax.runtime.files import StrPath
from lightning_jax.runtime.folders import new_folder
from lightning_jax.train.evaluation import ONE_DEVICE, Evaluator, require_finite
from lightning_jax.train.plan import Plan
from lightning_jax.train.start import write_start

logger = logging.getLogger(__name__)


def upcycle_run(
    source: StrPath,
    workdir: StrPath,
    config: RunConfig,
    *,
    step: int | None = None,
    pool: str = "mean",
    max_tokens: int = 16_384,
) -> dict[str, Any]:
    """Makes the folder of a run that starts from a dense checkpoint.

    Args:
      source: folder of a run or of Hugging Face with a dense model.
      workdir: folder of the run to make.
      config: the run, with the model wanted; `vocab_size = 0` is the source's. Its tokenizer must
        be the source's.
      step: which checkpoint of a run; None is the newest.
      pool: see `upcycle`.
      max_tokens: held-out tokens of each domain on which both models are judged; 0: all.

    Returns:
      `exact` (the function is kept but for rounding) and by domain the loss before, after, and
      their difference, in nats per token.

    Raises:
      UserError: a source that does not fit, or a folder that cannot be read, has files or cannot
        be written. Nothing is left of it then.
    """
    require(max_tokens >= 0, "eval.max_tokens", max_tokens, "0 (all) or more")
    with new_folder(workdir, "workdir") as path:
        result = _upcycle(source, path, config, step=step, pool=pool, max_tokens=max_tokens)
    return {"workdir": str(workdir), **result}


def _upcycle(
    source: StrPath,
    path: Path,
    config: RunConfig,
    *,
    step: int | None,
    pool: str,
    max_tokens: int,
) -> dict[str, Any]:
    _, tokenizer = describe(source, step=step)
    dense, params, router = load_any(source, step=step)
    model = dataclasses.replace(
        config.model, vocab_size=config.model.vocab_size or dense.vocab_size
    )
    _warn_of_another_base(dense, model)
    data = dataclasses.replace(config.data, tokenizer=tokenizer or config.data.tokenizer)
    config = dataclasses.replace(config, model=model, data=data)
    made, made_router = upcycle(dense, params, model, jax.random.key(config.seed), pool=pool)
    origin = {"path": str(Path(source).absolute()), "pool": pool}
    # A vocabulary that a run trained on its own text would come out differently on other text.
    tokenizer_of = Path(source) if is_run(source) else None
    started = write_start(path, config, made, made_router, origin=origin, tokenizer_of=tokenizer_of)
    config, sources = started.config, Sources.open(started.config.data)
    segment = Plan.of(config).segments[0]

    def losses(model: ModelConfig, params: Any, router: lm.Router) -> dict[str, float]:
        run = dataclasses.replace(config, model=model)
        mesh = sharding.make_mesh(ONE_DEVICE, jax.devices()[:1])
        results = Evaluator(run, sources, started.tokenizer, mesh)(
            params,
            router,
            seq_len=segment.seq_len,
            batch_size=segment.micro_batch,
            rope_base_global=model.attention.rope_base_global,
            weights="params",
            max_tokens=max_tokens,
        )
        require_finite(results)
        return {name: row["loss"] for name, row in results.items()}

    before, after = losses(dense, params, router), losses(model, made, made_router)
    return {
        "exact": is_exact(dense, model),
        "loss": {
            name: {"before": before[name], "after": after[name], "jump": after[name] - before[name]}
            for name in before
        },
    }


def _warn_of_another_base(dense: ModelConfig, model: ModelConfig) -> None:
    theirs, ours = dense.attention.rope_base_global, model.attention.rope_base_global
    if ours != theirs:
        field = f"model.attention.rope_base_global = {ours:g}"
        logger.warning("%s: the source was trained with %g", field, theirs)
