"""Evaluate a run on tasks of lm-evaluation-harness (pip install 'lightning_jax[lm-eval]').

    python -m experiments.lm_eval --workdir=runs/a --tasks=arc_easy,lambada_openai [--limit=100]

Prints the results as JSON on stdout. The harness downloads the data of its tasks; a task of your
own is a YAML file in the folder that --include_path names.
"""

from absl import flags

from lightning_jax.runtime import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_TASKS = flags.DEFINE_list("tasks", None, "Tasks, groups or globs of them.", required=True)
_INCLUDE_PATH = flags.DEFINE_string("include_path", None, "Folder with more tasks in YAML.")
_LIMIT = flags.DEFINE_float("limit", None, "Documents per task (below 1: their share).")
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Examples; default: the task's.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Requests per forward pass.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Most tokens; default: the stage's.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the newest.")
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "Ask by the tokenizer's chat template.")
_ROUTING_TOP_P = flags.DEFINE_float(
    "routing_top_p", None, "Probability mass that the experts of a token reach; default: the run's."
)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of examples and draws.")


def main() -> None:
    from lightning_jax.interop.lm_eval import tasks
    from lightning_jax.runtime import compiler

    options = tasks.TaskOptions(
        tasks=program.names(_TASKS),
        include_path=_INCLUDE_PATH.value,
        limit=_LIMIT.value,
        num_fewshot=_NUM_FEWSHOT.value,
        batch_size=_BATCH_SIZE.value,
        max_length=_MAX_LENGTH.value,
        step=_STEP.value,
        apply_chat_template=_CHAT.value,
        routing_top_p=_ROUTING_TOP_P.value,
        seed=_SEED.value,
    )
    compiler.cache_for_user()
    program.emit_json(tasks.evaluate_tasks(_WORKDIR.value, options))


if __name__ == "__main__":
    program.run(main)
