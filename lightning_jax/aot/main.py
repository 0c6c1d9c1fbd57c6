"""What `experiments.aot_compile` does: checks, compiles or searches, prints tables."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from lightning_jax.aot import compiling, report, search
from lightning_jax.aot.programs import PROGRAMS, Shape
from lightning_jax.aot.search import Space
from lightning_jax.aot.topologies import Slice
from lightning_jax.config import RunConfig
from lightning_jax.runtime.tables import print_table


def run(
    config: RunConfig,
    topology: Slice,
    programs: tuple[str, ...],
    shape: Shape,
    space: Space | None,
) -> dict[str, Any]:
    """Compiles the programs of a run (() for all), or searches `space`; prints tables.

    Returns:
      The command line, and what `compiling.compile_all` or `search.search` return.

    Raises:
      UserError: bad input.
    """
    if space is not None:
        space.check()
    config = compiling.check(config, programs, shape)
    if space is None:
        found = compiling.compile_all(config, topology, programs or PROGRAMS, shape)
    else:
        found = search.search(config, topology, shape, space, cache=search.cache_folder())
        print_table(search.rows(found), f"train on {topology}")
    if any(found["programs"].values()):
        print_table(report.memory_rows(found), f"memory of one of {found['chips']} chips")
        print_table(report.time_rows(found), "roofline of one call")
        print_table(report.collective_rows(found), "collectives of one chip")
        print_table(report.buffer_rows(found), "largest buffers of one chip")
    return {"command": shlex.join(["experiments.aot_compile", *sys.argv[1:]]), **found}
