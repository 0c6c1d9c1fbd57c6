"""Timing on a shared machine: interleaved rounds, medians, and ratios within a round.

Variants are interleaved: each round runs all of them once, so background load hits them alike, and
two variants are compared by the median over rounds of their ratio. A matrix product takes part in
the rounds of rows that report their share of the machine's peak at that moment. Processor time of
all threads is kept next to elapsed time: on a busy machine it moves far less, and the two together
tell a slow program from one that had to wait.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from lightning_jax.config import RunConfig

logger = logging.getLogger(__name__)

Call = Callable[[], Any]

# A sample is the mean over as many calls as fill this time: clocks and dispatch are no part of it.
MIN_SECONDS = 0.02
PROBE = "matmul"
_PROBE_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of every suite.

    Attributes:
      rounds: times that each variant of a row is measured.
      only: rows whose name holds one of these strings; empty: all.
      config: the run that the suites `train` and `startup` time.
      profile: of `attention`, `moe` and `train`: also trace a call of our code, once it is timed.
      asked: names of all rows that the suite could measure, as it asks for them.
    """

    rounds: int = 5
    only: tuple[str, ...] = ()
    config: RunConfig | None = None
    profile: bool = False
    asked: set[str] = dataclasses.field(default_factory=set, compare=False)

    def wants(self, name: str) -> bool:
        """True if the row `name` was asked for."""
        self.asked.add(name)
        return not self.only or any(part in name for part in self.only)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Seconds per call of each variant, one number per round.

    `cpu_seconds` is processor time; `probe_flops` are those of the matrix product `PROBE`, 0 if
    none took part.
    """

    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    probe_flops: float = 0.0

    def median_ms(self, name: str) -> float:
        """Median over rounds, milliseconds."""
        return 1e3 * statistics.median(self.seconds[name])

    def cpu_ms(self, name: str) -> float:
        """Median over rounds of the processor time of all threads, milliseconds."""
        return 1e3 * statistics.median(self.cpu_seconds[name])

    def ratio(self, slow: str, fast: str) -> float:
        """How many times faster `fast` is than `slow`: median over rounds of the quotient."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=True)
        return statistics.median(a / b for a, b in pairs)

    def cpu_ratio(self, slow: str, fast: str) -> float:
        """The same of processor time."""
        return self.cpu_ms(slow) / self.cpu_ms(fast)

    def gflops(self, name: str, flops: float) -> float:
        """GFLOP/s of a variant that does `flops` floating point operations per call."""
        return flops / self.median_ms(name) / 1e6

    def of_peak(self, name: str, flops: float) -> float:
        """Fraction of the speed at which the matrix product ran in the same rounds."""
        if not self.probe_flops:
            raise ValueError("no matrix product took part: interleave(..., probe=dtype)")
        return self.ratio(PROBE, name) * flops / self.probe_flops


def interleave(
    variants: Mapping[str, Call],
    *,
    rounds: int = 5,
    warmup: int = 1,
    min_seconds: float = MIN_SECONDS,
    probe: Any = None,
) -> Rounds:
    """Measures all variants in turn, `rounds` times.

    Args:
      variants: by name, a call that returns its result (jax arrays are waited for; other results
        must be ready when the call returns). It is called `warmup` times before the first round,
        so that nothing is compiled in a round.
      rounds: samples per variant.
      warmup: calls before the first round, at least 1.
      min_seconds: a sample is the mean over as many calls as last this long.
      probe: dtype of a square matrix product that takes part as `PROBE`; None: no product.

    Raises:
      ValueError: no variant, `rounds` or `warmup` below 1.
    """
    if not variants or rounds < 1 or warmup < 1:
        raise ValueError(f"{len(variants)} variants, rounds={rounds}, warmup={warmup}: at least 1")
    calls, probe_flops = dict(variants), 0.0
    if probe is not None:
        calls[PROBE], probe_flops = matmul(probe)
    repeats = {}
    for name, call in calls.items():
        first, *again = (_timed(call, 1)[0] for _ in range(warmup))
        fastest = min([first, *again])
        if fastest < min_seconds:
            # Short calls are slowest at first; long ones are not worth another.
            fastest = _timed(call, 1)[0]
        repeats[name] = max(1, math.ceil(min_seconds / max(fastest, 1e-7)))
    found = Rounds({name: [] for name in calls}, {name: [] for name in calls}, probe_flops)
    order = list(calls)
    for index in range(rounds):
        # Each round starts with another variant: none always runs after the same neighbour.
        first = index % len(order)
        for name in order[first:] + order[:first]:
            elapsed, processor = _timed(calls[name], repeats[name])
            found.seconds[name].append(elapsed)
            found.cpu_seconds[name].append(processor)
    logger.info("%s", "  ".join(f"{name} {found.median_ms(name):.4g} ms" for name in calls))
    return found


def compiled(
    function: Callable[..., Any],
    passes: str,
    arrays: Sequence[jax.Array],
    compiler_options: Mapping[str, Any] | None = None,
) -> Any:
    """Compiles a function, or it and its gradients, for some arrays.

    Args:
      function: of arrays.
      passes: "forward" or "forward+backward".
      arrays: its arguments, such as query, key and value, and the cotangent of its result.
      compiler_options: for XLA.
    """

    def both(*arguments_and_cotangent):
        *arguments, cotangent = arguments_and_cotangent
        out, pull = jax.vjp(function, *arguments)
        return out, pull(cotangent)

    def forward(*arguments_and_cotangent):
        return function(*arguments_and_cotangent[:-1])

    program = jax.jit(forward if passes == "forward" else both, compiler_options=compiler_options)
    return program.lower(*arrays).compile()


def _timed(call: Call, repeats: int) -> tuple[float, float]:
    """Elapsed and processor seconds per call."""
    start, processor = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(call())
    elapsed = time.perf_counter() - start
    return elapsed / repeats, (time.process_time() - processor) / repeats


def matmul(dtype: Any, size: int = _PROBE_SIZE) -> tuple[Call, float]:
    """A square product of `dtype` that accumulates in float32, and its FLOPs."""
    operand = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32))
    return lambda: product(operand), 2.0 * size**3


def peer(name: str) -> ModuleType | None:
    """The module of an optional peer (extra `peers`), None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != name.split(".")[0]:
            raise
        return None


def temp_mb(program: Any) -> float | None:
    """Temporary memory of a compiled jax program in MB (10^6 bytes); None if it does not say."""
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes / 1e6
