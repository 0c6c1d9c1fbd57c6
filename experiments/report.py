"""Compare the arms of a sweep, or write the card of a run.

    python -m experiments.report --workdir=runs/pattern      # of a sweep
    python -m experiments.report --workdir=runs/quickstart   # of a run: its card

Arms are compared by quality, with intervals over paired seeds, and cost. Of a sweep it writes
report.html, report.json, report.csv and report_<figure>.png into the folder, prints tables on
stderr and the JSON alone on stdout; one that is still running or incomplete is reported as far as
it is. Of a run it writes card.html, and prints its numbers as JSON.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from lightning_jax.runtime import files, program

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep or run.", required=True)
_DECODE = flags.DEFINE_bool(
    "decode", False, "Of a sweep: measure first how fast its arms decode, one run of each."
)
_CONTEXT = flags.DEFINE_integer("context", 1024, "With --decode: tokens of the prompt.")
_ROUTERS = flags.DEFINE_bool(
    "routers", True, "Of a sweep: draw the routers of arms with experts, one run of each."
)


def main() -> None:
    files.check_output_folder("workdir", _WORKDIR.value)
    with program.loading():
        from configs import base
        from lightning_jax import card
        from lightning_jax.ablation import decode_speed, report
        from lightning_jax.config import RunConfig, build
        from lightning_jax.runtime import compiler

    if card.is_run(_WORKDIR.value):
        compiler.cache_for_user()
        facts = card.read(_WORKDIR.value, base=build(RunConfig, base.get_config()))
        program.emit_json({"card": str(card.write(facts))} | facts.summary())
        return
    sweep = report.read_sweep(_WORKDIR.value)
    routers = _ROUTERS.value and report.has_routers(sweep)
    if routers or _DECODE.value:  # All else leaves the accelerator to the sweep.
        compiler.cache_for_user()
    if _DECODE.value:
        decode_speed.measure(sweep, Path(_WORKDIR.value).absolute(), context=_CONTEXT.value)
    result = report.write_report(_WORKDIR.value, routers=routers)
    report.print_report(result)
    program.emit_json(result)


if __name__ == "__main__":
    program.run(main)
