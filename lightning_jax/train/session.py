"""A session: the work of one process on a run, from start or resume until the end or a stop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.data import epochs
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer
from lightning_jax.runtime import processes
from lightning_jax.runtime.phases import phase
from lightning_jax.train import evaluation, placement, skipped
from lightning_jax.train import workdir as folder
from lightning_jax.train.interruption import Interrupted, Stopped, Watch
from lightning_jax.train.metrics import MetricsWriter, flatten, read_rows
from lightning_jax.train.plan import Plan, Segment
from lightning_jax.train.progress import Progress, Throughput
from lightning_jax.train.signals import StopRequest
from lightning_jax.train.start import Start
from lightning_jax.train.step import TrainState
from lightning_jax.train.trace import Trace

# Given (config, params, router, tokenizer, rope_base_global), returns a text that the model wrote.
Sampler = Callable[[RunConfig, Any, lm.Router, Tokenizer, float], str]


@dataclasses.dataclass
class Session:
    """The parts of a session that no step changes, and all work on a state besides steps.

    Attributes:
      start: steps that earlier sessions took.
      fresh: whether there is no checkpoint to start from, not even one of imported weights.
      logged: rows that earlier sessions logged of step `start`.
      lost: steps that they logged after that.
    """

    plan: Plan
    sources: Sources
    tokenizer: Tokenizer
    mesh: Mesh
    program: placement.TrainProgram
    evaluator: evaluation.Evaluator
    checkpointer: Checkpointer
    start: int
    fresh: bool
    logged: list[dict[str, Any]]
    lost: int
    writer: MetricsWriter
    progress: Progress
    throughput: Throughput
    watch: Watch
    trace: Trace
    sampler: Sampler | None
    skipped: skipped.SkippedSteps = dataclasses.field(default_factory=skipped.SkippedSteps)

    def first_state(self) -> TrainState:
        """Returns the state before the first step, with the weights of checkpoint 0 if any."""
        with phase("making the first weights"):
            state = self.program.init()
        if self.fresh:
            return state
        abstract = placement.items_from_state(self.program.abstract_state)
        items = {name: abstract[name] for name in folder.START_ITEMS}
        given = self.checkpointer.restore(0, items, verified=True)
        ema = jax.tree.map(jnp.copy, given["params"]) if state.ema else state.ema
        return dataclasses.replace(state, **given, ema=ema)

    def restore(self, batches: Any) -> TrainState:
        """Returns the state of the checkpoint, and moves `batches` to its position."""
        items = placement.items_from_state(self.program.abstract_state)
        with phase(f"reading checkpoint {self.start}"):
            # `train.start.look` has verified it.
            given = self.checkpointer.restore(self.start, items, batches, verified=True)
        state = placement.state_from_items(given)
        if self.plan.config.optimizer.on_nan == "stop":
            # Any bad step ends the run: those that an earlier session skipped must not.
            state = dataclasses.replace(state, bad_steps=state.bad_steps * 0)
        return state

    def is_evaluated(self, step: int) -> bool:
        """Whether the config asks for an evaluation after `step` steps."""
        every = self.plan.config.eval_every
        return bool(every and step and step % every == 0)

    def owes_evaluation(self) -> bool:
        """Whether an earlier session was stopped in the evaluation of the step it saved."""
        return self.is_evaluated(self.start) and not any("eval" in row for row in self.logged)

    def save(self, step: int, state: TrainState, batches: Any) -> None:
        """Saves, in the background, the state after `step` steps."""
        items, meta = placement.items_from_state(state), to_dict(self.plan.meta(step))
        with phase(f"saving step {step}"):
            self.checkpointer.save(step, items, batches, meta)

    def finish_saving(self) -> None:
        """Waits until the last save is complete on disk."""
        with phase("waiting until the last save is on disk"):
            self.checkpointer.wait()

    def report(self, step: int, metrics: dict[str, Any], state: TrainState, batches: Any) -> None:
        """Fetches the metrics of the last of `step` steps, checks them, and logs them when due.

        `metrics["data"]` is what the streams of this process have read, of `epochs.counts`.

        Raises:
          UserError: the loss is not finite and `on_nan` is "stop", or too many steps in a row were
            skipped; the state has been saved.
        """
        config, segment = self.plan.config, self.plan.last_trained(step)
        first = jax.device_get({name: metrics[name] for name in ("loss", "bad_steps")})
        if first["bad_steps"] and config.optimizer.on_nan == "stop":
            self._halt(step, state, batches)
        in_a_row = self.skipped.count(int(first["bad_steps"]), float(first["loss"]))
        if in_a_row >= skipped.MOST_IN_A_ROW:
            self._give_up(step, state, batches, in_a_row)
        self.throughput.count(segment.step_tokens)
        self.progress.advance(step, float(first["loss"]), self.throughput.tokens_per_second)
        if step % config.log_every and step not in self.plan.stage_ends:
            return
        row = {"step": step, "stage": segment.stage.name, "tokens": self.plan.tokens_at(step)}
        metrics = metrics | {"data": self._consumed(metrics["data"])}
        row |= flatten(jax.device_get(metrics)) | self.throughput.end_lap()
        self.writer.write(row)
        if config.histogram_every and step % config.histogram_every == 0:
            for key in ("histogram", "mean_experts"):
                if key in row:
                    self.writer.histogram(f"router/{key}", row[key], step)
            largest = [float(abs(leaf).max()) for leaf in jax.tree.leaves(state.params)]
            self.writer.histogram("params/absmax", largest, step)

    def _consumed(self, counts: epochs.Counts) -> dict[str, Any]:
        """Tokens and epochs by source over the streams of all processes."""
        said = [json.loads(word) for word in processes.exchange(json.dumps(counts))]
        return epochs.consumed(
            {name: of for each in said for name, of in each.items()}, self.sources
        )

    def _halt(self, step: int, state: TrainState, batches: Any) -> None:
        """Saves the last good state under the number of the failed step, and raises."""
        counters = {"step": state.step * 0 + step, "bad_steps": state.bad_steps * 0}
        self.save(step, dataclasses.replace(state, **counters), batches)
        self.finish_saving()
        stage, seed = self.plan.last_trained(step).stage.name, self.plan.config.seed
        raise UserError(
            f"loss is not finite at step {step} (stage {stage!r}, seed {seed}): the state before "
            f"it is checkpoint {step}; lower learning_rate, or set optimizer.on_nan="
            '"skip" to leave such steps out'
        )

    def _give_up(self, step: int, state: TrainState, batches: Any, in_a_row: int) -> None:
        """Saves the state, which skipped steps did not change, and raises."""
        # The device may be a step ahead; what is saved is its state and the data's position.
        reached = int(state.step)
        self.save(reached, state, batches)
        self.finish_saving()
        stage, seed = self.plan.last_trained(step).stage.name, self.plan.config.seed
        raise UserError(
            f"{in_a_row} steps in a row up to step {step} (stage {stage!r}, seed {seed}) were "
            f"skipped, for their loss or gradient was not finite: the state is checkpoint "
            f"{reached}, but other batches will not mend its weights; start again in another "
            "--workdir with a lower learning_rate"
        )

    def evaluate(
        self, segment: Segment, state: TrainState, max_tokens: int, *, recall: bool = False
    ) -> dict[str, Any]:
        """Returns the held-out loss by source, of the averaged weights if any; writes a sample.

        With `recall`, exact matches of recall tasks too.

        Each result says its `weights` ("ema" or "params") and the run's `skipped_steps` so far.

        Raises:
          Interrupted: a signal, heard between two batches.
        """
        config, params = self.plan.config, state.ema or state.params
        results = self.evaluator(
            params,
            state.router,
            seq_len=segment.seq_len,
            batch_size=segment.micro_batch,
            rope_base_global=segment.rope_base_global,
            weights="ema" if state.ema else "params",
            max_tokens=max_tokens,
            recall=recall,
            before_document=self.watch.look,
            before_batch=self.watch.agree,
        )
        bad_steps = int(state.bad_steps)
        results = {name: {**row, "skipped_steps": bad_steps} for name, row in results.items()}
        self.progress.note(evaluation.one_line(results))
        if bad_steps:
            self.progress.note(skipped.summary(bad_steps, int(state.step)))
        if self.sampler is not None and config.sample_tokens:
            try:
                with phase("writing a sample"):
                    text = self.sampler(
                        config, params, state.router, self.tokenizer, segment.rope_base_global
                    )
            except UserError as error:  # logits that are not finite: no sample ends a training
                text = f"no sample: {error}"
            self.writer.sample(text, int(state.step))
        return results

    def leave(self, step: int, ended: Interrupted) -> NoReturn:
        """Raises the cause of `ended` when the last save is complete, and says what is saved."""
        self.finish_saving()
        cause = ended.cause
        if isinstance(cause, Stopped):
            saved = f"saved step {step}" if step else "before the first step"
            self.progress.note(f"{cause.signal.name}: {saved}; the same command resumes")
            raise cause
        saved = f"the state before it is checkpoint {step}" if step else "nothing was trained yet"
        if isinstance(cause, UserError):
            raise UserError(f"{cause}; {saved}") from cause
        cause.add_note(saved)
        raise cause


class _Silent:
    """Stands in for what writes and prints in the processes that do not: a call does nothing."""

    def __enter__(self) -> _Silent:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _if_writer(kind: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return kind(*args, **kwargs) if processes.is_writer() else _Silent()


@contextlib.contextmanager
def open_session(
    begun: Start,
    workdir: Path,
    mesh: Mesh,
    *,
    sampler: Sampler | None,
    profile: bool,
    writers: Sequence[str],
) -> Iterator[Session]:
    """Opens the files of a session and closes them again; `mesh` is the ambient one meanwhile.

    Args:
      begun: the run, and the checkpoint to start from.
      workdir: its folder.
      mesh: its devices.
      sampler: writes a text sample at each evaluation.
      profile: record a trace of a few steps in the folder `profile`.
      writers: names, see `train.writers`.
    """
    plan, saved = begun.plan, begun.saved
    config, start = plan.config, saved.step if saved else 0
    logged, lost = _logged(workdir, start)
    with (
        jax.set_mesh(mesh),
        Checkpointer(
            workdir, keep=config.keep_checkpoints, keep_steps=plan.stage_ends
        ) as checkpointer,
        StopRequest() as stop,
        _if_writer(
            MetricsWriter,
            workdir,
            resume_step=start,
            final_step=plan.total_steps,
            config=to_dict(config),
            names=writers,
        ) as writer,
        _if_writer(Progress, plan.total_steps, start) as progress,
        Trace(workdir / "profile" if profile and processes.is_writer() else None) as trace,
    ):
        yield Session(
            plan=plan,
            sources=begun.sources,
            tokenizer=begun.tokenizer,
            mesh=mesh,
            program=placement.TrainProgram(config, mesh),
            evaluator=evaluation.Evaluator(config, begun.sources, begun.tokenizer, mesh),
            checkpointer=checkpointer,
            start=start,
            fresh=saved is None,
            logged=logged,
            lost=lost,
            writer=writer,
            progress=progress,
            throughput=Throughput(),
            watch=Watch(stop),
            trace=trace,
            sampler=sampler,
        )


def _logged(workdir: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """Returns the rows that are logged of step `start`, and the number of steps after it."""
    rows = read_rows(workdir / folder.METRICS)
    last = max([row["step"] for row in rows], default=start)
    return [row for row in rows if row["step"] == start], max(last - start, 0)
