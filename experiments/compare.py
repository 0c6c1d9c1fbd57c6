"""Compare two runs: what differs in their configs, held-out scores, curves, speed and cost.

    python -m experiments.compare runs/a runs/b [--page=compare.html]

Prints tables on stderr and JSON on stdout. A run that is still training is compared as far as it
is. One run of each says nothing of chance: `experiments.sweep` compares over seeds.
"""

from __future__ import annotations

from absl import flags

from lightning_jax.config.fields import require
from lightning_jax.runtime import files, program

_PAGE = flags.DEFINE_string(
    "page", None, "HTML file to write, with the curves; they are written beside it as PNG too."
)
_OUT = program.define_out()


def main(first: str, second: str) -> None:
    program.check_out(_OUT)
    if _PAGE.value is not None:
        require(_PAGE.value.endswith(".html"), "page", _PAGE.value, "a name that ends in .html")
        files.check_output("page", _PAGE.value)
    with program.loading():
        from lightning_jax.ablation import compare

    compared = compare.compare(first, second)
    compare.print_comparison(compared)
    if _PAGE.value is not None:
        compare.write_page(compared, _PAGE.value)
    program.emit_json(compared, _OUT)


if __name__ == "__main__":
    program.run(main, operands=("FOLDER", "FOLDER"))
