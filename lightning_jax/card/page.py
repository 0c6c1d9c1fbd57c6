"""The page of a card: pictures and text of `Facts`, in one file."""

from __future__ import annotations

import datetime
import html
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_jax import accounting, pages, plots
from lightning_jax.accounting import count_text
from lightning_jax.card.facts import Facts
from lightning_jax.config import ModelConfig
from lightning_jax.data.compression import comparison_rows
from lightning_jax.runtime import invocation, tables
from lightning_jax.runtime.files import write_file

NAME = "card.html"
# Inches: narrow, so that the letters of a picture can be read on a phone.
_WIDTH = 6.0
_STYLE = """
body { max-width: 46rem; } .lead { font-size: 1.15rem; }
dt { margin-top: .6rem; } dd { margin: 0; } pre { margin: .3rem 0; font-size: .85rem; }
td.wrap { white-space: normal; text-align: left; overflow-wrap: anywhere; }
"""


def write(facts: Facts) -> Path:
    """Writes `card.html` into the run's folder and returns its path. UserError: disk."""
    path = Path(facts.workdir) / NAME
    write_file(path, build(facts))
    return path


def print_tables(facts: Facts) -> None:
    """Prints, on standard error, the held-out text beside compressors, and what is saved."""
    tables.print_table(comparison_rows(facts.held_out), "Bits per byte (less is better)")
    tables.print_table(_saved(facts), "This model against the predecessor shape")


def last_words(facts: Facts) -> str:
    """Returns what a program says at the end: how the run compares, its card, what to try next."""
    lines = [str(text) for text in facts.held_out]
    lines += [f"The card of this run: {Path(facts.workdir) / NAME}", "", "Next:"]
    return "\n".join([*lines, *(f"  {why}: {command}" for why, command in next_steps(facts))])


def build(facts: Facts) -> str:
    """Returns the page."""
    lead = in_a_sentence(facts.run.model, facts.experts_per_token)
    parts = [
        f'<p class="lead">{html.escape(lead)}</p>',
        *_held_out(facts),
        *_layers(facts),
        *_loss(facts),
        *_savings(facts),
        *_experts(facts),
        *_sample(facts),
        *_cost(facts),
        *_origin(facts),
        *_next(facts),
    ]
    return pages.document(f"Card of {facts.workdir}", "\n".join(parts), _STYLE)


def in_a_sentence(model: ModelConfig, experts_per_token: float | None) -> str:
    """Says what a model is: size, layers, experts."""
    size = accounting.parameters(model, experts_per_token)
    specs = model.layers
    sliding = sum(spec.is_local for spec in specs)
    borrowing = sum(not spec.owns_kv for spec in specs)
    words = [
        f"A decoder of {count_text(size.total)} parameters, {count_text(size.active)} of them used "
        f"per token: {len(specs)} layers ({model.prefix}{model.unit}"
        f"{f', {model.num_units} times' if model.num_units > 1 else ''}), of which {sliding} see a "
        f"sliding window of {model.attention.window:,} tokens and {borrowing} borrow keys and "
        "values from an earlier layer"
    ]
    if held := model.moe.num_experts:
        used = accounting.nominal_experts(model.moe, training=False)
        used = used if experts_per_token is None else experts_per_token
        words.append(f"{held} experts in each routed layer, {used:.2f} of them used per token")
    return "; ".join(words) + "."


def _held_out(facts: Facts) -> list[str]:
    lines = [f"{text}." for text in facts.held_out if text.model is not None]
    lines = lines or ["The run has no evaluation yet."]
    note = "Fewer bits are better."
    for text in facts.held_out:
        judged = facts.evaluation.get(text.domain, {}).get("bytes", text.num_bytes)
        if judged != text.num_bytes:
            note += f" Of {text.domain} the model is judged on the first {judged:,} bytes."
    return [
        "<h2>Held-out text, bits per byte</h2>",
        *[f"<p>{html.escape(line)}</p>" for line in lines],
        pages.table(comparison_rows(facts.held_out)),
        f"<p>{html.escape(note)}</p>",
    ]


def _layers(facts: Facts) -> list[str]:
    picture = _png(plots.layers(facts.run.model))
    return ["<h2>Layers</h2>", pages.picture(picture, "Which keys each layer sees, and whose")]


def _loss(facts: Facts) -> list[str]:
    if not any("loss" in row for row in facts.rows):
        return []
    figure = plots.loss(facts.rows, facts.evaluation)
    return ["<h2>Training</h2>", pages.picture(_png(figure), "Loss over tokens, by stage")]


def _savings(facts: Facts) -> list[str]:
    return [
        "<h2>What the mechanisms save</h2>",
        "<p>Against its predecessor: the same depth, width and heads, every layer with full "
        "attention and keys and values of its own, a dense MLP of the size that a token uses "
        "here.</p>",
        pages.table(_saved(facts)),
    ]


