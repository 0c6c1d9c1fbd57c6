"""Suite `moe`: one layer of routed experts, router included, forward and with gradients.

Peers: `jax.lax.ragged_dot` under the same router, and the Mixtral and Qwen3-MoE blocks of
`transformers`, between them with each of the expert implementations that run on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Options, compiled, interleave, peer, temp_mb
from benchmarks.peers import torch_moe_calls
from benchmarks.profile import profiles
from lightning_jax.ops.experts import routed_experts
from lightning_jax.ops.routing import route
from lightning_jax.runtime.compiler import options as compiler_options

TOKENS, MODEL_DIM, EXPERT_DIM, EXPERTS, CHOICES = 4096, 512, 256, 32, 4
DECODE_TOKENS = (1, 8, 64)
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "forward+backward")


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: against transformers and ragged_dot, few tokens, cost by experts and by top-p."""
    rows = []
    for tokens in (TOKENS, *DECODE_TOKENS):
        for passes in PASSES if tokens == TOKENS else PASSES[:1]:
            for dtype in DTYPES:
                name = f"{passes}_{dtype}_{tokens}_tokens"
                if options.wants(name):
                    rows.append(_against_transformers(name, passes, dtype, tokens, options))
    for passes in PASSES:
        if options.wants(f"experts_{passes}"):
            rows.append(_by_experts(passes, options))
    if options.wants("ragged_dot"):
        rows.append(_against_ragged_dot(options))
    for passes in PASSES:
        if options.wants(f"top_p_{passes}"):
            rows.append(_by_top_p(passes, options))
    return rows


def useful_flops(tokens: int, passes: str, choices: float = CHOICES) -> float:
    """FLOPs of the filled slots: three products forward, six more backward."""
    return 2.0 * tokens * choices * MODEL_DIM * EXPERT_DIM * (3 if passes == "forward" else 9)


def _against_transformers(
    name: str, passes: str, dtype: str, tokens: int, options: Options
) -> dict[str, Any]:
    arrays = _arrays(tokens, EXPERTS, dtype)
    ours = _compiled(passes, arrays)
    peers, note = {}, "torch or transformers is not installed (extra peers): rows are skipped"
    if peer("torch") and peer("transformers"):
        note, batched = "", tokens != TOKENS
        peers = torch_moe_calls(passes, arrays, choices=CHOICES, batched=batched)
    calls = {"ours": functools.partial(ours, *arrays), **peers}
    found = interleave(calls, rounds=options.rounds, probe=jnp.dtype(dtype))
    flops = useful_flops(tokens, passes)
    row = {
        "table": "against transformers",
        "name": name,
        **{f"{variant}_ms": found.median_ms(variant) for variant in calls},
        **{f"{variant}_cpu_ms": found.cpu_ms(variant) for variant in calls},
        "gflops": found.gflops("ours", flops),
        "of_peak": found.of_peak("ours", flops),
        "temp_mb": temp_mb(ours),
        **profiles(options, {"ours": (ours, calls["ours"])}),
    }
    if peers:
        row["best_peer"] = min(peers, key=found.median_ms)
        row["vs_best"] = found.ratio(row["best_peer"], "ours")
        row["vs_best_cpu"] = found.cpu_ratio(row["best_peer"], "ours")
    return row | ({"note": note} if note else {})


def _by_experts(passes: str, options: Options) -> dict[str, Any]:
    """Time at 8 to 64 experts of the same size, each token using the same number."""
    programs, calls = {}, {}
    for experts in (8, 16, 32, 64):
        arrays = _arrays(TOKENS, experts, "float32")
        programs[f"E{experts}"] = _compiled(passes, arrays)
        calls[f"E{experts}"] = functools.partial(programs[f"E{experts}"], *arrays)
    found = interleave(calls, rounds=options.rounds)
    return {
        "table": "cost by number of experts",
        "name": f"experts_{passes}",
        **{f"{name}_ms": found.median_ms(name) for name in calls},
        "E64_over_E8": found.ratio("E64", "E8"),
        "E64_over_E8_cpu": found.cpu_ratio("E64", "E8"),
        **profiles(options, {name: (programs[name], calls[name]) for name in calls}),
    }


