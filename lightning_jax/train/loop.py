"""The one loop: segments, steps, metrics, evaluation, checkpoints.

The order within a step is a contract: data, step, metrics of the *previous* step fetched after
dispatch (so the host never makes the device wait), evaluate, save.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lightning_jax import sharding
from lightning_jax.checkpoint import all_steps, checkpoints_dir
from lightning_jax.config import RunConfig
from lightning_jax.data import epochs, mixture, streams
from lightning_jax.runtime import compiler, processes
from lightning_jax.runtime.files import write_json
from lightning_jax.runtime.phases import phase
from lightning_jax.train import placement
from lightning_jax.train import workdir as folder
from lightning_jax.train.evaluation import require_finite
from lightning_jax.train.interruption import Interrupted
from lightning_jax.train.plan import Segment
from lightning_jax.train.screens import closing, opening
from lightning_jax.train.session import Sampler, Session, open_session
from lightning_jax.train.start import Start, look
from lightning_jax.train.step import TrainState
from lightning_jax.train.writers import DEFAULT, require

logger = logging.getLogger(__name__)


def run(
    config: RunConfig,
    workdir: str | Path,
    *,
    sampler: Sampler | None = None,
    profile: bool = False,
    writers: Sequence[str] = DEFAULT,
    allow_changed_data: bool = False,
    keep_compiled: bool = False,
) -> dict[str, Any]:
    """Trains all stages, or resumes from the folder's last checkpoint, and evaluates.

    Everything is read and compared before anything is written, so a run that is refused leaves no
    trace (docs/runs.md).

    Args:
      config: the run; `model.vocab_size = 0` is resolved from the tokenizer.
      workdir: folder of the run: checkpoints, `metrics.jsonl`, `tensorboard/`, `config.json`,
        `run.json`, `evaluation.json`. One process at a time trains there.
      sampler: writes a text sample at each evaluation.
      profile: record a trace of steps 5 to 7 of this session in `workdir/profile`.
      writers: where the curves go besides `metrics.jsonl`: `tensorboard`, `wandb`, `trackio`.
      allow_changed_data: resume with text that is not the text that the run began with.
      keep_compiled: keep compiled programs in `workdir/compiled`, see `compiler.cache_in`.

    Returns:
      The last evaluation by domain.

    Raises:
      UserError: bad input of any kind, a loss that is not finite under `on_nan = "stop"` or in the
        last evaluation; the state has been saved.
      Stopped: a signal (see `signals`); the state has been saved.
    """
    config.require_trainable()
    # Outermost: at the end of `together` this process waits for the others.
    outlook = processes.if_lost(lambda: _outlook(workdir))
    with outlook, processes.together(), folder.claim(workdir) as claim:
        # None writes before all have read.
        with processes.together():
            require(writers)
            start = look(config, claim.path, allow_changed_data=allow_changed_data)
            with phase("starting the devices"):
                mesh = placement.make_mesh(start.plan)
        processes.require_same(start.digests())
        start.write(claim)
        if keep_compiled:
            compiler.cache_in(claim.path / "compiled")
        return _run(start, claim.path, mesh, sampler=sampler, profile=profile, writers=writers)


def _outlook(workdir: str | Path) -> str:
    steps = all_steps(checkpoints_dir(workdir))
    return f"the run goes on from checkpoint {steps[-1]}" if steps else "nothing was saved yet"


def _run(start: Start, path: Path, mesh: Mesh, **options: Any) -> dict[str, Any]:
    """Runs what is left of a run; `options` are those of `open_session`."""
    plan, config = start.plan, start.plan.config
    with open_session(start, path, mesh, **options) as session:
        session.progress.note(_opening(start, path, session))
        _warn_of_shared_streams(session)
        state = _train(session)
        session.finish_saving()
        try:
            limit = config.final_eval_tokens
            results = session.evaluate(plan.segments[-1], state, limit, recall=True)
        except Interrupted as ended:
            session.leave(plan.total_steps, ended)
        session.writer.last_evaluation(results, plan.total_steps)
    require_finite(results)
    if processes.is_writer():
        write_json(path / folder.EVALUATION, results)
    session.progress.note(closing(path, plan))
    return results


def _opening(start: Start, path: Path, session: Session) -> str:
    return opening(
        path,
        session.plan,
        session.mesh,
        start=session.start,
        lost=session.lost,
        fresh=session.fresh,
        epochs=start.epochs,
        memory=placement.state_bytes(session.program.abstract_state),
    )


def _warn_of_shared_streams(session: Session) -> None:
    """Says so where processes read the same text because there are too few streams."""
    size, count = session.plan.segments[0].batch_size, session.plan.config.data.streams
    rows, each = sharding.rows_here(session.mesh, size), size // count
    times = len(streams.needed(rows, each)) * each / len(rows)
    if times > 1 and processes.is_writer():
        logger.warning(
            "data.streams = %d: each process reads and tokenizes the text of %.3g times its rows; "
            "in a new run, data.streams = %d would share the text out",
            *(count, times, sharding.batch_shards(session.mesh)),
        )


def _train(session: Session) -> TrainState:
    """Runs all steps after those of the newest checkpoint; returns the last state."""
    state: Any = None if session.start else session.first_state()
    batches, plan = None, session.plan
    # A checkpoint holds the batch iterator of the segment in which, or at whose end, it was made.
    first = plan.segments.index(plan.last_trained(session.start))
    try:
        for segment in plan.segments[first:]:
            batches = _batches(session, segment, batches)
            if state is None:
                state = session.restore(batches)
            state = _run_segment(session, segment, state, batches)
    finally:
        if batches is not None:
            batches.close()
    return state


def _batches(session: Session, segment: Segment, before: Any) -> Any:
    """Returns the iterator over a segment's batches; it continues where `before` ended."""
    config = session.plan.config
    batches = mixture.make_train_iterator(
        session.sources,
        config.data,
        segment.stage,
        tokenizer=session.tokenizer,
        seed=config.seed,
        rows=sharding.rows_here(session.mesh, segment.batch_size),
    )
    if before is not None:
        before.close()
        batches.set_state(before.get_state())
    return batches


