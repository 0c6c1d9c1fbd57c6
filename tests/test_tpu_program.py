"""A program for a TPU, compiled on a machine without one, is a TPU's program."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_static import environment

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (tpu-aot)"
)
def test_a_cpu_process_compiles_tpu_kernels_and_grouped_matmuls():
    command = [sys.executable, str(ROOT / "tests" / "tpu_program.py")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["host"] == "cpu"
    experts, sequence = found["experts"], found["sequence"]
    assert experts["platform"] == sequence["platform"] == "tpu"
    # Two layers, forward and backward; of experts two kernels forward and four backward.
    assert experts["attention"] >= 4 and experts["grouped"] >= 12 and experts["compiled"] >= 16
    # Gradients go to the devices that store them: of dense weights over all, of experts over fsdp.
    large = experts["large"]
    assert large["reduce-scatter fsdp expert"] and large["reduce-scatter fsdp"]
    assert not [kind for kind in large if kind.startswith("all-reduce")]
    # No gradient of weights is dense over all experts, which would make it 16 products.
    assert 0.99 < found["expert_work"] < 1.05
    # A split row: the same kernels, two hops of keys and of values in each direction, no gather.
    assert sequence["attention"] >= 2 and sequence["compiled"] >= 2
    assert sequence["sent"] >= 8 and not sequence["gathered"]
