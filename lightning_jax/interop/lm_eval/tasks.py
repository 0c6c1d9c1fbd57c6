"""Evaluates a run on tasks of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_jax.checkpoint import load_run
from lightning_jax.config.errors import UserError, did_you_mean
from lightning_jax.config.fields import require
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data import round_trip
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import resolve_tokenizer
from lightning_jax.interop.lm_eval.adapter import LightningAdapter

_KEPT = (
    "results",
    "groups",
    "versions",
    "n-shot",
    "n-samples",
    "higher_is_better",
    "lm_eval_version",
)
# Metrics of a text's probability by the size of the text.
_PER_TEXT = ("bits_per_byte", "byte_perplexity", "word_perplexity")


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """How tasks are run. None keeps the setting of the task, the run or its newest checkpoint.

    `limit` is the number of documents per task or, below 1, their share. `include_path` is a folder
    with more tasks in YAML.

    Raises:
      UserError: a number out of its range.
    """

    tasks: tuple[str, ...]
    include_path: str | None
    limit: float | None
    num_fewshot: int | None
    batch_size: int
    seq_len: int | None
    step: int | None
    chat: bool
    seed: int
    routing: EvalRouting = EvalRouting()

    def __post_init__(self) -> None:
        require(any(self.tasks), "tasks", ",".join(self.tasks), "names of tasks, such as arc_easy")
        limit, shots, path = self.limit, self.num_fewshot, self.include_path
        require(limit is None or limit > 0, "limit", limit, "above 0")
        require(shots is None or shots >= 0, "num_fewshot", shots, "0 or more")
        require(path is None or os.path.isdir(path), "include_path", path, "a folder")
        require(0 <= self.seed < 2**31, "seed", self.seed, "in [0, 2^31)")


def evaluate_tasks(workdir: str | Path, options: TaskOptions) -> dict[str, Any]:
    """Evaluates a checkpoint of a run.

    Returns:
      `step`, `weights` ("ema" or "params"), and from the result of `lm_eval.simple_evaluate`
      `results`, `groups`, `versions`, `n-shot`, `n-samples`, `higher_is_better` (by task) and
      `lm_eval_version`.

    Raises:
      UserError: no such run or checkpoint, an unknown task, or one that cannot be loaded.
    """
    manager, tasks = load_tasks(options.tasks, options.include_path)
    run = load_run(workdir, step=options.step).with_routing(options.routing)
    adapter = LightningAdapter(
        run,
        resolve_tokenizer(Sources.open(run.config.data), workdir, rows=run.config.model.vocab_size),
        max_length=options.seq_len,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    if options.chat:
        adapter.chat_template(True)
    from lm_eval.evaluator import simple_evaluate

    found: Any = simple_evaluate(
        model=adapter,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=options.num_fewshot,
        limit=options.limit,
        apply_chat_template=options.chat,
        log_samples=False,
        random_seed=options.seed,
        numpy_random_seed=options.seed,
        torch_random_seed=options.seed,
        fewshot_random_seed=options.seed,
    )
    kept = {key: found[key] for key in _KEPT if key in found}
    without_lost(kept, adapter.lost_bytes, found.get("group_subtasks", {}))
    return {"step": run.meta.step, "weights": run.weights, **kept}


def without_lost(
    found: Mapping[str, Any],
    lost_bytes: Mapping[str | None, tuple[int, int]],
    subtasks: Mapping[str, Sequence[str]],
) -> None:
    """Puts null for metrics of bytes and words of texts that the tokenizer changes, and says why.

    Args:
      found: has metrics by task in `results`, and those of groups in `groups`; they are changed.
      lost_bytes: of `LightningAdapter`.
      subtasks: of each group, tasks and other groups.
    """

    def lost_in(task: str) -> tuple[int, int]:
        inside = [lost_in(name) for name in subtasks.get(task, ())]
        known, all_of = map(sum, zip(lost_bytes.get(task, (0, 0)), *inside, strict=True))
        return known, all_of

    for rows in (found.get("results", {}), found.get("groups", {})):
        for task, row in rows.items():
            lost, total = lost_in(task)
            per_text = [name for name in row if _metric(name) in _PER_TEXT]
            if lost and per_text:
                row |= dict.fromkeys(per_text)
                row["no_bits_per_byte"] = round_trip.reason(lost, total)


def _metric(name: str) -> str:
    """The metric of a name of the harness, such as `bits_per_byte_stderr,none`."""
    return name.split(",")[0].removesuffix("_stderr")


def load_tasks(names: Sequence[str], include_path: str | None) -> tuple[Any, list[Any]]:
    """Returns an index of tasks, and the tasks and groups of these names (or globs, or YAML files).

    Raises:
      UserError: an unknown name, a task whose data or code cannot be loaded, or a task that runs
        code written by the model or asks for more than text.
    """
    manager, names = _manager(names, include_path)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # From the user's YAML, its code, its data set or the network.
        reason = " ".join(str(error).split())
        raise UserError(f"tasks = {','.join(names)}: {type(error).__name__}: {reason}") from error
    for name, task in loaded["tasks"].items():
        for flag, why in (
            ("UNSAFE_CODE", "runs code that the model writes"),
            ("MULTIMODAL", "asks for more than text"),
        ):
            if getattr(task, flag, False):
                raise UserError(f"tasks = {name}: {why}, which is not supported")
    groups = [loaded["groups"][name] for name in names if name in loaded.get("groups", {})]
    inside = {task.task_name for group in groups for task in group.get_all_tasks()}
    alone = [task for name, task in loaded["tasks"].items() if name not in inside]
    return manager, groups + alone


def _manager(names: Sequence[str], include_path: str | None) -> tuple[Any, list[str]]:
    """Returns an index of tasks that has all `names`, and those with their globs expanded."""
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        # The harness takes long to read its own thousands of tasks.
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager, list(names)
    manager = TaskManager(include_path=include_path)
    expanded = []
    for name in names:
        found = [name] if Path(name).is_file() else manager.match_tasks([name])
        if not found:
            hint = did_you_mean(name, manager.all_tasks)
            place = f" and none of {include_path}" if include_path else ""
            raise UserError(f"tasks = {name!r}: no task of lm_eval{place}{hint}")
        expanded += found
    return manager, expanded
