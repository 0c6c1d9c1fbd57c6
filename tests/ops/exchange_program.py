"""Compiles exchanges' gradients for TPUs that are not here; prints what is in them as JSON.

python tests/ops/exchange_program.py TRANSPORT ...    # in the environment of benchmarks.tpu_static
"""

import collections
import functools
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import PartitionSpec as P

from benchmarks.tpu_static import CHIPS
from lightning_jax.ops.exchange import exchanged_experts
from lightning_jax.ops.routing import Choices

M, C, D, F, E = 4 * 4096, 4, 512, 128, 8  # M of four devices
ROWS = M // 4 * C // 4


def loss(split, x_MD, index_MC, gate_MC, *weights):
    return jnp.sum(split(x_MD, index_MC, gate_MC, *weights).astype(jnp.float32) ** 2)


def compiled(transport: str) -> jax.stages.Compiled:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS["v5e"].topology)
    kinds = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("expert",), axis_types=kinds, devices=topology.devices)

    def local(x_MD, index_MC, gate_MC, *weights):
        options = dict(axis="expert", sync_axes=("expert",), transport=transport)
        return exchanged_experts(x_MD, Choices(index_MC, gate_MC, E), *weights, **options)[0]

    split = jax.shard_map(
        local, mesh=mesh, in_specs=P("expert"), out_specs=P("expert"), check_vma=False
    )
    shapes = [((M, D), jnp.bfloat16), ((M, C), jnp.int32), ((M, C), jnp.float32)]
    shapes += [(shape, jnp.bfloat16) for shape in ((E, D, F), (E, D, F), (E, F, D))]
    placement = jax.NamedSharding(mesh, P("expert"))
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=placement) for shape in shapes]
    with jax.set_mesh(mesh):
        grad = jax.grad(functools.partial(loss, split), argnums=(0, 2, 3, 4, 5))
        return jax.jit(grad).lower(*arguments).compile()


def in_loops(text: str) -> str:
    """The bodies of all loops."""
    bodies = set(re.findall(r"body=%([\w.\-]+)", text))
    parts = re.split(r"\n(?=%|ENTRY)", text)
    return "\n".join(part for part in parts if part[1:].split(" ")[0] in bodies)


def found(program: jax.stages.Compiled) -> dict[str, int]:
    text, memory = program.as_text(), program.memory_analysis()
    kinds = collections.Counter(re.findall(r" ([a-z\-]+?)(?:-start)?\(", text))
    # Fast memory is S(1): moves between it and the main memory are prefetches.
    copies = re.findall(r"= \w+\[([\d,]+)\](?!\S*S\(1\))\S* copy\(", in_loops(text))
    sizes = [int(np.prod([int(n) for n in shape.split(",")])) for shape in copies]
    return {
        "exchanges": kinds["all-to-all"],
        "ragged": kinds["ragged-all-to-all"],
        "gathers": kinds["all-gather"],
        # A TPU hides a reduce-scatter in a fusion.
        "reduce_scatters": kinds["reduce-scatter"] + text.count("%all-reduce-scatter"),
        "float_scatters": len(re.findall(r"= (?:f32|bf16)\[\S* scatter\(", text)),
        "large_copies": sum(size >= 4 * ROWS * D for size in sizes),
        "temporary_mib": memory.temp_size_in_bytes >> 20,
        "code_mib": memory.generated_code_size_in_bytes >> 20,
    }


if __name__ == "__main__":
    print(json.dumps({transport: found(compiled(transport)) for transport in sys.argv[1:]}))
