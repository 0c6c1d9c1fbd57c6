"""The one place that decides, and explains, how programs are compiled on a machine.

Every `jax.jit` of a model takes `options()`, or is `jit`; every program calls `cache_in` with the
folder that it writes, or `cache_for_user`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

from lightning_jax.runtime import target
from lightning_jax.runtime.files import user_folder
from lightning_jax.runtime.target import Target

_config: Any = jax.config  # Its attributes are not declared.
# Programs that compile faster are not worth a file.
_CACHED_FROM_SECONDS = 0.2
# Of the user's cache, which no deleted run takes with it; the least recently read go first.
_MOST_BYTES_OF_USER = 2 * 2**30


def options() -> dict[str, str | int | bool]:
    """Returns `compiler_options` of a top-level `jax.jit` for the current target.

    On CPU, XLA widens bfloat16 matmul operands to float32 and hoists the conversion of
    loop-invariant operands: a decode step that reads 4 of 32 experts converts all 32. Without
    `while-loop-invariant-code-motion` it converts only those it reads.

    Most time goes to library matmuls and to loops that LLVM vectorises at level 1 already: higher
    levels compile 20% slower and speed up nothing.

    On TPU, operations of equal code are compiled to calls of one copy of it, for the layers of a
    unit repeat them: a train step has a third to a quarter of the program. Exchanges of tokens
    between experts have a start and an end, so that other work can run between these; without the
    flags everything waits for them (libtpu 0.0.42).
    """
    platform = target.current().platform
    if platform == "tpu":
        return {
            "xla_tpu_enable_deduplicated_calls": True,
            "xla_tpu_enable_async_all_to_all": True,
            "xla_tpu_enable_async_ragged_all_to_all": True,
        }
    if platform != "cpu":
        return {}
    return {
        "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
        "xla_backend_optimization_level": 1,
    }


class jit:
    """`jax.jit` for functions of a module, with the `options()` of each target it is called for.

    Options read at import would choose the backend before the program can. Attributes are those of
    the function jitted for the current target.
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

    Does nothing on a CPU that emulates several devices: a program that XLA loads from a file
    (jaxlib 0.10.2) has lost the order of its collectives, and devices that start with different
    ones wait for each other for ever.

    Call this before anything is compiled: in a program, not in a library.
    """
    emulated = jax.default_backend() == "cpu" and jax.device_count() > 1
    if not emulated and not _config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _CACHED_FROM_SECONDS)


def cache_for_user() -> None:
    """Keeps compiled programs in the user's cache folder, as `cache_in` does, up to 2 GiB.

    For programs that write no folder of a run. Does nothing where that folder cannot be written.
    """
    home = user_folder()
    if home is None or _config.jax_compilation_cache_dir:
        return
    folder = home / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        cache_in(folder)
        jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES_OF_USER)
