"""Suite `serve_small`: prefill and decode of the engine on a model of 28 million parameters.

Each row compares two cases that should cost the same: more or fewer experts held at as many used,
more or less room in the cache at the same short prompt, several units or one of the same layers,
bfloat16 or float32. The last rows are the slope of a prefill's cost over its length, and the
compile time of another request.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.measure import Call, Options, interleave
from lightning_jax import model as lm
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling

PROMPT, NEW, ROOM = 8, 24, 512
HYBRID, WINDOW = "LLLGLLLg", 256
LENGTHS = (1024, 2048, 4096, 8192, 16384)
GREEDY = Sampling(temperature=0.0)


def run(options: Options) -> list[dict[str, Any]]:
    """Rows: pairs of decode steps in both dtypes, prefill by length, compilation by request.

    Raises:
      UserError: no config.
    """
    if options.config is None:
        raise UserError("--config is missing: the suite serve_small takes its model")
    base = _model(options.config.model, unit="L", units=8)
    rows = []
    for dtype in ("float32", "bfloat16"):
        model = dataclasses.replace(base, compute_dtype=dtype)
        long = _model(model, unit=HYBRID)
        pairs = {
            "experts 32 over 8": (Case(model, experts=32), Case(model)),
            "room 16384 over 512": (Case(long, room=16384), Case(long)),
            "units LLLG x 2 over LLLGLLLG x 1": (
                Case(_model(model, unit="LLLG", units=2)),
                Case(_model(model, unit="LLLGLLLG")),
            ),
        }
        if dtype == "bfloat16":
            pairs["bfloat16 over float32"] = (Case(long), Case(_model(base, unit=HYBRID)))
        for name, (slow, fast) in pairs.items():
            if options.wants(f"decode {dtype} {name}"):
                rows.append(_pair(f"decode {dtype} {name}", slow, fast, options))
        if options.wants(f"prefill {dtype}"):
            rows += _prefills(f"prefill {dtype} {HYBRID}", Case(long, room=LENGTHS[-1]), options)
    if options.wants("requests"):
        rows += _requests(Case(_model(base, unit=HYBRID)))
    return rows


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the number of tokens that its cache has room for."""

    model: ModelConfig
    experts: int = 8
    room: int = ROOM

    def engine(self) -> Engine:
        """Returns an engine with random weights; two of eight experts are used."""
        moe = dataclasses.replace(self.model.moe, num_experts=self.experts)
        model = dataclasses.replace(self.model, moe=moe)
        params = jax.jit(lambda: lm.init_params(model, jax.random.key(0)))()
        return Engine(model, params, lm.init_router(model), max_length=self.room)


def _model(model: ModelConfig, *, unit: str, units: int = 1) -> ModelConfig:
    attention = dataclasses.replace(model.attention, window=WINDOW)
    return dataclasses.replace(model, unit=unit, num_units=units, attention=attention)


def _decode(engine: Engine) -> Call:
    """A call that decodes `NEW` tokens after a short prompt; the prefill is part of the warm-up."""
    state: dict[str, Any] = {"stream": iter(())}

    def tokens() -> Any:
        for _ in range(NEW):
            if next(state["stream"], None) is None:
                state["stream"] = _stream(engine, [list(range(PROMPT))], ROOM - PROMPT)
                next(state["stream"])

    return tokens


def _stream(engine: Engine, prompts: Sequence[Sequence[int]], new: int) -> Any:
    return engine.stream(prompts, GREEDY, max_new_tokens=new, key=jax.random.key(0))


def _pair(name: str, slow: Case, fast: Case, options: Options) -> dict[str, Any]:
    calls = {"slow": _decode(slow.engine()), "fast": _decode(fast.engine())}
    found = interleave(calls, rounds=options.rounds, warmup=2)
    return {
        "table": "decode, milliseconds per token",
        "name": name,
        "first_ms": found.median_ms("slow") / NEW,
        "second_ms": found.median_ms("fast") / NEW,
        "ratio": found.ratio("slow", "fast"),
        "ratio_cpu": found.cpu_ratio("slow", "fast"),
    }


def _prefills(name: str, case: Case, options: Options) -> list[dict[str, Any]]:
    engine, rng = case.engine(), np.random.default_rng(0)
    prompt = rng.integers(0, case.model.vocab_size, LENGTHS[-1] - 1).tolist()

    def prefill(length: int) -> Call:
        return lambda: next(_stream(engine, [prompt[: length - 1]], 1))

    calls = {str(length): prefill(length) for length in LENGTHS}
    found = interleave(calls, rounds=max(1, options.rounds // 2))
    rows = [
        {
            "table": "prefill",
            "name": f"{name} {length}",
            "ms": found.median_ms(str(length)),
            "tokens_s": 1e3 * length / found.median_ms(str(length)),
        }
        for length in LENGTHS
    ]
    ends = found.ratio(str(LENGTHS[-1]), str(LENGTHS[0]))
    rows[-1]["slope"] = math.log(ends) / math.log(LENGTHS[-1] / LENGTHS[0])
    return rows


def _requests(case: Case) -> list[dict[str, Any]]:
    """Seconds of the first call of each kind of request, and of the same call again."""
    engine = case.engine()
    prompt = list(range(PROMPT))
    kinds = {
        "first": ([prompt], GREEDY),
        "temperature": ([prompt], Sampling(temperature=0.7)),
        "top_p": ([prompt], Sampling(temperature=0.7, top_p=0.9)),
        "prompt length": ([prompt * 3], GREEDY),
        "batch of 3": ([prompt] * 3, GREEDY),
        "batch of 4": ([prompt] * 4, GREEDY),
    }
    rows = []
    for name, (prompts, sampling) in kinds.items():
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            engine.generate(prompts, sampling, max_new_tokens=4, key=jax.random.key(0))
            seconds.append(time.perf_counter() - start)
        rows.append(
            {
                "table": "requests",
                "name": f"requests: another {name}",
                "first_s": seconds[0],
                "again_s": seconds[1],
            }
        )
    return rows
