"""Suite `kernels_tpu`: static cycles of our TPU attention and its peers, and of grouped matmuls.

No TPU is needed. All attention is bfloat16 with one query head per key/value head, heads side by
side as the kernels take them, and a causal window; flash, which has none, is measured where the
window is the length. Grouped matmuls are those of `tpu_grouped`.
See `tpu_static` for the meaning and the limits of the figures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as flash

from benchmarks import tpu_grouped, tpu_splash, tpu_static
from benchmarks.measure import Options
from benchmarks.tpu_static import CHIPS, Case
from lightning_jax import accounting
from lightning_jax.aot import topologies
from lightning_jax.ops.kernels.tpu.backward import backward
from lightning_jax.ops.kernels.tpu.band import Band
from lightning_jax.ops.kernels.tpu.blocks import blocks_for, fast_memory
from lightning_jax.ops.kernels.tpu.forward import forward

HEAD_SIZE = 128
# (heads, length, window); the long one with one head, because cycles and the profiler's output are
# proportional to heads.
SHAPES = ((8, 4096, 1024), (1, 32768, 4096))
# All earlier keys, and the blocks of flash: its best two.
FULL = (8, 4096, 4096)
FLASH = (512, 1024)
# How cycles grow with the length at one window, and with the window at one length.
GROWTH = ((1, 8192, 1024), (1, 16384, 1024), (1, 16384, 2048), (1, 16384, 4096))
# Cases whose executed tiles are also counted: for larger ones the trace takes gigabytes.
TRACED = (1, 4096, 1024)
PASSES = ("forward", "backward")
# Blocks of queries, of keys, and of keys at once: the best two. The profiler would need more than
# 23 GB for the backward pass of the second.
SPLASH = {"forward": ((512, 512, 512), (1024, 1024, 512)), "both": ((512, 512, 512),)}


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: every case on every chip, with the best splash beside ours at equal shapes.

    Raises:
      UserError: libtpu is not installed.
    """
    about = topologies.versions()
    rows = []
    for chip in CHIPS:
        for name in cases(chip):
            if options.wants(f"{chip}_{name}"):
                trace = name.endswith(f"_{_label(TRACED)}")
                found = tpu_static.measure(__spec__.name, name, chip, trace=trace)
                rows.append({"table": chip, "name": f"{chip}_{name}"} | found | about)
    return rows + _ratios(rows, about)


def cases(chip: str) -> dict[str, Callable[[], Case]]:
    """The cases measured on a chip, by name."""
    found = {}
    for shape in (*SHAPES, FULL, TRACED, *GROWTH):
        for passes in PASSES:
            name = f"ours_{passes}_{_label(shape)}"
            found[name] = functools.partial(_ours, chip, passes, *shape)
    for passes, choices in SPLASH.items():
        for sizes in choices:
            for shape in SHAPES:
                name = f"splash_{_label(sizes)}_{passes}_{_label(shape)}"
                found[name] = functools.partial(_splash, passes, sizes, *shape)
    name = f"splash_{_label(SPLASH['forward'][0])}_forward_{_label(TRACED)}"
    found[name] = functools.partial(_splash, "forward", SPLASH["forward"][0], *TRACED)
    for block in FLASH:
        found[f"flash_{block}_forward_{_label(FULL)}"] = functools.partial(_flash, block, *FULL)
    return found | tpu_grouped.cases()


