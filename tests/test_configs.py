"""Every file in configs/ builds, and says what it is for and how to run it."""

import ast
import importlib.util
from pathlib import Path

import pytest

from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build, to_dict

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
# Takes a folder of weights: tests/interop/test_convert.py.
COMPLETE = [path for path in CONFIGS if path.stem != "imported"]


def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_builds(path):
    run = build(RunConfig, load(path))
    assert build(RunConfig, to_dict(run)) == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_with_the_command_that_runs_it(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"--config=configs/{path.name}" in text or "make " in text
