"""Table `experts` of suite `kernels_gpu`: the grouped matmuls of an experts' MLP, uneven groups."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_peers import wait_for_torch
from benchmarks.gpu_timing import QUEUED, attempt, note, queue, runnable, timed
from benchmarks.measure import PROBE, Call, Options, compiled, peer
from lightning_jax.ops.experts import grouped_mlp

# Rows, model, hidden, experts: a small layer, and the fine-grained experts of a larger model.
SHAPES = ((8192, 512, 384, 16), (32_768, 2048, 1024, 64))
PASSES = ("forward", "forward+backward")
OURS = "pallas_gpu"
_OTHERS = ("ragged_dot",)


def experts_rows(options: Options) -> list[dict[str, Any]]:
    """One row for each shape and pass: useful TFLOP/s, share of the matmul peak, peers."""
    rows = []
    for S, D, F, E in SHAPES:
        for passes in PASSES:
            name = f"experts_{passes}_S{S}_D{D}_F{F}_E{E}"
            if options.wants(name):
                make = functools.partial(_row, passes, (S, D, F, E), options)
                rows.append(attempt("experts", name, make))
    return rows


def group_sizes(rows: int, experts: int) -> np.ndarray:
    """int32 [experts] of sum `rows`: the largest group is many times the smallest, one is empty."""
    share = 1 / np.arange(1.0, experts)
    size = np.append(0, (share / share.sum() * rows).astype(np.int32))
    size[1] += rows - size.sum()
    return np.random.default_rng(0).permutation(size).astype(np.int32)


def _row(passes: str, shape: tuple[int, ...], options: Options) -> dict[str, Any]:
    S, D, F, E = shape
    size_E, arrays = group_sizes(S, E), _arrays(S, D, F, E)
    builders = {
        name: functools.partial(_ours, passes, size_E, arrays, implementation)
        for name, implementation in {"ours": OURS, **{name: name for name in _OTHERS}}.items()
    }
    missing = {}
    if peer("torch") is None:
        missing["torch"] = "not installed, its rows are skipped"
    else:
        builders["torch"] = lambda: queue(torch_call(passes, size_E, arrays), wait_for_torch)
    calls, reasons = runnable(builders)
    if "ours" not in calls:
        raise RuntimeError(reasons["ours"])
    found = timed(calls, options)
    flops = (3 if passes == "forward" else 9) * 2.0 * S * D * F
    others = [name for name in calls if name != "ours"]
    return {
        **{f"{name}_ms": found.median_ms(name) / QUEUED for name in (*calls, PROBE)},
        "ours_tflops": found.gflops("ours", flops) * QUEUED / 1e3,
        "ours_of_peak": found.of_peak("ours", flops),
        **{f"vs_{name}": found.ratio(name, "ours") for name in others},
    } | note(missing | reasons)


def _arrays(S: int, D: int, F: int, E: int) -> list[jax.Array]:
    """The rows, the three weights and the output's cotangent in bfloat16."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((S, D), (E, D, F), (E, D, F), (E, F, D), (S, D))
    scales = (1.0, D**-0.5, D**-0.5, F**-0.5, 1.0)
    return [
        (jax.random.normal(key, shape) * scale).astype(jnp.bfloat16)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    ]


def _ours(passes: str, size_E: np.ndarray, arrays: list[jax.Array], implementation: str) -> Call:
    size_E = jnp.asarray(size_E)

    def mlp(*rows_and_weights):
        rows_SD, *weights = rows_and_weights
        return grouped_mlp(rows_SD, size_E, *weights, implementation=implementation)

    call = compiled(mlp, passes, arrays)
    return queue(lambda: call(*arrays))


def torch_call(
    passes: str, size_E: np.ndarray, arrays: list[jax.Array], device: str = "cuda"
) -> Callable[[], Any]:
    """The same MLP by torch's grouped matmul; returns the output, or it and its gradients."""
    torch = peer("torch")
    grouped = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    *leaves, dout = (torch.from_dlpack(a).clone() for a in arrays)
    end_E = torch.tensor(size_E.cumsum(), dtype=torch.int32, device=device)

    def mlp(rows, gate, up, down):
        hidden = torch.nn.functional.silu(grouped(rows, gate, offs=end_E))
        return grouped(hidden * grouped(rows, up, offs=end_E), down, offs=end_E)

    if passes == "forward":

        def forward():
            with torch.no_grad():
                return mlp(*leaves)

        return forward
    leaves = [leaf.requires_grad_(True) for leaf in leaves]

    def both():
        out = mlp(*leaves)
        return out, torch.autograd.grad(out, leaves, dout)

    return both
