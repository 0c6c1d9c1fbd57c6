"""The process that compiles one program: `python -m lightning_jax.aot.child REQUEST ANSWER`.

REQUEST is a file of JSON, see `compiling`; ANSWER becomes one, `{"error": line}` for bad input. A
program that does not fit is an answer too: the compiler has scheduled it and placed its buffers
before it refuses. Run it in the environment of `topologies.environment`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lightning_jax.aot import memory, programs, report
from lightning_jax.aot.roofline import Network
from lightning_jax.aot.topologies import Slice
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.runtime import files

_TEXT = "*after_optimizations.txt"
_ASSIGNMENT = "*after_optimizations-buffer-assignment.txt"


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles what a request asks for; see `report.describe` for the result.

    Raises:
      UserError: the slice cannot be, the sizes do not divide over it, or the compiler refuses the
        program for another reason than its memory.
    """
    config = RunConfig.parse(request["config"], "config")
    topology = Slice(request["generation"], tuple(request["sizes"]), request["slices"])
    start = os.times()
    lowered = programs.lower(
        request["program"], config, programs.Shape(**request["shape"]), topology.devices()
    )
    lowering = os.times()
    with tempfile.TemporaryDirectory(prefix="lightning_jax_aot_") as folder:
        compiled = _compile(lowered.lowered, folder)
        end = os.times()
        assignment = _dump(folder, _ASSIGNMENT)
        text = compiled.as_text() if compiled else _dump(folder, _TEXT)
    code = compiled.memory_analysis().generated_code_size_in_bytes if compiled else None
    mesh = lowered.mesh
    # The axis of replicas is the first, so the devices of the first slice are the first too.
    inside = list(mesh.devices.flat)[: mesh.size // topology.count]
    coords = np.array([device.coords for device in inside])
    facts = report.Facts(
        mesh={**mesh.shape, "replica": mesh.shape["replica"] // topology.count},
        slices=topology.count,
        network=Network(topology.chip, topology.sizes, coords),
        model_flops=lowered.model_flops / mesh.size,
        device_flops=lowered.device_flops / mesh.size,
        least_bytes=lowered.least_bytes,
        memory=memory.held(assignment, code),
    )
    found = report.describe(text, assignment, facts)
    if compiled:
        costs = compiled.cost_analysis()
        found["flops"]["compiler"] = costs.get("flops")
        found["bytes"]["compiler"] = costs.get("bytes accessed")
    return {
        "shape": lowered.shape,
        "mesh": dict(mesh.shape),
        "tokens": lowered.tokens,
        "argument_bytes": lowered.argument_bytes,
        **found,
        "compile": {
            "lower_s": round(lowering.elapsed - start.elapsed, 1),
            "wall_s": round(end.elapsed - lowering.elapsed, 1),
            "cpu_s": round(end.user + end.system - lowering.user - lowering.system, 1),
        },
    }


def _compile(lowered: Any, folder: str) -> Any:
    """Compiles, with dumps in a folder; None if the program does not fit into the memory."""
    try:
        return lowered.compile(compiler_options={"xla_dump_to": folder})
    except jax.errors.JaxRuntimeError as error:
        words = " ".join(str(error).split())
        # The fast memory may be too small as well, but that is a fault of a kernel.
        if not (words.startswith("RESOURCE_EXHAUSTED") and "HBM" in words.upper()):
            raise UserError(f"the compiler refuses the program: {words[:400]}") from error
    return None


def _dump(folder: str, pattern: str) -> str:
    """The dump of the program, which is the largest module in the folder.

    Raises:
      UserError: the compiler gave up before it wrote one.
    """
    found = sorted(Path(folder).glob(pattern), key=lambda path: path.stat().st_size)
    if not found:
        raise UserError("the compiler refuses the program before it has placed its buffers")
    return found[-1].read_text()


def main(request: str, out: str) -> None:
    """Answers the request in one file with another."""
    # A program that comes from a cache leaves no dump.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        found = answer(json.loads(Path(request).read_text()))
    except UserError as error:
        found = {"error": str(error)}
    files.write_json(out, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