def _run_segment(session: Session, segment: Segment, state: TrainState, batches: Any) -> TrainState:
    """Runs those steps of a segment that earlier sessions have not run."""
    config, watch = session.plan.config, session.watch
    session.progress.begin(segment)
    session.throughput.end_lap()  # The time between two stages is not training time.
    step = max(segment.first_step, session.start)
    unread: Any = None  # metrics of step `step`, the last one taken
    try:
        inside = segment.first_step < step < segment.end_step
        if inside and step == session.start and session.owes_evaluation():
            _evaluate(session, segment, step, state)
        while step < segment.end_step:
            batch = placement.put_batch(watch.next_batch(batches), session.mesh)
            read = epochs.counts(batches.get_state())
            session.trace.before_step()
            knobs = session.plan.knobs(step)
            state, metrics = session.program.step(state, batch, knobs, segment.accumulate)
            if unread is not None:
                session.report(step, unread, state, batches)
            step, unread = step + 1, metrics | {"data": read}
            last = step == segment.end_step
            saving = last or step % config.checkpoint_every == 0
            evaluating = session.is_evaluated(step) and not last
            if saving or evaluating:
                # A state is saved or evaluated only after its own loss is known to be finite.
                session.report(step, unread, state, batches)
                unread = None
            if evaluating:
                _evaluate(session, segment, step, state)
            if saving:
                session.save(step, state, batches)
    except Interrupted as ended:
        if unread is not None:
            session.report(step, unread, state, batches)
        if step:
            session.save(step, state, batches)
        session.leave(step, ended)
    return state


def _evaluate(session: Session, segment: Segment, step: int, state: TrainState) -> None:
    with session.watch.interrupting():
        results = session.evaluate(segment, state, session.plan.config.eval_tokens)
    session.writer.write({"step": step, "eval": results})
