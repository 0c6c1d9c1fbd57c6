"""Continue a prompt with the model of a run.

    python -m experiments.generate --workdir=runs/a --prompt='def' [--temperature=0.8] [--chat]
        [--eval.top_p=0.3]

Streams the prompt and its continuation to stdout, with --chat only the answer; tokens per second
and the mean number of experts per token go to stderr. The same seed gives the same text;
--temperature=0 is greedy. --top_k and --top_p draw tokens, --eval.top_k and --eval.top_p experts.
"""

import functools
import sys

from absl import flags

from lightning_jax.runtime import program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to continue; may be empty.", required=True)
_CHAT = flags.DEFINE_bool("chat", False, "Answer the prompt, by the tokenizer's chat template.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "Divides the logits; 0: greedy.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most probable tokens; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 0.95, "Draw from the most probable tokens of this mass.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 256, "Tokens per sample at the most.")
_NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations, one after another.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draws.")
_STEP = program.define_step()
_ROUTING = program.define_routing()


def main() -> None:
    with program.loading():
        from lightning_jax.infer import text
        from lightning_jax.infer.sampling import Sampling
        from lightning_jax.runtime import compiler

    options = text.GenerateOptions(
        prompt=_PROMPT.value,
        sampling=Sampling(_TEMPERATURE.value, _TOP_K.value, _TOP_P.value),
        max_new_tokens=_MAX_NEW_TOKENS.value,
        num_samples=_NUM_SAMPLES.value,
        seed=_SEED.value,
        step=_STEP.value,
        chat=_CHAT.value,
        routing=_ROUTING(),
    )
    compiler.cache_for_user()
    text.generate_run(
        _WORKDIR.value,
        options,
        write=functools.partial(program.emit_text, end=""),
        report=functools.partial(print, file=sys.stderr),
    )


if __name__ == "__main__":
    program.run(main)
