"""The type hints of the package agree with each other, as pyright (basic) reads them.

Slow, and so not in `make check`: pyright alone needs half a minute. `make types` runs it by itself.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
@pytest.mark.skipif(shutil.which("node") is None, reason="pyright would download node")
def test_the_package_has_no_type_error():
    command = (sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable)
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] > 150
    errors = [
        f"{Path(each['file']).relative_to(ROOT)}:{each['range']['start']['line'] + 1}: "
        f"{each['message']}"
        for each in found["generalDiagnostics"]
        if each["severity"] == "error"
    ]
    assert not errors, "\n".join(errors)
