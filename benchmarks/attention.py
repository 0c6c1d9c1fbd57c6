"""Suite `attention`: sliding-window and full attention of one layer, forward and with gradients.

Peers: `jax.nn.dot_product_attention`, torch's compiled flex_attention (it has no backward on CPU)
and torch's scaled_dot_product_attention over all earlier keys, the usual choice on a CPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import Call, Options, Rounds, compiled, interleave, peer, temp_mb
from benchmarks.profile import profiles
from lightning_jax import accounting
from lightning_jax.ops.kernels.cpu.banded import banded_attention

QUERY_HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64
LENGTH, LONG, WINDOW = 4096, 16_384, 512
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "forward+backward")
_banded = functools.partial(banded_attention, window=WINDOW)


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: each pass and dtype with a window and without, and how time grows with length."""
    rows = []
    for window in (WINDOW, None):
        for passes in PASSES:
            for dtype in DTYPES:
                name = f"{passes}_{dtype}_{LENGTH}_{window or 'full'}"
                if options.wants(name):
                    rows.append(
                        {"table": passes, "name": name} | _row(passes, dtype, window, options)
                    )
    for passes in PASSES:
        name = f"growth_{passes}_{LENGTH}_{LONG}"
        if options.wants(name):
            rows.append({"table": "growth", "name": name} | _growth(passes, options))
    if options.wants(f"dtypes_{LENGTH}"):
        rows += [_dtypes(passes, options) for passes in PASSES]
    return rows


def useful_flops(length: int, window: int | None, passes: str) -> float:
    """FLOPs of the visible pairs: two products forward, five more backward."""
    products = 2 if passes == "forward" else 7
    per_pair = accounting.pair_flops(QUERY_HEADS, HEAD_DIM, products=products)
    return float(per_pair * accounting.attention_pairs(length, window))


def _row(passes: str, dtype: str, window: int | None, options: Options) -> dict[str, Any]:
    arrays = _arrays(LENGTH, dtype)
    ours = compiled(functools.partial(banded_attention, window=window), passes, arrays)
    calls: dict[str, Call] = {"ours": functools.partial(ours, *arrays)}
    memory = {"temp_mb": temp_mb(ours)}
    if window:
        theirs = compiled(functools.partial(_jax_attention, window=window), passes, arrays)
        calls["jax"] = functools.partial(theirs, *arrays)
        memory["jax_temp_mb"] = temp_mb(theirs)
    torch_calls, note = _torch_calls(passes, arrays, window)
    calls |= torch_calls
    found = interleave(calls, rounds=options.rounds, probe=jnp.dtype(dtype))
    flops = useful_flops(LENGTH, window, passes)
    others = [name for name in calls if name != "ours"]
    row = {
        **{f"{name}_ms": found.median_ms(name) for name in calls},
        **{f"{name}_cpu_ms": found.cpu_ms(name) for name in calls},
        **{f"vs_{name}": found.ratio(name, "ours") for name in others},
        **{f"vs_{name}_cpu": found.cpu_ratio(name, "ours") for name in others},
        "gflops": found.gflops("ours", flops),
        "of_peak": found.of_peak("ours", flops),
        **memory,
        **profiles(options, {"ours": (ours, calls["ours"])}),
    }
    return row | ({"note": note} if note else {})


def _growth(passes: str, options: Options) -> dict[str, Any]:
    calls: dict[str, Call] = {}
    for length in (LENGTH, LONG):
        arrays = _arrays(length, "float32")
        calls[str(length)] = functools.partial(compiled(_banded, passes, arrays), *arrays)
    found = interleave(calls, rounds=options.rounds)
    return {
        "ours_ms": found.median_ms(str(LENGTH)),
        "ours_long_ms": found.median_ms(str(LONG)),
        "growth": found.ratio(str(LONG), str(LENGTH)),
        "growth_cpu": found.cpu_ratio(str(LONG), str(LENGTH)),
    }


def _dtypes(passes: str, options: Options) -> dict[str, Any]:
    calls: dict[str, Call] = {}
    for dtype in DTYPES:
        arrays = _arrays(LENGTH, dtype)
        calls[dtype] = functools.partial(compiled(_banded, passes, arrays), *arrays)
    found: Rounds = interleave(calls, rounds=options.rounds)
    return {
        "table": "dtypes",
        "name": f"dtypes_{LENGTH}_{passes}",
        **{f"{dtype}_ms": found.median_ms(dtype) for dtype in DTYPES},
        "float32_over_bfloat16": found.ratio(*DTYPES),
        "float32_over_bfloat16_cpu": found.cpu_ratio(*DTYPES),
    }


def _arrays(length: int, dtype: str) -> list[jax.Array]:
    """Query, key, value and the output's cotangent of one row."""
    rng = np.random.default_rng(0)
    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS, QUERY_HEADS)
    shapes = [(1, length, count, HEAD_DIM) for count in heads]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _jax_attention(query_BTNH, key_BTKH, value_BTKH, *, window: int | None) -> jax.Array:
    size = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        query_BTNH, key_BTKH, value_BTKH, is_causal=True, local_window_size=size
    )


def _torch_calls(
    passes: str, arrays: list[jax.Array], window: int | None
) -> tuple[dict[str, Call], str | None]:
    """The peers of torch by name, and why one is missing."""
    torch = peer("torch")
    if torch is None:
        return {}, "torch is not installed (extra peers): its rows are skipped"
    tensors = [
        torch.from_numpy(np.array(a, np.float32)).to(getattr(torch, str(a.dtype))).transpose(1, 2)
        for a in arrays
    ]
    query, key, value, dout = (a.contiguous() for a in tensors)
    if passes == "forward+backward":
        for leaf in (query, key, value):
            leaf.requires_grad_(True)

    def full() -> Any:
        with torch.set_grad_enabled(passes != "forward"):
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )
        return out if passes == "forward" else torch.autograd.grad(out, (query, key, value), dout)

    if passes != "forward":
        return {"torch_full": full}, "torch flex_attention has no backward on CPU"
    return {"torch_full": full, "torch_flex": _torch_flex(torch, query, key, value, window)}, None


def _torch_flex(torch: Any, query: Any, key: Any, value: Any, window: int | None) -> Call:
    flex = peer("torch.nn.attention.flex_attention")
    length = query.shape[2]

    def visible(batch, head, t, s):
        return (t >= s) & (t - s < (window or length))

    mask = flex.create_block_mask(visible, None, None, length, length, device="cpu")
    attention = torch.compile(flex.flex_attention)

    def call() -> Any:
        with torch.no_grad():
            return attention(query, key, value, block_mask=mask, enable_gqa=True)

    return call
