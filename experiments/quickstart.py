"""Train, evaluate and sample a complete small Lightning model (`make quickstart`).

    python -m experiments.quickstart [--config=configs/quickstart.py] [--workdir=runs/quickstart]

Ends with a sample, held-out bits per byte next to gzip and xz on the same bytes, this model against
its dense full-attention predecessor, and the card of the run, WORKDIR/card.html. Call it again to
see the tables: it resumes.
"""

from absl import flags

from lightning_jax.runtime import files, program

_CONFIG = program.define_config("configs/quickstart.py")
_WORKDIR = flags.DEFINE_string("workdir", "runs/quickstart", "Folder of the run.")
_CHANGED = flags.DEFINE_bool(
    "allow_changed_data", False, "Resume although the text is not what the run began with."
)


def main() -> None:
    config, workdir = program.load_config(_CONFIG.value), _WORKDIR.value
    files.check_output_folder("workdir", workdir)
    with program.loading():
        from configs import base
        from lightning_jax import card
        from lightning_jax.config import RunConfig, build
        from lightning_jax.infer.sampling import Sampling
        from lightning_jax.infer.text import sample
        from lightning_jax.train import loop

    samples = []

    def sampler(*args) -> str:
        # Below the temperature of a larger model, of which more tokens are right.
        samples.append(sample(*args, sampling=Sampling(temperature=0.6, top_p=0.9)))
        return samples[-1]

    loop.run(
        config, workdir, sampler=sampler, allow_changed_data=_CHANGED.value, keep_compiled=True
    )
    for text in samples[-1:]:
        program.emit_text(f"\nA sample, from {config.sample_prompt!r}:\n\n{text}\n")
    start = build(RunConfig, base.get_config())
    facts = card.read(workdir, base=start, sample=samples[-1] if samples else None)
    card.print_tables(facts)
    card.write(facts)
    program.emit_text(card.last_words(facts))


if __name__ == "__main__":
    program.run(main)
