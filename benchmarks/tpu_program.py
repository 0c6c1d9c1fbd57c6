"""Suite `tpu_program`: size of a train step's program on TPUs, and the time to compile it.

The whole step for v5e:2x2, data 2 x fsdp 2: two units, width 512, bfloat16, rows of 1,024 tokens.
A variant leaves out what keeps the program small: loops over equal layers (`runs`), calls of one
copy of equal code (`calls`). No TPU is needed; every row is compiled in a process of its own.

    python -m benchmarks.tpu_program ROW    # the child
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
from jax.experimental import topologies

from benchmarks import tpu_static
from benchmarks.measure import Options
from configs import base
from lightning_jax import sharding
from lightning_jax.aot import topologies as slices
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from lightning_jax.layers import units
from lightning_jax.runtime import compiler
from lightning_jax.train.placement import TrainProgram, abstract_batch
from lightning_jax.train.plan import Plan

UNITS = ("L", "LLL", "LLLGLLLg")
VARIANTS = {"none": (False, False), "runs": (True, False), "calls": (False, True)}
VARIANTS["both"] = (True, True)


def names() -> list[str]:
    """Names of the rows: unit, experts or dense, remat, variant."""
    found = [f"{unit}_{mlp}_none_both" for unit in UNITS for mlp in ("dense", "experts")]
    found += [f"LLLGLLLg_experts_none_{variant}" for variant in ("none", "runs", "calls")]
    return [*found, *(f"LLLGLLLg_experts_full_{variant}" for variant in ("none", "both"))]


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: megabytes of program and of temporaries on a device, seconds of the compilation.

    Raises:
      UserError: libtpu is not installed, or a program did not compile.
    """
    about = slices.versions()
    return [measure(name) | about for name in names() if options.wants(name)]


def measure(name: str) -> dict[str, Any]:
    """Compiles a row: `program_mb`, `temporary_mb`, `wall_s` and `cpu_s` of all threads."""
    command = [sys.executable, "-m", __spec__.name, name]
    found = subprocess.run(
        command, env=tpu_static.environment(), capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise UserError(f"{name}: {tpu_static.first_error(found.stderr)}")
    return {"name": name} | json.loads(found.stdout.splitlines()[-1])


def run_config(unit: str, mlp: str, remat: str) -> RunConfig:
    """The run whose step is compiled."""
    config = base.get_config()
    model = config.model
    model.unit, model.num_units, model.remat = unit, 2, remat
    model.model_dim, model.mlp_dim, model.vocab_size = 512, 1024, 4096
    model.compute_dtype = "bfloat16"
    model.attention.head_dim, model.attention.window = 128, 256
    model.moe.num_experts, model.moe.expert_dim = 16 * (mlp == "experts"), 128
    config.stages = base.named(one=base.stage(batch_size=8, seq_len=1024))
    config.mesh.data = config.mesh.fsdp = 2
    return build(RunConfig, config)


def lower(config: RunConfig) -> Any:
    """Lowers the first step of a run for v5e:2x2."""
    topology = tpu_static.CHIPS["v5e"].topology
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh, plan = sharding.make_mesh(config.mesh, devices), Plan.of(config)
    with jax.set_mesh(mesh):
        program = TrainProgram(config, mesh)
        batch = abstract_batch(plan.segments[0], mesh)
        return program.step.lower(program.abstract_state, batch, plan.knobs(0), 1)


def _child(name: str) -> None:
    unit, mlp, remat, variant = name.split("_")
    with_runs, with_calls = VARIANTS[variant]
    if not with_runs:
        units._runs = lambda config: [(spec,) for spec in config.unit_layers]
    if not with_calls:
        compiler.options = dict
    lowered = lower(run_config(unit, mlp, remat))
    start = os.times()
    memory = lowered.compile().memory_analysis()
    end = os.times()
    cpu = end.user + end.system - start.user - start.system
    row = {
        "program_mb": round(memory.generated_code_size_in_bytes / 1e6, 1),
        "temporary_mb": round(memory.temp_size_in_bytes / 1e6),
        "wall_s": round(end.elapsed - start.elapsed, 1),
        "cpu_s": round(cpu, 1),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    _child(*sys.argv[1:])
