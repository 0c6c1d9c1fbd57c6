"""Runs a tiny training in a process of its own, killed with SIGKILL in the middle of a save.

python tests/train/killed_run.py CORPUS WORKDIR [STEP]
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_jax.checkpoint import Checkpointer
from lightning_jax.train import loop
from tests.tiny import tiny_run

CHANGES = dict(
    checkpoint_every=2,
    model__moe__switch_weight=0.01,
    optimizer__ema_decay=0.9,
    optimizer__name="adamw",
)


def main() -> None:
    corpus, workdir, *kill_at = sys.argv[1:]
    save = Checkpointer.save

    def save_and_die(self, step, *args):
        save(self, step, *args)
        if kill_at and step == int(kill_at[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpointer.save = save_and_die
    loop.run(tiny_run(corpus, **CHANGES), workdir)


if __name__ == "__main__":
    main()
