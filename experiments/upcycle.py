"""Start a run with experts, windows and shared keys and values from a dense checkpoint.

    python -m experiments.upcycle --source=runs/dense --config=configs/x.py --workdir=runs/up
    python -m experiments.train --config=configs/x.py --workdir=runs/up

SOURCE is the folder of a run (of which --step names a checkpoint) or of Hugging Face; the config's
model must have the same width, heads, depth and vocabulary. Prints whether the function was kept
exactly, and the held-out loss before and after, as JSON.
"""

from absl import flags

from lightning_jax.runtime import files, program

_CONFIG = program.define_config()
_SOURCE = flags.DEFINE_string("source", None, "Folder of the dense model.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run to make.", required=True)
_STEP = program.define_step()
_POOL = flags.DEFINE_enum(
    "pool", "mean", ["mean", "first"], "Shared keys and values: mean of the group's, or the first."
)
_TOKENS = flags.DEFINE_integer("eval.max_tokens", 16_384, "Held-out tokens per domain; 0: all.")


def main() -> None:
    files.check_output_folder("workdir", _WORKDIR.value)
    config = program.load_config(_CONFIG.value)
    with program.loading():
        from lightning_jax.interop.upcycle_run import upcycle_run

    result = upcycle_run(
        _SOURCE.value,
        _WORKDIR.value,
        config,
        step=_STEP.value,
        pool=_POOL.value,
        max_tokens=_TOKENS.value,
    )
    program.emit_json(result)


if __name__ == "__main__":
    program.run(main)