def _saved(facts: Facts) -> list[list[str]]:
    return accounting.comparison_rows(facts.run.model, facts.experts_per_token)


def _experts(facts: Facts) -> list[str]:
    if facts.routing is None:
        return []
    return [
        "<h2>Experts per token</h2>",
        "<p>A piece of held-out text. The darker a token, the more experts it took, mean over "
        "layers.</p>",
        plots.experts_in_text(facts.routing),
    ]


def _sample(facts: Facts) -> list[str]:
    prompt = facts.run.config.sample_prompt
    return [
        "<h2>A sample</h2>",
        f"<p>By the model, after {html.escape(repr(prompt))}:</p>",
        pages.listing(facts.sample),
    ]


def _cost(facts: Facts) -> list[str]:
    speed, seconds = facts.pace
    rows = [
        ["", "training"],
        ["tokens", f"{facts.tokens:,}"],
        ["steps", f"{facts.run.step:,}"],
        ["minutes", f"{seconds / 60:.1f}"],
        ["tokens per second", "-" if speed is None else f"{speed:,.0f}"],
        ["FLOPs of the model", count_text(facts.training_flops)],
    ]
    return ["<h2>Cost</h2>", pages.table(rows)]


def _origin(facts: Facts) -> list[str]:
    rows = [("text", _text(name, row)) for name, row in facts.record.known_data().items()]
    for session in facts.record.sessions[-1:]:
        versions = {"python": session.get("python", "?"), **session["versions"]}
        rows += [
            ("command", invocation.recorded(session["command"])),
            ("begun", session.get("time", "?")),
            ("commit", session["git_commit"] or session.get("git_commit_unknown", "?")),
            ("versions", ", ".join(" ".join(pair) for pair in versions.items())),
        ]
    today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    rows.append(("card made", f"{today}, from checkpoint {facts.run.step}"))
    lines = [
        "<h2>Where it comes from</h2>",
        "<table>",
        *[f"<tr><td>{html.escape(k)}</td>{_wrapped(v)}</tr>" for k, v in rows],
        "</table>",
    ]
    if facts.changed:
        lines += [
            "<h2>Config</h2>",
            "<p>What differs from configs/base.py; config.json has every field.</p>",
            "<table><tr><th>field</th><th>base</th><th>here</th></tr>",
            *[
                f"<tr><td>{html.escape(field)}</td>{_wrapped(_json(old))}{_wrapped(_json(new))}</tr>"
                for field, old, new in facts.changed
            ],
            "</table>",
        ]
    return lines


def _text(name: str, row: Any) -> str:
    return (
        f"{name}: {row.get('documents', 0):,} documents, {row.get('bytes', 0):,} bytes; held out "
        f"{row.get('eval_documents', 0):,}, {row.get('eval_bytes', 0):,} bytes; sha256 "
        f"{row['fingerprint'][:16]}"
    )


def _json(value: Any) -> str:
    return "-" if value is None else json.dumps(value, ensure_ascii=False)


def _wrapped(text: str) -> str:
    return f'<td class="wrap">{html.escape(text)}</td>'


def next_steps(facts: Facts) -> list[tuple[str, str]]:
    """Returns what to try next: the reason and the shell command."""
    run, model = f"--workdir={facts.workdir}", facts.run.model
    prompt = f"--prompt={facts.run.config.sample_prompt}"
    steps = [("More text", invocation.command("generate", run, prompt, "--temperature=0.6"))]
    if model.moe.num_experts and model.moe.eval_routing == "top_p":
        fewer = invocation.command("evaluate", run, "--eval.top_p=0.3")
        steps.append(("The same weights with fewer experts per token", fewer))
    return [
        *steps,
        ("The curves of the run", invocation.tool("tensorboard", f"--logdir={facts.workdir}")),
        (
            "A larger model, half an hour to an hour on two cores",
            invocation.command("train", "--config=configs/small.py", "--workdir=runs/small"),
        ),
        (
            "The dense predecessor on the same text",
            invocation.command(
                "train", "--config=configs/predecessor.py", "--workdir=runs/predecessor"
            ),
        ),
        (
            "Which layer pattern is best, with several seeds",
            invocation.command(
                "sweep", "--sweep=configs/sweeps/pattern.py", "--workdir=runs/pattern"
            ),
        ),
    ]


def _next(facts: Facts) -> list[str]:
    items = [
        f"<dt>{html.escape(why)}</dt><dd>{pages.listing(command)}</dd>"
        for why, command in next_steps(facts)
    ]
    return ["<h2>What to try next</h2>", "<dl>", *items, "</dl>"]


def _png(figure: Figure) -> bytes:
    height = figure.get_figheight() * max(1.0, _WIDTH / figure.get_figwidth())
    figure.set_size_inches(_WIDTH, height)
    return plots.png(figure, dpi=150)
