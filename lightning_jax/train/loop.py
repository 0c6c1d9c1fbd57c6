"""The one loop: stages, steps, metrics, evaluation, checkpoints.

The order within a step is a contract: data, step, metrics of the *previous* step fetched after
dispatch (so the host never makes the device wait), evaluate, save.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from lightning_jax import accounting, sharding
from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer, write_json
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.data import mixture
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer
from lightning_jax.runtime import compiler
from lightning_jax.train import evaluation, placement, schedule, step
from lightning_jax.train import workdir as folder
from lightning_jax.train.metrics import MetricsWriter, flatten
from lightning_jax.train.optimizer import make_optimizer
from lightning_jax.train.progress import Progress
from lightning_jax.train.signals import StopRequest

logger = logging.getLogger(__name__)

# Given (config, params, router, tokenizer, rope_base_global), returns a text that the model wrote.
Sampler = Callable[[RunConfig, Any, lm.Router, Tokenizer, float], str]

VOCAB_MULTIPLE = 16
PROFILE_STEPS = (5, 8)


class Stopped(SystemExit):
    """The run was asked to stop by a signal; its state is saved. Exit status 128 + signal."""


@dataclasses.dataclass
class Trainer:
    """The parts of a run that do not change from step to step."""

    config: RunConfig
    workdir: Path
    mesh: Mesh
    tokenizer: Tokenizer
    evaluator: evaluation.Evaluator
    optimizer: optax.GradientTransformation
    steps: placement.TrainSteps
    checkpointer: Checkpointer
    writer: MetricsWriter
    progress: Progress
    stop: StopRequest
    sampler: Sampler | None
    profile: bool


def run(
    config: RunConfig,
    workdir: str | Path,
    *,
    sampler: Sampler | None = None,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains all stages, or resumes where the folder's last checkpoint is, and evaluates.

    Args:
      config: the run; `model.vocab_size = 0` is resolved from the tokenizer.
      workdir: folder of the run: checkpoints, `metrics.jsonl`, `tensorboard/`, `config.json`,
        `run.json`, `evaluation.json`.
      sampler: writes a text sample at each evaluation.
      profile: record a trace of steps 5 to 8 of this session in `workdir/profile`.

    Returns:
      The last evaluation by domain.

    Raises:
      UserError: bad input of any kind, a loss that is not finite under `on_nan = "stop"`.
      Stopped: SIGTERM or SIGINT; the state has been saved.
    """
    path = folder.prepare(workdir)
    tokenizer = resolve_tokenizer(config.data, path)
    config = dataclasses.replace(config, model=_with_vocab(config.model, tokenizer))
    mesh = sharding.make_mesh(config.mesh)
    for stage in config.stages:
        micro = stage.batch_size // stage.accumulate
        field = f"stages.{stage.name}.batch_size / accumulate"
        sharding.check_divisible(config.model, micro, field, mesh)
    ends = np.cumsum([stage.steps for stage in config.stages]).tolist()
    keep = config.keep_checkpoints
    with Checkpointer(path, keep=keep, keep_steps=ends) as checkpointer, jax.set_mesh(mesh):
        latest = checkpointer.latest_step()
        start = latest or 0
        resume_in, _ = schedule.stage_at(config.stages, min(start, config.total_steps - 1))
        folder.check_resumable(path, config, stage_index=resume_in, only_weights=latest == 0)
        folder.record(path, config, {"data": mixture.data_fingerprint(config.data)})
        seq_len = max(stage.seq_len for stage in config.stages)
        accounting.print_table(accounting.summary_rows(config.model, seq_len), "This model")
        writer = MetricsWriter(path, resume_step=start)
        progress = Progress(config, start)
        try:
            with StopRequest() as stop, progress:
                optimizer = make_optimizer(config.optimizer, lm.logical_axes(config.model))
                trainer = Trainer(
                    config=config,
                    workdir=path,
                    mesh=mesh,
                    tokenizer=tokenizer,
                    evaluator=evaluation.Evaluator(config, config.data, tokenizer, mesh),
                    optimizer=optimizer,
                    steps=placement.TrainSteps(config, optimizer, mesh),
                    checkpointer=checkpointer,
                    writer=writer,
                    progress=progress,
                    stop=stop,
                    sampler=sampler,
                    profile=profile,
                )
                return _train(trainer, start)
        finally:
            writer.close()


