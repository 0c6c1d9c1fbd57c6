"""Compare the arms of a sweep: quality with paired intervals over seeds, and cost.

    python -m experiments.report --workdir=runs/pattern

Writes report.json, report.png and report.html into the folder, prints a table on stderr and the
JSON alone on stdout. A sweep that is still running or incomplete is reported as far as it is.
"""

from __future__ import annotations

from absl import flags

from lightning_jax.ablation import report
from lightning_jax.runtime import files, program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)


def main() -> None:
    files.check_output_folder("workdir", _WORKDIR.value)
    result = report.write_report(_WORKDIR.value)
    report.print_report(result)
    program.emit_json(result)


if __name__ == "__main__":
    program.run(main)
