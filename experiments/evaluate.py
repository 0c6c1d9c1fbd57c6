"""Evaluate a run on its held-out text, or on other files.

    python -m experiments.evaluate --workdir=runs/a [--data=texts] [--eval.top_p=0.3]

Prints JSON on stdout: which weights were measured (ema, where the run keeps an average, or params)
on which text, and by domain the loss (nats per token), perplexity, bits per byte, number of tokens,
loss by position in the document, and the mean number of experts per token; of recall tasks
(--data=recall:passkey) also exact matches by length and depth.
"""

from absl import flags

from lightning_jax.runtime import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_DATA = flags.DEFINE_string(
    "data",
    None,
    "File, folder, glob or recall:TASK, evaluated whole; default: what the run holds out.",
)
_STEP = program.define_step()
_SEQ_LEN = flags.DEFINE_integer("eval.seq_len", None, "Tokens per row; default: the stage's.")
_BATCH = flags.DEFINE_integer("eval.batch_size", None, "Rows per batch; default: the stage's.")
_TOKENS = flags.DEFINE_integer(
    "eval.max_tokens", None, "Tokens per domain, 0: all; default: the run's final_eval_tokens."
)
_ROUTING = program.define_routing()
_OUT = program.define_out()


def main() -> None:
    program.check_out(_OUT)
    with program.loading():
        from lightning_jax.runtime import compiler
        from lightning_jax.train import evaluation

    options = evaluation.EvalOptions(
        data=_DATA.value,
        step=_STEP.value,
        seq_len=_SEQ_LEN.value,
        batch_size=_BATCH.value,
        max_tokens=_TOKENS.value,
        routing=_ROUTING(),
    )
    compiler.cache_for_user()
    program.emit_json(evaluation.evaluate_run(_WORKDIR.value, options), _OUT)


if __name__ == "__main__":
    program.run(main)
