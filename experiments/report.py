"""Compare the arms of a sweep, or write the card of a run.

    python -m experiments.report --workdir=runs/pattern      # of a sweep
    python -m experiments.report --workdir=runs/quickstart   # of a run: its card

Arms are compared by quality, with paired intervals over seeds, and cost. Of a sweep it writes
report.json, report.png and report.html into the folder, prints a table on stderr and the JSON alone
on stdout; one that is still running or incomplete is reported as far as it is. Of a run it writes
card.html, and prints its numbers as JSON.
"""

from __future__ import annotations

from absl import flags

from lightning_jax.runtime import files, program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep or run.", required=True)


def main() -> None:
    files.check_output_folder("workdir", _WORKDIR.value)
    with program.loading():
        from configs import base
        from lightning_jax import card
        from lightning_jax.ablation import report
        from lightning_jax.config import RunConfig, build
        from lightning_jax.runtime import compiler

    if card.is_run(_WORKDIR.value):
        compiler.cache_for_user()
        facts = card.read(_WORKDIR.value, base=build(RunConfig, base.get_config()))
        program.emit_json({"card": str(card.write(facts))} | facts.summary())
        return
    result = report.write_report(_WORKDIR.value)
    report.print_report(result)
    program.emit_json(result)


if __name__ == "__main__":
    program.run(main)
