"""Trains as one of several processes, or alone; `fault` is what goes wrong in this process.

python tests/train/one_of_several.py CORPUS WORKDIR PORT COUNT INDEX [FAULT [CHANGE=VALUE]]
"""

import ast
import dataclasses
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lightning_jax.config.errors import UserError
from lightning_jax.data import mixture
from lightning_jax.runtime import processes, program
from lightning_jax.train import loop, placement
from tests.tiny import tiny_run

# Shorter than that of runs, so that a test of it is short.
HEARTBEAT_SECONDS = 6


class PanicException(BaseException):
    """As pyo3 derives it."""


def make_fault(fault: str) -> None:
    if fault.startswith("panic"):
        number, encode = int(fault.removeprefix("panic")), mixture.document_tokens
        seen = []

        def document_tokens(text, tokenizer):
            seen.append(text)
            if len(seen) == number:
                raise PanicException("unwrap on None")
            return encode(text, tokenizer)

        mixture.document_tokens = document_tokens
    elif fault == "poison":
        put, batches = placement.put_batch, []

        def put_batch(batch, mesh):
            batches.append(batch)
            if len(batches) == 3:
                batch = batch._replace(loss_mask=batch.loss_mask * float("nan"))
            return put(batch, mesh)

        placement.put_batch = put_batch
    elif fault == "hang":
        mixture.document_tokens = lambda text, tokenizer: time.sleep(1000)
    elif fault.startswith(("SIGKILL", "SIGTERM")):
        name, number = fault[:7], int(fault[7:])
        steps, taken = placement.put_batch, []

        def put_batch(*args):
            taken.append(args)
            if len(taken) == number:
                os.kill(os.getpid(), signal.Signals[name])
            return steps(*args)

        placement.put_batch = put_batch
    elif fault == "slow":
        steps = placement.put_batch
        placement.put_batch = lambda *args: time.sleep(0.3) or steps(*args)
    elif fault == "refused":

        def refuse(*_args, **_kwargs):
            raise UserError("corpus: is not on this host")

        loop.look = refuse


def main() -> None:
    corpus, workdir, port, count, index, fault, *changes = sys.argv[1:]
    processes._HEARTBEAT_SECONDS = HEARTBEAT_SECONDS
    processes.start(count != "1", *_cluster(port, int(count), int(index)))
    make_fault(fault)
    values = dict(change.split("=", 1) for change in changes)
    values = {name: ast.literal_eval(value) for name, value in values.items()}
    if fault == "seed":
        values["seed"] = 7
    sys.argv[1:] = []
    config = tiny_run(corpus, **values)
    wide = tuple(dataclasses.replace(s, batch_size=8, tokens=2 * s.tokens) for s in config.stages)
    config = dataclasses.replace(config, stages=wide)
    program.run(lambda: loop.run(config, workdir), huge_pages=False)


def _cluster(port: str, count: int, index: int) -> tuple[str | None, int | None, int | None]:
    return (f"127.0.0.1:{port}", count, index) if count > 1 else (None, None, None)


if __name__ == "__main__":
    main()
