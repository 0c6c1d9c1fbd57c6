"""Executes the notebooks at full size and keeps their outputs in them, small and of no machine.

    python -m benchmarks.notebooks [--names=01_tour,03_top_p_routing]

A notebook is written back with its tables and pictures, without what only this execution was:
progress, warnings, execution counts and times. How long it took is written to
`benchmarks/results/notebooks.json`. People edit the notebooks themselves; this program only fills
in what their cells show.

A notebook has one cell with the tag `parameters`: plain assignments, which `execute` can replace.
The parameter `workdir` always is: every execution trains in a folder of its own.
"""

from __future__ import annotations

import base64
import copy
import datetime
import io
import os
import re
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbclient
import nbformat
from absl import flags
from nbformat import NotebookNode
from PIL import Image
from rich.jupyter import JUPYTER_HTML_FORMAT

from lightning_jax.config.errors import UserError, suggest
from lightning_jax.runtime import files, program

_ROOT = Path(__file__).resolve().parents[1]
FOLDER = _ROOT / "notebooks"
RESULTS = _ROOT / "benchmarks" / "results" / "notebooks.json"
PARAMETERS, WORKDIR = "parameters", "workdir"
PNG = "image/png"
# A picture of lines and text needs few, but each of them: also those of a small marker.
_COLORS, _METHOD = 64, Image.Quantize.MAXCOVERAGE
# What rich prints in a notebook: the progress of a run, and its tables.
_PROGRESS = JUPYTER_HTML_FORMAT.partition("{code}")[0]
_SECONDS = 1800

_NAMES = flags.DEFINE_list("names", None, "Names of notebooks, such as 01_tour; all by default.")


def names() -> list[str]:
    """Returns the names of the notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def read(name: str) -> NotebookNode:
    """Returns a notebook."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_cell(notebook: NotebookNode) -> NotebookNode:
    """Returns the cell with the notebook's parameters.

    Raises:
      ValueError: there is not exactly one.
    """
    (cell,) = (c for c in notebook.cells if PARAMETERS in c.metadata.get("tags", ()))
    return cell


def execute(notebook: NotebookNode, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Returns a copy of a notebook with the outputs of its cells, run from top to bottom.

    Args:
      notebook: stays as it is.
      parameters: by name, values in place of those that the notebook gives its parameters.

    Raises:
      ValueError: a parameter that the notebook does not have.
      CellExecutionError: a cell fails.
    """
    result = copy.deepcopy(notebook)
    cell = parameters_cell(result)
    source = cell.source
    given = set(re.findall(r"^(\w+) = ", source, re.MULTILINE))
    with tempfile.TemporaryDirectory() as folder:
        values = dict(parameters or {})
        if WORKDIR in given:
            values[WORKDIR] = f"{folder}/run"
        if unknown := set(values) - given:
            raise ValueError(f"no parameters of this notebook: {sorted(unknown)}")
        cell.source = "\n".join([source, *(f"{name} = {v!r}" for name, v in values.items())])
        where = {"metadata": {"path": str(FOLDER)}}
        nbclient.NotebookClient(result, timeout=_SECONDS, resources=where).execute()
    cell.source = source
    return result


def tidy(notebook: NotebookNode) -> None:
    """Keeps of the outputs what a reader looks at; makes pictures small."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if not is_noise(output)]
        for output in cell.outputs:
            output.pop("execution_count", None)
            if output.output_type == "execute_result":
                output.execution_count = None
            if PNG in output.get("data", {}):
                output.data[PNG] = _smaller(output.data[PNG])
                output.data.pop("text/plain", None)


def is_noise(output: NotebookNode) -> bool:
    """Whether an output of a cell is a warning or progress."""
    shown = output.get("data", {}).get("text/html", "")
    return output.get("name") == "stderr" or shown.startswith(_PROGRESS)


def _smaller(png: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(_COLORS, _METHOD).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def build(name: str) -> dict[str, Any]:
    """Executes a notebook and writes it with its outputs; returns what it took, and on what."""
    from benchmarks import report

    load, used, begin = os.getloadavg()[0], _processor_seconds(), time.perf_counter()
    notebook = execute(read(name))
    taken = {"seconds": time.perf_counter() - begin, "cpu_seconds": _processor_seconds() - used}
    tidy(notebook)
    files.write_file(FOLDER / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
    return {
        **{key: round(value, 1) for key, value in taken.items()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": report.machine() | {"load_before": round(load, 2)},
        "versions": report.versions(),
    }


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """The program."""
    known = names()
    for name in (chosen := program.names(_NAMES) or known):
        if name not in known:
            raise UserError(f"--names={name}: no such notebook: {suggest(name, known)}")
    for name in chosen:
        row = build(name)
        results = files.read_json(RESULTS, missing_ok=True) | {name: row}
        files.write_json(RESULTS, dict(sorted(results.items())))
        program.emit_text(f"{name}: {row['seconds']} s")


if __name__ == "__main__":
    program.run(main, huge_pages=False)
