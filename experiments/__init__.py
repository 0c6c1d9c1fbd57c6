"""The programs; see `runtime.program`."""

import sys

from lightning_jax.runtime import interrupts

# `python -m experiments.x` imports this first, with "-m" for a name.
if sys.argv[0] == "-m":
    interrupts.leave_quietly()
