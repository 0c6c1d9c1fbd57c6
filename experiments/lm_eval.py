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
_BATCH = flags.DEFINE_integer("eval.batch_size", 8, "Requests per forward pass.")
_SEQ_LEN = flags.DEFINE_integer(
    "eval.seq_len", None, "Most tokens of a request; default: the stage's."
)
_STEP = program.define_step()
_CHAT = flags.DEFINE_bool("chat", False, "Ask by the tokenizer's chat template.")
_ROUTING = program.define_routing()
_SEED = flags.DEFINE_integer("seed", 0, "Seed of examples and draws.")
_OUT = program.define_out()


def main() -> None:
    program.check_out(_OUT)
    with program.loading():
        from lightning_jax.interop.lm_eval import tasks
        from lightning_jax.runtime import compiler

    options = tasks.TaskOptions(
        tasks=program.names(_TASKS),
        include_path=_INCLUDE_PATH.value,
        limit=_LIMIT.value,
        num_fewshot=_NUM_FEWSHOT.value,
        batch_size=_BATCH.value,
        seq_len=_SEQ_LEN.value,
        step=_STEP.value,
        chat=_CHAT.value,
        seed=_SEED.value,
        routing=_ROUTING(),
    )
    compiler.cache_for_user()
    program.emit_json(tasks.evaluate_tasks(_WORKDIR.value, options), _OUT)


if __name__ == "__main__":
    program.run(main)
