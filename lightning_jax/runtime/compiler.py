"""How programs are compiled and run on a machine, and why: the one place for it.

Every `jax.jit` of a model takes `options()`, or is `jit`; every program that has a folder calls
`cache_in`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from lightning_jax.runtime import target
from lightning_jax.runtime.target import Target

# Programs that take less to compile are not worth a file.
_CACHED_FROM_SECONDS = 0.2


def options() -> dict[str, str | int]:
    """What to pass to a top-level `jax.jit(..., compiler_options=...)` for the current target.

    On a CPU, XLA computes a bfloat16 product of a loop in float32 and then moves the conversion of
    what the loop does not change, such as the weights of *all* experts, out of the loop: a decode
    step that reads 4 experts of 32 converts them all, every time. Without
    `while-loop-invariant-code-motion` it converts what it reads.

    Our time goes to library products and to loops that LLVM vectorises at its first level already:
    higher levels take a fifth longer to compile and make nothing faster.
    """
    if target.current().platform != "cpu":
        return {}
    return {
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
        "xla_backend_optimization_level": 1,
    }


class jit:
    """`jax.jit` with `options()` for a function of a module, asked for at each new target.

    Asked for at import, they would choose the backend before the program can. Has the attributes
    of the function jitted for the current target.
    """

    def __init__(self, function: Callable[..., Any], **arguments: Any):
        self._function, self._arguments = function, arguments
        self._by_target: dict[Target, Any] = {}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._jitted(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._jitted, name)

    @property
    def _jitted(self) -> Any:
        now = target.current()
        if now not in self._by_target:
            self._by_target[now] = jax.jit(
                self._function, compiler_options=options(), **self._arguments
            )
        return self._by_target[now]


def cache_in(folder: str | os.PathLike[str]) -> None:
    """Keeps compiled programs in `folder`, for the next process, unless jax has a cache already.

    Not on a CPU that plays several devices: a program that XLA loads (jaxlib 0.10.2) has lost the
    order of its collectives, and two devices that start with different ones wait for each other.

    Call it before anything is compiled: in a program, not in a library.
    """
    emulated = jax.default_backend() == "cpu" and jax.device_count() > 1
    if not emulated and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_FROM_SECONDS)