def _label(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _ratios(rows: list[dict[str, Any]], about: dict[str, str]) -> list[dict[str, Any]]:
    """Ours over the fastest of the others, where both were measured."""
    cycles = {row["name"]: row["cycles"] for row in rows if "cycles" in row}
    found = []
    for chip in CHIPS:
        for shape in (*SHAPES, FULL):
            label = _label(shape)
            ours = [cycles.get(f"{chip}_ours_{passes}_{label}") for passes in PASSES]
            for passes, total in (("forward", ours[:1]), ("both", ours)):
                peers = [
                    count
                    for name, count in cycles.items()
                    if name.startswith((f"{chip}_splash_", f"{chip}_flash_"))
                    and name.endswith(f"{passes}_{label}")
                ]
                if peers and None not in total:
                    name = f"{chip}_{passes}_{label}"
                    best = {"ours": sum(total), "theirs": min(peers)}
                    ratio = round(sum(total) / min(peers), 3)
                    found.append({"table": "ratio", "name": name, **best, "ratio": ratio} | about)
    return found


def _ours(chip: str, passes: str, heads: int, length: int, window: int) -> Case:
    blocks = blocks_for(CHIPS[chip].kind, HEAD_SIZE, 1, length, window, 2)
    band = Band(
        length=length,
        offset=0,
        window=window,
        kv_heads=heads,
        group=1,
        head_size=HEAD_SIZE,
        scale=HEAD_SIZE**-0.5,
        softcap=None,
        segments=False,
        sinks=False,
        blocks=getattr(blocks, passes),
        fast_memory=fast_memory(CHIPS[chip].kind),
        interpret=False,
    )
    array = jax.ShapeDtypeStruct((1, length, heads * HEAD_SIZE), jnp.bfloat16)
    statistics = jax.ShapeDtypeStruct((1, heads, 1, length), jnp.float32)
    if passes == "forward":

        def function(query, key, value):
            return forward(band, query, key, value, None, None)

        return Case(function, (array,) * 3, *_work(passes, heads, length, window), _pairs(band))

    def function(query, key, value, out, dout, lse):
        return backward(band, query, key, value, out, dout, lse, None)

    arguments = (array,) * 5 + (statistics,)
    return Case(function, arguments, *_work(passes, heads, length, window), _pairs(band))


def _splash(passes, sizes, heads, length, window) -> Case:
    array = jax.ShapeDtypeStruct((heads, length, HEAD_SIZE), jnp.bfloat16)
    options = heads, length, window, tpu_splash.block_sizes(*sizes)
    build = tpu_splash.forward if passes == "forward" else tpu_splash.forward_and_backward
    blocks = heads * tpu_splash.visited(length, window, *sizes[:2])
    arguments = (array,) * (3 if passes == "forward" else 4)
    return Case(build(*options), arguments, *_work(passes, heads, length, window), (1, blocks))


def _flash(block, heads, length, window) -> Case:
    array = jax.ShapeDtypeStruct((1, heads, length, HEAD_SIZE), jnp.bfloat16)
    sizes = flash.BlockSizes(block_q=block, block_k_major=block, block_k=block, block_b=1)
    function = functools.partial(
        flash.flash_attention, causal=True, sm_scale=HEAD_SIZE**-0.5, block_sizes=sizes
    )
    blocks = heads * tpu_splash.visited(length, window, block, block)
    return Case(function, (array,) * 3, *_work("forward", heads, length, window), (1, blocks))


def _work(passes: str, heads: int, length: int, window: int) -> tuple[float, float]:
    """FLOPs of the visible pairs, and bytes of all arrays read and written once."""
    products, arrays = {"forward": (2, 4), "backward": (5, 8), "both": (7, 12)}[passes]
    per_pair = accounting.pair_flops(heads, HEAD_SIZE, products=products)
    flops = per_pair * accounting.attention_pairs(length, window)
    return float(flops), 2.0 * arrays * heads * length * HEAD_SIZE


def _pairs(band: Band) -> tuple[int, int]:
    """Pairs of tiles with products: in the code of the kernel, and run, for its whole grid."""
    tiles = band.blocks.tiles
    own = sum(band.sees(distance) for tile in range(tiles) for distance in range(tile + 1))
    interior = tiles * tiles if band.interior_blocks else 0
    code, ran = own + interior, 0
    edges = {
        back: sum(band.sees(at - key + tiles * back) for at in range(tiles) for key in range(tiles))
        for back in band.edge_blocks
    }
    code += sum(edges.values())
    for step in range(band.folded_from):
        ran += own + interior * min(step, band.interior_blocks)
        ran += sum(count for back, count in edges.items() if step >= back)
    if band.folded_from < band.steps:
        looped = band.folded_interior > band.folded_first
        code += tiles * (2 + band.folded_first + (band.blocks.visit if looped else 0))
        ran += tiles * (2 + band.folded_interior) * (band.steps - band.folded_from)
    return code, ran * band.kv_heads
