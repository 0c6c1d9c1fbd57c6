"""Every test sees eight emulated CPU devices, and rank promotion is an error."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Nearly all of the suite's time is compilation. Programs that run in processes of their own (the
# examples, the kill and resume test) are compiled as users have them.
jax.config.update("jax_disable_most_optimizations", True)
