"""Train every arm of a sweep with every seed, one run after another; the same command resumes.

    python -m experiments.sweep --sweep=configs/sweeps/pattern.py --workdir=runs/pattern
        [--only=LLLG,G] [--seeds=0,1] [--config.model.model_dim=64]

The folder gets sweep.json, a run's folder in <arm>/seed_<n>, results.jsonl and results.csv.
`{"finished": rows, "failed": {run: error}}` is printed as JSON on stdout. A run that fails does not
stop the others; the exit status is 2 at the end. Read the result with `experiments.report`.
"""

from __future__ import annotations

import sys

from absl import flags

from lightning_jax.ablation import runner, sweep
from lightning_jax.config.errors import UserError
from lightning_jax.runtime import files, invocation, program

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, from configs/sweeps.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)
_ONLY = flags.DEFINE_list("only", None, "Arms to run; all by default.")
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds to run; all by default.")
_CHANGED = flags.DEFINE_bool(
    "allow_changed_data", False, "Resume runs although the text is not what they began with."
)
_CHANGES = program.define_changes()


def main() -> None:
    only, seeds = program.names(_ONLY), program.numbers(_SEEDS)
    files.check_output_folder("workdir", _WORKDIR.value)
    arms = sweep.load_sweep(_SWEEP.value, _CHANGES())
    rows, failures = runner.run_sweep(
        arms,
        _WORKDIR.value,
        only=only,
        seeds=seeds,
        allow_changed_data=_CHANGED.value,
    )
    if rows:
        report = invocation.command("report", f"--workdir={_WORKDIR.value}")
        print(f"next     {report}", file=sys.stderr)
    program.emit_json({"finished": rows, "failed": failures})
    if failures:
        name, first = next(iter(failures.items()))
        raise UserError(f"{len(failures)} runs failed, first {name}: {first}")


if __name__ == "__main__":
    program.run(main)
