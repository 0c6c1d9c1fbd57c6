"""Evaluate a run on its held-out text, or on other files.

    python -m experiments.evaluate --workdir=runs/a [--data='texts/*.txt'] [--eval.top_p=0.3]

Prints JSON on stdout: which weights were measured (ema, where the run keeps an average, or params)
and by domain the loss (nats per token), perplexity, bits per byte, number of tokens, loss by
position in the document, and the mean number of experts per token.
"""

from absl import flags

from lightning_jax.runtime import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_DATA = flags.DEFINE_string("data", None, "Glob of files to evaluate on; default: held-out text.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; default: the newest.")
_SEQ_LEN = flags.DEFINE_integer("eval.seq_len", None, "Tokens per row; default: the stage's.")
_BATCH = flags.DEFINE_integer("eval.batch_size", None, "Rows per batch; default: the stage's.")
_TOKENS = flags.DEFINE_integer(
    "eval.max_tokens", None, "Tokens per domain, 0: all; default: the run's final_eval_tokens."
)
_ROUTING = flags.DEFINE_enum("eval.routing", None, ["top_k", "top_p", "dense"], "Routing.")
_TOP_K = flags.DEFINE_integer("eval.top_k", None, "Experts per token under top_k.")
_TOP_P = flags.DEFINE_float("eval.top_p", None, "Probability mass to reach under top_p.")


def main() -> None:
    from lightning_jax.runtime import compiler
    from lightning_jax.train import evaluation

    options = evaluation.EvalOptions(
        data=_DATA.value,
        step=_STEP.value,
        seq_len=_SEQ_LEN.value,
        batch_size=_BATCH.value,
        max_tokens=_TOKENS.value,
        routing=_ROUTING.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
    )
    compiler.cache_for_user()
    program.emit_json(evaluation.evaluate_run(_WORKDIR.value, options))


if __name__ == "__main__":
    program.run(main)