def _against_ragged_dot(options: Options) -> dict[str, Any]:
    arrays = _arrays(TOKENS, EXPERTS, "float32")
    calls = {
        name: functools.partial(_compiled("forward", arrays, implementation=name), *arrays)
        for name in ("blocked", "ragged_dot")
    }
    found = interleave(calls, rounds=options.rounds)
    return {
        "table": "against ragged_dot",
        "name": f"ragged_dot_E{EXPERTS}_forward",
        **{f"{name}_ms": found.median_ms(name) for name in calls},
        "vs_ragged_dot": found.ratio("ragged_dot", "blocked"),
        "vs_ragged_dot_cpu": found.cpu_ratio("ragged_dot", "blocked"),
    }


def _by_top_p(passes: str, options: Options) -> dict[str, Any]:
    """Time when p is lowered until half of the slots of 2 x CHOICES are filled."""
    arrays = _arrays(TOKENS, EXPERTS, "float32")
    logits_ME = arrays[0].astype(jnp.float32) @ arrays[1]
    p = _p_that_fills(np.asarray(logits_ME), CHOICES)
    programs = {
        name: _compiled(passes, arrays, choices=2 * CHOICES, top_p=top_p)
        for name, top_p in (("all", 1.0), ("half", p))
    }
    calls = {name: functools.partial(program, *arrays) for name, program in programs.items()}
    found = interleave(calls, rounds=options.rounds)
    return {
        "table": "cost by filled slots",
        "name": f"top_p_{passes}",
        "top_p": p,
        "experts_a_token": _mean_filled(logits_ME, p),
        **{f"{name}_ms": found.median_ms(name) for name in calls},
        "all_over_half": found.ratio("all", "half"),
        "all_over_half_cpu": found.cpu_ratio("all", "half"),
        **profiles(options, {name: (programs[name], calls[name]) for name in calls}),
    }


def _mean_filled(logits_ME: Any, p: float) -> float:
    choices, _ = route(jnp.asarray(logits_ME), kind="top_p", slots=2 * CHOICES, top_p=p)
    return float(choices.filled_MC.sum(-1).mean())


def _p_that_fills(logits_ME: np.ndarray, target: float) -> float:
    """The threshold at which tokens use `target` experts on average, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_filled(logits_ME, middle) < target else (low, middle)
    return high


def _arrays(tokens: int, experts: int, dtype: str) -> tuple[jax.Array, ...]:
    """x_MD, router_DE, gate_EDF, up_EDF, down_EFD and the output's cotangent."""
    rng, D, F = np.random.default_rng(0), MODEL_DIM, EXPERT_DIM
    shapes = ((tokens, D), (D, experts), (experts, D, F), (experts, D, F), (experts, F, D))
    scales = (1.0, 2 * D**-0.5, D**-0.5, D**-0.5, F**-0.5)
    arrays = [
        jnp.asarray(rng.normal(size=shape) * scale, jnp.float32 if i == 1 else dtype)
        for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]
    return (*arrays, jnp.asarray(rng.normal(size=(tokens, D)), dtype))


def _layer(x_MD, router_DE, *weights, choices, top_p, implementation):
    choices, _ = route(
        x_MD.astype(jnp.float32) @ router_DE,
        kind="top_p" if top_p else "top_k",
        slots=choices,
        top_p=top_p or 1.0,
        renormalize=True,
    )
    return routed_experts(x_MD, choices, *weights, implementation=implementation)


def _compiled(
    passes: str,
    arrays: tuple[jax.Array, ...],
    *,
    choices: int = CHOICES,
    top_p: float | None = None,
    implementation: str | None = None,
) -> Any:
    """Compiles the layer, or the layer and its gradients, for these arrays."""
    layer = functools.partial(_layer, choices=choices, top_p=top_p, implementation=implementation)
    return compiled(layer, passes, arrays, compiler_options())
