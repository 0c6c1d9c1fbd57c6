"""Every variant of the TPU kernels is accepted by the real compiler, libtpu, without a TPU.

libtpu reads its environment once, and aborts where it has a bug: each chip is a process of its own.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_static import CHIPS, environment

ROOT = Path(__file__).parents[4]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-aot)"
    ),
]


@pytest.mark.parametrize("chip", CHIPS)
def test_all_variants_compile(chip):
    command = [sys.executable, str(Path(__file__).parent / "variants.py"), chip]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    failures = {name: error for name, error in json.loads(done.stdout).items() if error}
    assert not failures