def _with_vocab(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    needed = tokenizer.vocab_size
    size = model.vocab_size or -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    if size < needed:
        raise UserError(
            f"model.vocab_size = {size}: the tokenizer has {needed} ids (0: take those)"
        )
    return dataclasses.replace(model, vocab_size=size)


def _train(trainer: Trainer, start: int) -> dict[str, Any]:
    config, steps = trainer.config, trainer.steps
    stage_index, offset = schedule.stage_at(config.stages, min(start, config.total_steps - 1))
    state = None
    if start == 0:
        state = _first_state(trainer)
    elif start >= config.total_steps:
        stage_index, offset = len(config.stages) - 1, config.stages[-1].steps
    for index in range(stage_index, len(config.stages)):
        iterator = _stage_iterator(trainer, index)
        if state is None:
            # An iterator of the stage that ended at this checkpoint is not one of the next stage.
            inside = iterator if 0 < offset < config.stages[index].steps else None
            items = trainer.checkpointer.restore(
                start, placement.state_items(steps.abstract_state), inside
            )
            state = placement.state_from_items(items)
        state = _run_stage(trainer, index, offset, state, iterator)
        iterator.close()
        offset = 0
    trainer.checkpointer.wait()
    results = _evaluate(trainer, state, len(config.stages) - 1, max_tokens=0)
    write_json(trainer.workdir / "evaluation.json", results)
    return results


def _first_state(trainer: Trainer) -> step.TrainState:
    """The state before the first step; weights that came from elsewhere are checkpoint 0."""
    config, steps = trainer.config, trainer.steps
    init = jax.jit(
        lambda: step.init_state(config, trainer.optimizer),
        out_shardings=steps.shardings,
        compiler_options=compiler.options(),
    )
    state = init()
    if trainer.checkpointer.latest_step() is None:
        return state
    abstract = placement.state_items(steps.abstract_state)
    given = trainer.checkpointer.restore(0, {name: abstract[name] for name in folder.START_ITEMS})
    ema = jax.tree.map(jnp.copy, given["params"]) if state.ema else state.ema
    return dataclasses.replace(state, **given, ema=ema)


def _stage_iterator(trainer: Trainer, index: int) -> Any:
    config = trainer.config
    return mixture.make_train_iterator(
        config.data,
        config.stages[index],
        tokenizer=trainer.tokenizer,
        seed=config.seed,
        stage_index=index,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def rope_base(config: RunConfig, index: int) -> float:
    """RoPE base of global layers in a stage."""
    return config.stages[index].rope_base_global or config.model.attention.rope_base_global


def _run_stage(
    trainer: Trainer,
    index: int,
    offset: int,
    state: step.TrainState,
    iterator: Any,
) -> step.TrainState:
    """Runs the steps of one stage from its step `offset` on."""
    config, stage = trainer.config, trainer.config.stages[index]
    first = sum(s.steps for s in config.stages[:index])
    train_step = trainer.steps.get(stage.accumulate, rope_base(config, index))
    trainer.progress.begin_stage(stage.name)
    pending: tuple[int, dict[str, Any]] | None = None
    for number in range(first + offset + 1, first + stage.steps + 1):
        batch = evaluation.put_batch(next(iterator), trainer.mesh)
        _profile(trainer, number - first - offset)
        state, metrics = train_step(state, batch)
        if pending is not None:
            _report(trainer, index, *pending, state=state, iterator=iterator)
        pending = (number, metrics)
        last, stopping = number == first + stage.steps, trainer.stop.signal is not None
        saving = last or stopping or number % config.checkpoint_every == 0
        evaluating = config.eval_every and number % config.eval_every == 0 and not last
        if saving or evaluating:
            # A state goes to disk, or is judged, only after its own loss is known to be finite.
            _report(trainer, index, *pending, state=state, iterator=iterator)
            pending = None
        if evaluating:
            results = _evaluate(trainer, state, index, max_tokens=config.eval_tokens)
            trainer.writer.write({"step": number, "eval": results})
        if saving:
            _save(trainer, index, number, state, iterator)
        if stopping:
            _stop(trainer, number)
    return state


def _profile(trainer: Trainer, session_step: int) -> None:
    if trainer.profile and session_step == PROFILE_STEPS[0]:
        jax.profiler.start_trace(str(trainer.workdir / "profile"))
    if trainer.profile and session_step == PROFILE_STEPS[1]:
        jax.profiler.stop_trace()
        logger.warning("trace of 3 steps: tensorboard --logdir=%s", trainer.workdir / "profile")


def _report(
    trainer: Trainer,
    index: int,
    number: int,
    metrics: dict[str, Any],
    *,
    state: step.TrainState,
    iterator: Any,
) -> None:
    """Fetches one step's metrics: progress bar, finite check, and log lines when due."""
    config, stage = trainer.config, trainer.config.stages[index]
    first = jax.device_get({name: metrics[name] for name in ("loss", "bad_steps")})
    if first["bad_steps"] and config.optimizer.on_nan == "stop":
        _save(trainer, index, number, state, iterator, halted=True)
        trainer.checkpointer.wait()
        raise UserError(
            f"loss is not finite at step {number} (stage {stage.name!r}, "
            f"seed {config.seed}): the state before it is checkpoint {number}; lower "
            'learning_rate, or set optimizer.on_nan="skip" to leave such steps out'
        )
    trainer.progress.advance(number, float(first["loss"]), stage.step_tokens)
    last = number == sum(s.steps for s in config.stages[: index + 1])
    if number % config.log_every and not last:
        return
    row = flatten(jax.device_get(metrics))
    tokens = schedule.tokens_at(config.stages, number)
    row = {"step": number, "stage": stage.name, "tokens": tokens, **row}
    row.update(trainer.progress.rate())
    trainer.writer.write(row)
    if config.histogram_every and number % config.histogram_every == 0:
        for key in ("histogram", "mean_experts"):
            if key in row:
                trainer.writer.histogram(f"router/{key}", row[key], number)
        trainer.writer.histogram(
            "params/absmax", [float(abs(p).max()) for p in jax.tree.leaves(state.params)], number
        )


def _evaluate(
    trainer: Trainer, state: step.TrainState, index: int, *, max_tokens: int
) -> dict[str, Any]:
    """Held-out loss of every source, with the averaged weights where there are any; a sample."""
    config, stage = trainer.config, trainer.config.stages[index]
    params = state.ema or state.params
    results = trainer.evaluator(
        params,
        state.router,
        seq_len=stage.seq_len,
        batch_size=stage.batch_size // stage.accumulate,
        rope_base_global=rope_base(config, index),
        max_tokens=max_tokens,
    )
    trainer.progress.note(evaluation.one_line(results))
    if trainer.sampler is not None and config.sample_tokens:
        text = trainer.sampler(
            config, params, state.router, trainer.tokenizer, rope_base(config, index)
        )
        trainer.writer.text("sample", text, int(state.step))
    return results


def _save(
    trainer: Trainer,
    index: int,
    number: int,
    state: step.TrainState,
    iterator: Any,
    *,
    halted: bool = False,
) -> None:
    if halted:
        state = dataclasses.replace(
            state, step=state.step * 0 + number, bad_steps=state.bad_steps * 0
        )
    config = trainer.config
    meta = {
        "step": number,
        "stage": config.stages[index].name,
        "tokens": schedule.tokens_at(config.stages, number),
        "rope_base_global": rope_base(config, index),
        "seq_len": config.stages[index].seq_len,
        "config": to_dict(config),
    }
    trainer.checkpointer.save(number, placement.state_items(state), iterator, meta)


def _stop(trainer: Trainer, number: int) -> None:
    trainer.checkpointer.wait()
    name = trainer.stop.signal.name
    logger.warning("%s: saved step %d; the same command resumes", name, number)
    raise Stopped(128 + int(trainer.stop.signal))
