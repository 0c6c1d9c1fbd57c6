"""Pictures of the router of one run, on its held-out text."""

from __future__ import annotations

from itertools import islice

from matplotlib.figure import Figure

from lightning_jax import plots
from lightning_jax.card.facts import excerpt
from lightning_jax.config.errors import UserError
from lightning_jax.infer.readings import TextRouting
from lightning_jax.infer.run import Run, load_run
from lightning_jax.runtime.files import StrPath

# Held-out documents of a domain whose first tokens, as many as a training row has, are read.
_DOCUMENTS = 8
# Longer tokens are rare: what follows is cut before it is tokenized.
_MOST_CHARACTERS = 16


def router_pictures(workdir: StrPath) -> tuple[dict[str, Figure], str]:
    """Draws how many experts held-out tokens take, and which.

    Returns:
      (figures, HTML). The figures by name: `experts_by_layer`, `experts_by_domain`,
      `experts_by_position` and `expert_load`. The HTML is a piece of the first domain, each token
      coloured by its number of experts. Both are empty for a model without experts.

    Raises:
      UserError: no checkpoint, a damaged one, no held-out text, or text that is not where the
        config says.
    """
    run = load_run(workdir)
    if not run.model.moe.num_experts:
        return {}, ""
    names = run.config.data.source_names
    texts = {name: list(islice(run.held_out(name), _DOCUMENTS)) for name in names}
    texts = {name: found for name, found in texts.items() if any(found)}
    if not texts:
        raise UserError(f"{workdir}: its sources hold out no text to read")
    routings = {
        name: [run.routing(_beginning(run, text)) for text in found if text]
        for name, found in texts.items()
    }
    everything = [routing for of_one in routings.values() for routing in of_one]
    figures = {
        "experts_by_layer": plots.expert_counts(everything),
        "experts_by_domain": plots.experts_by_domain(routings),
        "experts_by_position": plots.experts_by_position(routings),
        "expert_load": plots.expert_load(TextRouting.joined(everything)),
    }
    sample = excerpt(run, next(iter(texts.values())))
    return figures, plots.experts_in_text(run.routing(sample))


def _beginning(run: Run, text: str) -> str:
    """As much of a text as a row holds that the run was trained on."""
    limit = run.loaded.meta.seq_len
    text = text[: limit * _MOST_CHARACTERS]
    while len(text) > 1 and (tokens := len(run.encode(text))) > limit:
        text = text[: max(1, len(text) * limit // tokens)]
    return text
