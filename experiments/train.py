"""Train a run, or resume it from the last checkpoint in its folder.

    python -m experiments.train --config=configs/small.py --workdir=runs/a [--config.seed=1]

The folder holds checkpoints, metrics.jsonl, tensorboard/, config.json, run.json and, at the end,
evaluation.json. The last evaluation is printed as JSON on stdout; progress goes to stderr.
"""

from absl import flags

from lightning_jax.runtime import program

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_PROFILE = flags.DEFINE_bool("profile", False, "Record a trace of three steps in WORKDIR/profile.")
_CHANGED = flags.DEFINE_bool(
    "allow_changed_data", False, "Resume although the text is not what the run began with."
)
_WRITERS = flags.DEFINE_list(
    "writers", ["tensorboard"], "Takers of curves: any of tensorboard, wandb, trackio."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One process of several, which all see the same WORKDIR. TPU pod slices, Slurm, Open MPI and "
    "Kubernetes tell a process what the next flags say; elsewhere give all three.",
)
_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT where process 0 listens, the same for all processes."
)
_COUNT = flags.DEFINE_integer("num_processes", None, "Number of processes.")
_INDEX = flags.DEFINE_integer("process_id", None, "Which of them this is; 0 writes and prints.")


def main() -> None:
    config = program.load_config(_CONFIG.value)
    with program.loading():
        from lightning_jax.infer.text import sample
        from lightning_jax.runtime import processes
        from lightning_jax.train import loop

    processes.start(_DISTRIBUTED.value, _ADDRESS.value, _COUNT.value, _INDEX.value)
    results = loop.run(
        config,
        _WORKDIR.value,
        sampler=sample,
        profile=_PROFILE.value,
        writers=_WRITERS.value,
        allow_changed_data=_CHANGED.value,
        keep_compiled=True,
    )
    if processes.is_writer():
        program.emit_json(results)


if __name__ == "__main__":
    program.run(main)
