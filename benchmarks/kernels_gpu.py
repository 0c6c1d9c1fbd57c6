"""Suite `kernels_gpu`: the Pallas kernels on a real GPU, against their peers.

Tables: `correctness` (values, gradients and repeatability against float32), `attention` (useful
TFLOP/s at one shape, share of the matmul peak, peers), `decode` (useful bytes per second),
`experts` (grouped matmuls, as `attention`) and `tiles` (candidate tile sizes, to re-tune the table
of `ops.kernels.gpu.blocks`). A row that fails is there with its reason.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_peers
from benchmarks.gpu_correctness import correctness_rows
from benchmarks.gpu_decoding import decode_rows
from benchmarks.gpu_experts import experts_rows
from benchmarks.gpu_timing import QUEUED, attempt, note, queue, runnable, timed
from benchmarks.measure import PROBE, Call, Options, compiled, peer
from lightning_jax import accounting
from lightning_jax.config.errors import UserError
from lightning_jax.ops.kernels.gpu import backward as gpu_backward
from lightning_jax.ops.kernels.gpu import blocks as gpu_blocks
from lightning_jax.ops.kernels.gpu import forward as gpu_forward
from lightning_jax.ops.kernels.gpu.attention import sliding_window_attention
from lightning_jax.ops.kernels.gpu.blocks import Band, Tile, Tiles

BATCH, QUERY_HEADS, KV_HEADS, HEAD_DIM, LENGTH = 4, 32, 8, 128, 16_384
WINDOWS = (1024, 4096)
PASSES = ("forward", "forward+backward")
MEAN_DOCUMENT = 4096

# (queries, keys, warps, stages): tiles that compile for an H200 and spill few registers, if any.
_CANDIDATES = {
    "forward": [
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
    ],
    "dquery": [(128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 3)],
    "dkey": [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 8, 2)],
}


def run(options: Options) -> list[dict[str, Any]]:
    """Rows of the tables that were asked for.

    Raises:
      UserError: jax sees no GPU.
    """
    require_gpu()
    rows = correctness_rows(options)
    for window in WINDOWS:
        for passes in PASSES:
            name = f"attention_{passes}_{window}"
            if options.wants(name):
                make = functools.partial(_row, passes, window, options)
                rows.append(attempt("attention", name, make))
    rows += decode_rows(options) + experts_rows(options)
    for kernel in _CANDIDATES:
        if options.wants(f"tiles_{kernel}"):
            rows += _tiles(kernel, options)
    return rows


def require_gpu() -> None:
    """Raises a UserError unless jax sees a GPU."""
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        found = jax.devices()[0].platform
        raise UserError(
            f"suite=kernels_gpu: needs an NVIDIA GPU, but jax sees only {found};"
            " install jax[cuda13] on a machine with one"
        ) from error


def documents(batch: int, length: int, mean: int) -> np.ndarray:
    """int32 [batch, length]: rows packed with documents of random lengths, numbered from 1."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(batch):
        lengths = np.maximum(rng.exponential(mean, 4 * length // mean + 64).astype(int), 64)
        rows.append(np.repeat(np.arange(1, len(lengths) + 1), lengths)[:length])
    return np.stack(rows).astype(np.int32)


def useful_flops(segments: np.ndarray, window: int, passes: str) -> float:
    """FLOPs of the visible pairs of all heads: two products forward, five more backward."""
    lengths = [int(n) for row in segments for n in np.unique(row, return_counts=True)[1]]
    products = 2 if passes == "forward" else 7
    per_pair = accounting.pair_flops(QUERY_HEADS, HEAD_DIM, products=products)
    return float(per_pair * sum(accounting.attention_pairs(n, window) for n in lengths))


def _row(passes: str, window: int, options: Options) -> dict[str, Any]:
    arrays, packed = _arrays(), documents(BATCH, LENGTH, MEAN_DOCUMENT)
    segments_BT = jnp.asarray(packed)
    attend = functools.partial(sliding_window_attention, window=window, scale=HEAD_DIM**-0.5)
    with_documents = functools.partial(
        attend, query_segments_BT=segments_BT, key_segments_BS=segments_BT
    )
    calls = {
        "ours": _ours(with_documents, passes, arrays),
        "plain": _ours(attend, passes, arrays),
    }
    others, reasons = _peers(passes, arrays, segments_BT, window)
    found = timed(calls | others, options)
    flops = useful_flops(packed, window, passes)
    plain_flops = useful_flops(np.ones_like(packed), window, passes)
    row = {f"{name}_ms": found.median_ms(name) / QUEUED for name in found.seconds if name != PROBE}
    row |= {
        "ours_tflops": found.gflops("ours", flops) * QUEUED / 1e3,
        "ours_of_peak": found.of_peak("ours", flops),
        "plain_tflops": found.gflops("plain", plain_flops) * QUEUED / 1e3,
        "plain_of_peak": found.of_peak("plain", plain_flops),
        "peak_tflops": found.gflops(PROBE, found.probe_flops) * QUEUED / 1e3,
        **{f"vs_{name}": found.ratio(name, "ours") for name in others},
        **{f"plain_vs_{name}": found.ratio(name, "plain") for name in others},
    }
    return row | note(reasons)


def _peers(
    passes: str, arrays: list[jax.Array], segments_BT: jax.Array, window: int
) -> tuple[dict[str, Call], dict[str, str]]:
    """The peers that run here, and for the others the reason why not."""
    available = {name: (build, None) for name, build in gpu_peers.JAX_PEERS.items()}
    missing = {}
    if peer("torch") is None:
        missing["torch"] = "not installed, its rows are skipped"
    else:
        for name, build in gpu_peers.TORCH_PEERS.items():
            available[name] = build, gpu_peers.wait_for_torch
    builders = {
        name: functools.partial(_peer_call, build, finish, passes, arrays, segments_BT, window)
        for name, (build, finish) in available.items()
    }
    calls, reasons = runnable(builders)
    return calls, missing | reasons


def _peer_call(build: Any, finish: Any, *arguments: Any) -> Call:
    return queue(build(*arguments), finish)


def _ours(attend: Any, passes: str, arrays: list[jax.Array]) -> Call:
    call = compiled(attend, passes, arrays)
    return queue(lambda: call(*arrays))


def _arrays() -> list[jax.Array]:
    """Query, key, value and the output's cotangent in bfloat16."""
    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS, QUERY_HEADS)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(BATCH, LENGTH, count, HEAD_DIM) for count in heads]
    return [
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)
    ]


