"""Train, evaluate and sample a complete small Lightning model (`make quickstart`).

    python -m experiments.quickstart [--config=configs/quickstart.py] [--workdir=runs/quickstart]

Ends with held-out bits per byte next to gzip and xz on the same bytes, a sample, and this model
against its dense full-attention predecessor. Call it again to see the tables: it resumes.
"""

from absl import flags

from lightning_jax.runtime import program

_CONFIG = program.define_config("configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the run.")
_CHANGED = flags.DEFINE_bool(
    "allow_changed_data", False, "Resume although the text is not what the run began with."
)


def main() -> None:
    config = program.load_config(_CONFIG.value)
    from lightning_jax import accounting
    from lightning_jax.data.compression import compression_rows
    from lightning_jax.data.sources import Sources
    from lightning_jax.infer.text import sample
    from lightning_jax.runtime import tables
    from lightning_jax.train import loop

    samples = []

    def remember(*args) -> str:
        samples.append(sample(*args))
        return samples[-1]

    results = loop.run(config, _WORKDIR.value, sampler=remember, allow_changed_data=_CHANGED.value)
    model = {name: row["bits_per_byte"] for name, row in results.items()}
    used = next(iter(results.values())).get("experts_per_token")
    program.emit_text(f"\nA sample, from {config.sample_prompt!r}:\n\n{samples[-1]}\n")
    tables.print_table(
        compression_rows(Sources.open(config.data), {"this model": model}),
        "Held-out text, bits per byte (less is better)",
    )
    tables.print_table(
        accounting.comparison_rows(config.model, used), "This model against the predecessor shape"
    )
    program.emit_text(
        f"Next: tensorboard --logdir={_WORKDIR.value}, configs/small.py, notebooks/01_tour.ipynb"
    )


if __name__ == "__main__":
    program.run(main)
