"""What is kept of the outputs of a notebook, and how its parameters are replaced."""

import base64
import io

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the notebooks extra")
pytest.importorskip("nbclient", reason="needs the notebooks extra")

import numpy as np  # noqa: E402
from nbformat.v4 import new_code_cell, new_notebook, new_output  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks import notebooks  # noqa: E402


def picture():
    """A PNG of two colours that is far larger than it needs to be."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[32:] = 200, 30, 60
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png", compress_level=0)
    return base64.b64encode(file.getvalue()).decode()


def test_progress_and_warnings_go_and_results_stay():
    cell = new_code_cell("x")
    cell.metadata.execution = {"iopub.execute_input": "2026-01-01T00:00:00"}
    cell.execution_count = 3
    progress = notebooks.JUPYTER_HTML_FORMAT.format(code="step 1/9")
    cell.outputs = [
        new_output("stream", name="stderr", text="a warning"),
        new_output("display_data", {"text/html": progress, "text/plain": "step 1/9"}),
        new_output("stream", name="stdout", text="an answer"),
        new_output("execute_result", {"text/html": "<b>x</b>"}, execution_count=3),
        new_output("execute_result", {notebooks.PNG: picture(), "text/plain": "<Figure>"}),
    ]
    notebook = new_notebook(cells=[cell])
    notebooks.tidy(notebook)
    text, page, shown = cell.outputs
    assert (text.text, page.data["text/html"]) == ("an answer", "<b>x</b>")
    assert cell.execution_count is page.execution_count is None and "execution" not in cell.metadata
    assert list(shown.data) == [notebooks.PNG] and len(shown.data[notebooks.PNG]) < 500
    pixels = np.asarray(
        Image.open(io.BytesIO(base64.b64decode(shown.data[notebooks.PNG]))).convert("RGB")
    )
    assert tuple(pixels[0, 0]) == (0, 0, 0) and tuple(pixels[-1, -1]) == (200, 30, 60)
    nbformat.validate(notebook)
    once = nbformat.writes(notebook)
    notebooks.tidy(notebook)
    assert nbformat.writes(notebook) == once


@pytest.mark.slow
def test_parameters_are_replaced_for_one_execution():
    cell = new_code_cell("x = 1\nworkdir = 'runs/a'", metadata={"tags": [notebooks.PARAMETERS]})
    notebook = new_notebook(cells=[cell, new_code_cell("x, workdir[-4:]")])
    result = notebooks.execute(notebook, {"x": 5})
    assert result.cells[1].outputs[0].data["text/plain"] == "(5, '/run')"
    assert result.cells[0].source == cell.source and not notebook.cells[1].outputs
    with pytest.raises(ValueError, match="no parameters of this notebook: .'y'"):
        notebooks.execute(notebook, {"y": 5})
