"""Train every arm of a sweep with every seed; the same command goes on where it was stopped.

    python -m experiments.sweep --sweep=configs/sweeps/pattern.py --workdir=runs/pattern
        [--jobs=2] [--only=LLLG_w16,G] [--seeds=0,1] [--config.model.model_dim=64]

The folder gets sweep.json, a run's folder in <arm>/seed_<n>, results.jsonl and results.csv.
`{"finished": rows, "failed": {run: error}}` is printed as JSON on stdout. A run that fails does not
stop the others; the exit status is 2 at the end. Read the result with `experiments.report`.
"""

from absl import flags

from lightning_jax.runtime import program

_SWEEP = flags.DEFINE_string("sweep", None, "Sweep file, from configs/sweeps.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.", required=True)
_ONLY = flags.DEFINE_list("only", None, "Arms to run; all by default.")
_SEEDS = flags.DEFINE_list("seeds", None, "Seeds to run; all by default.")
_JOBS = flags.DEFINE_integer("jobs", 1, "Runs at once; they divide the cores among them.")
_PLAN = flags.DEFINE_bool("plan", None, "Print what the sweep will take, and train nothing.")
_PREPARE = flags.DEFINE_bool("prepare", None, "Train what runs depend on, and no run.")
_TASK = flags.DEFINE_integer("task", None, "Train one run, by its number, for any scheduler.")
_SUBMIT = flags.DEFINE_string("submit", None, "Hand the runs to slurm, or to local processes.")
_EXECUTOR = flags.DEFINE_list(
    "executor", [], "Of --submit: timeout_min=60,slurm_partition=cpu and what submitit has."
)
_CHANGED = flags.DEFINE_bool(
    "allow_changed_data", False, "Resume runs although the text is not what they began with."
)
_CHANGES = program.define_changes()
flags.mark_flags_as_mutual_exclusive(["plan", "prepare", "task", "submit"])


def main() -> None:
    only, seeds = program.names(_ONLY), program.numbers(_SEEDS)
    with program.loading():
        from lightning_jax.ablation import main as ablation

    ablation.run(
        ablation.Call(
            sweep=_SWEEP.value,
            workdir=_WORKDIR.value,
            changes=_CHANGES(),
            only=only,
            seeds=seeds,
            jobs=_JOBS.value,
            plan=bool(_PLAN.value),
            prepare=bool(_PREPARE.value),
            task=_TASK.value,
            submit=_SUBMIT.value,
            executor=_EXECUTOR.value,
            allow_changed_data=_CHANGED.value,
        )
    )


if __name__ == "__main__":
    program.run(main)
