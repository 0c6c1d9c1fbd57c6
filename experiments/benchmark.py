"""Measure a suite on this machine: our code and, where installed, its peers.

    python -m experiments.benchmark --suite=attention --out=benchmarks/results/attention.json

Prints JSON on stdout (machine, versions, commit, rows) and tables on stderr. Without torch and
transformers (`pip install 'lightning_jax[peers]'`) their rows are skipped with a note.
"""

from absl import flags

from lightning_jax.config.errors import UserError
from lightning_jax.runtime import program

_CONFIG = program.define_config("configs/mixtral_28m.py")
_SUITE = flags.DEFINE_string(
    "suite",
    None,
    "attention, moe, train, serve_small, startup, data, kernels_tpu, tpu_program or kernels_gpu.",
    required=True,
)
_OUT = program.define_out()
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Interleaved rounds; medians are reported.", 1)
_PROFILE = flags.DEFINE_bool("profile", False, "Also say where the time of our code goes.")
_ONLY = flags.DEFINE_list("only", None, "Parts of row names: measure only rows with one of these.")


def main() -> None:
    program.check_out(_OUT)
    only = program.names(_ONLY)
    from benchmarks import report
    from benchmarks.measure import Options

    config = program.load_config(_CONFIG.value)
    options = Options(_ROUNDS.value, only, config, _PROFILE.value)
    found = report.run_suite(_SUITE.value, options)
    report.print_tables(found)
    try:
        program.emit_json(found)
    finally:  # What was measured is not lost with a closed standard output.
        if _OUT.value is not None:
            report.write(found, _OUT.value)
    if missing := report.no_such_rows(_SUITE.value, options):
        raise UserError(missing)


if __name__ == "__main__":
    # Peers are compared in the process that a user of theirs has.
    program.run(main, huge_pages=False)