def _tiles(kernel: str, options: Options) -> list[dict[str, Any]]:
    """Times one kernel with each candidate, one row each, without documents."""
    window, arrays = WINDOWS[0], _arrays()
    builders = {
        "tiles_{}_{}x{}_w{}_s{}".format(kernel, *numbers): functools.partial(
            _kernel_call, kernel, Tile(*numbers), window, arrays
        )
        for numbers in _CANDIDATES[kernel]
    }
    calls, reasons = runnable(builders)
    products = {"forward": 2, "dquery": 3, "dkey": 4}[kernel]
    pairs_flops = useful_flops(np.ones((BATCH, LENGTH), np.int32), window, "forward")
    flops = pairs_flops * products / 2
    rows: list[dict[str, Any]] = [
        {"table": "tiles", "name": name, "note": reason} for name, reason in reasons.items()
    ]
    found = timed(calls, options)
    for name in calls:
        rows.append(
            {
                "table": "tiles",
                "name": name,
                "ms": found.median_ms(name) / QUEUED,
                "tflops": found.gflops(name, flops) * QUEUED / 1e3,
                "of_peak": found.of_peak(name, flops),
            }
        )
    return rows


def _kernel_call(kernel: str, tile: Tile, window: int, arrays: list[jax.Array]) -> Call:
    query, key, value, dout = arrays
    problem = gpu_forward.Problem(
        Band(LENGTH, 0, window),
        gpu_forward.Scores(HEAD_DIM**-0.5, None, False),
        Tiles(tile, tile, tile),
    )
    if kernel == "forward":
        call = jax.jit(lambda *qkv: gpu_forward.forward(problem, *qkv, None, None))
        return queue(lambda: call(query, key, value))
    table = gpu_blocks.tiles_for(gpu_blocks.device_class(), HEAD_DIM, window, 2)
    out, lse = jax.jit(
        lambda *qkv: gpu_forward.forward(problem._replace(tiles=table), *qkv, None, None)
    )(query, key, value)
    if kernel == "dquery":
        return _gradient(gpu_backward.query_gradient, problem, query, key, value, out, lse, dout)
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1).swapaxes(1, 2)
    return _gradient(gpu_backward.key_gradients, problem, query, key, value, lse, delta, dout)


def _gradient(kernel: Any, problem: Any, query, key, value, *known: jax.Array) -> Call:
    call = jax.jit(lambda *qkv_known: kernel(problem, *qkv_known[:3], None, *qkv_known[3:]))
    return queue(lambda: call(query, key, value, *known))
