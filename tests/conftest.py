"""Every test sees eight emulated CPU devices, and rank promotion is an error."""

import gc
import os
import sys
import time
from importlib import metadata
from pathlib import Path

# Faster to compile, slower to run. An XLA that does not know a flag ends the process.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
FLAGS = (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    QUICK if metadata.version("jaxlib").startswith("0.10.") else "",
)
os.environ["XLA_FLAGS"] = " ".join(FLAGS).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Nearly all of the suite's time is compilation, and tests share programs: among themselves, with
# the processes they start and with the last sessions (`pytest --cache-clear` forgets them).
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# As in an activated environment: the commands of messages name its tools without a path.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
# What the data tests index is no concern of the user's own cache.
USER_CACHE = CACHE.with_name("user")
os.environ["XDG_CACHE_HOME"] = str(USER_CACHE)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

from lightning_jax import sharding  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# Programs that run in processes of their own (the examples, the kill and resume test) are compiled
# as users have them.
jax.config.update("jax_disable_most_optimizations", True)


# Tracing makes many objects and little garbage.
gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def compile_afresh():
    """For programs on several devices, which `compiler.cache_in` says not to load from a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def one_device(monkeypatch):
    """Runs take one device: eight emulated ones would only make them slower."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        sharding, "make_mesh", lambda config, devices=None: make_mesh(config, jax.devices()[:1])
    )


def pytest_sessionstart():
    """Drops what no session of the last week has read: compiled programs, indexes of data."""
    week_ago = time.time() - 7 * 24 * 3600
    for file in [*CACHE.glob("*"), *USER_CACHE.rglob("*")]:
        if file.is_file() and file.stat().st_atime < week_ago:
            file.unlink(missing_ok=True)
