"""Compiles a gradient for TPUs that are not here; prints what is in the program as JSON.

python tests/tpu_program.py       # in the environment of benchmarks.tpu_static
"""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.tpu_static import CHIPS
from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.aot import collectives, hlo
from lightning_jax.ops.experts import grouped_mlp
from lightning_jax.runtime import target
from tests.tiny import mesh_config, tiny_model

BATCH, LENGTH = 4, 256


def main() -> None:
    found = {"host": jax.default_backend()}
    found["experts"] = gradient(
        {"fsdp": 2, "expert": 2}, unit="LG", moe__transport="all_to_all", moe__num_shared_experts=1
    )
    # A window of two shards: a halo of two hops.
    found["sequence"] = gradient({"sequence": 4}, unit="L", moe__num_experts=0)
    found["expert_work"] = expert_work(topology().devices[0])
    print(json.dumps(found))


def topology():
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS["v5e"].topology)


def gradient(sizes, **changes) -> dict[str, object]:
    """Counts of what the gradient of a small model has on a mesh of four chips."""
    mesh = sharding.make_mesh(mesh_config(**sizes), topology().devices)
    changes |= dict(attention__window=128, attention__head_dim=128, model_dim=128)
    config = tiny_model(**changes)
    moe = dataclasses.replace(config.moe, expert_dim=128)
    config = dataclasses.replace(config, compute_dtype="bfloat16", moe=moe)
    with jax.set_mesh(mesh):
        placement = sharding.tree_shardings(lm.logical_axes(config), mesh)
        params = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            lm.abstract_params(config),
            placement,
        )
        tokens = jax.ShapeDtypeStruct(
            (BATCH, LENGTH), jnp.int32, sharding=sharding.batch_sharding(mesh)
        )

        def loss(params, tokens_BT):
            output = lm.LightningLM(config, train=True).apply({"params": params}, tokens_BT)
            return (output.hidden_BTD.astype(jnp.float32) ** 2).sum()

        lowered = jax.jit(jax.grad(loss), out_shardings=placement).lower(params, tokens)
        program = lowered.compile().as_text()
        sent = collectives.find(hlo.parse(program), mesh.shape)
        return {
            "platform": target.current().platform,
            "attention": lowered.as_text().count('kernel_name = "sliding_window'),
            "grouped": lowered.as_text().count('kernel_name = "grouped_'),
            "compiled": program.count('custom_call_target="tpu_custom_call"'),
            "sent": program.count(" collective-permute-start("),
            "gathered": program.count(" all-gather"),
            "large": Counter(
                f"{each.kind} {' '.join(each.axes)}" for each in sent if each.operand_bytes > 2**16
            ),
        }


def expert_work(device) -> float:
    """FLOPs of the experts' MLP with gradients, as compiled by default, over nine products'."""
    S, E, D, F = 1024, 16, 256, 128
    mesh = jax.sharding.Mesh([device], "x")
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = (S, D), (E, D, F), (E, D, F), (E, F, D)
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=whole) for s in shapes]
    size_E = jax.ShapeDtypeStruct((E,), jnp.int32, sharding=whole)

    def step(size_E, rows_SD, *weights):
        y_SD, pull = jax.vjp(lambda *x: grouped_mlp(x[0], size_E, *x[1:]), rows_SD, *weights)
        return pull(y_SD)

    with jax.set_mesh(mesh):
        flops = jax.jit(step).lower(size_E, *arrays).compile().cost_analysis()["flops"]
    return flops / (9 * 2 * S * D * F)


if __name__ == "__main__":
    main()
