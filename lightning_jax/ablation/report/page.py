"""The page of a sweep's report: one file, the answer first."""

from __future__ import annotations

import datetime
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_jax import pages
from lightning_jax.ablation.report import cells, figures, recall_scores
from lightning_jax.ablation.report.pictures import Picture
from lightning_jax.runtime import shipped

_STYLE = """
body { max-width: 60rem; } .lead { font-size: 1.15rem; } h2 { margin-top: 2.2rem; }
table { margin: .8rem 0; } ul.answers { padding-left: 1.1rem; } ul.answers li { margin: .35rem 0; }
.box { border-left: .3rem solid #C04A00; background: #FBF1EA; padding: .5rem .9rem; }
table.left td, table.left th { text-align: left; }
table.cards td { white-space: normal; } td.any { white-space: normal; overflow-wrap: anywhere; }
.grey { color: #999; } .note { color: #555; font-size: .9rem; }
figure { margin: 1rem 0; } figure img { width: 100%; max-width: 38rem; }
figcaption { color: #555; font-size: .9rem; max-width: 38rem; }
figcaption code { font-size: .8rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr));
  gap: 0 1.5rem; }
td.verdict { font-weight: bold; }
@media (max-width: 40rem) {
  h1 { font-size: 1.5rem; }
  table.cards, .cards tbody, .cards tr { display: block; } .cards th { display: none; }
  .cards tr { border-bottom: 1px solid #ccc; padding: .3rem 0; }
  .cards tr:first-child { display: none; }
  .cards td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0; }
  .cards td:first-child { font-weight: bold; }
  .cards td:not(:first-child)::before { content: attr(data-name); color: #555; }
}
@media print { figure, tr { break-inside: avoid; } .pair { grid-template-columns: 1fr 1fr; } }
""" + "\n".join(f".{word} {{ color: {color}; }}" for word, color in figures.VERDICTS.items())
_TRADES = (
    "Quality against cost: bars are the intervals of the verdicts, grey is the margin, and the "
    "dotted line joins the arms that no other arm beats in both, by their means."
)


def build(
    report: Mapping[str, Any], pictures: Sequence[Picture], routers: Mapping[str, str]
) -> str:
    """Returns the page.

    Args:
      report: result of `summary.summarize`, and `command`, which makes the page.
      pictures: all that there are.
      routers: HTML by arm, below the pictures of its router.
    """
    shown: dict[str, list[Picture]] = {}
    for picture in pictures:
        shown.setdefault(picture.section, []).append(picture)
    command = report["command"]
    parts = [
        *_answer(report),
        _table(cells.quality_rows(report), verdicts=True),
        *_figures(shown.get("quality", []), command),
        *_section("Caveats", _notes(report)),
        *_method(report),
        *_costs(report, shown.get("cost", [])),
        *_gain(report, shown.get("gain", [])),
        *_section("Learning curves", _figures(shown.get("learning", []), command)),
        *_domains(report),
        *_recall(report, shown.get("recall", [])),
        *_inference(report),
        *_routers(report, shown, routers),
        *_arms(report),
        *_missing(report),
        *_origin(report),
    ]
    return pages.document(report["question"], "\n".join(parts), _STYLE)


def _table(
    rows: Sequence[Sequence[str]],
    *,
    verdicts: bool = False,
    grey: Sequence[int] = (),
    is_text: bool = False,
) -> str:
    """Returns rows, header first, as a table.

    Args:
      rows: plain text.
      verdicts: the last column holds verdicts, in their colours.
      grey: columns that are not to be read.
      is_text: the last column is text, to be broken into lines.
    """
    header, last = rows[0], len(rows[0]) - 1
    # On a phone every row of a table with many columns becomes a list.
    kind = "left" if is_text else "cards" if last > 3 else ""
    lines = [f'<table class="{kind}">' if kind else "<table>"]
    for number, row in enumerate(rows):
        tag, line = ("td" if number else "th"), ""
        for column, cell in enumerate(row):
            names = ["grey"] * (column in grey)
            names += ["verdict", cell] * (verdicts and column == last and number > 0)
            names += ["any"] * (is_text and column == last)
            attributes = f' class="{html.escape(" ".join(names))}"' if names else ""
            if kind == "cards" and number:
                attributes += f' data-name="{html.escape(header[column])}"'
            line += f"<{tag}{attributes}>{_cell(cell, column)}</{tag}>"
        lines.append(f"<tr>{line}</tr>")
    return "\n".join([*lines, "</table>"])


def _cell(text: str, column: int) -> str:
    """Escapes a cell; names break at their joints, intervals do not."""
    shown = html.escape(text)
    if column == 0:
        return re.sub(r"([_+@-])", r"\1<wbr>", shown)
    return re.sub(r"\[([^\]]*)\]", lambda found: found[0].replace(" ", "&nbsp;"), shown)


def _figures(pictures: Sequence[Picture], command: str) -> list[str]:
    """Returns pictures, several in two columns, with their files and the command they are of."""
    lines = []
    for picture in pictures:
        image = pages.picture(picture.png, picture.caption).removeprefix("<p>").removesuffix("</p>")
        source = f"report_{picture.name}.png" + f", by {command}" * (len(pictures) == 1)
        caption = f"{html.escape(picture.caption)} <code>{html.escape(source)}</code>"
        lines.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    if len(pictures) < 2:
        return lines
    made = f'<p class="note">Figures by <code>{html.escape(command)}</code></p>'
    return ['<div class="pair">', *lines, "</div>", made]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"<h2>{html.escape(title)}</h2>", *lines] if lines else []


def _paragraph(text: str, kind: str = "") -> str:
    cls = f' class="{kind}"' if kind else ""
    return f"<p{cls}>{html.escape(text)}</p>"


def _answer(report: Mapping[str, Any]) -> list[str]:
    lines = [_paragraph(report["headline"], "lead")]
    if report["missing"]:
        lines.append(_paragraph(report["notes"][0] + " See “What is missing”.", "box"))
    items = [f"<li>{html.escape(arm['sentence'])}</li>" for arm in report["arms"]]
    return [*lines, '<ul class="answers">', *items, "</ul>"]


def _notes(report: Mapping[str, Any]) -> list[str]:
    # The first note of an incomplete sweep stands above the answer.
    left = report["notes"][1 if report["missing"] else 0 :]
    notes = [f"<li>{html.escape(note)}</li>" for note in left]
    return ["<ul>", *notes, "</ul>"] if notes else []


def _method(report: Mapping[str, Any]) -> list[str]:
    margin = report["margin"]
    absolute = margin.get("bits_per_byte")
    size = f" ({absolute:.4f} bits per byte)" if absolute else ""
    words = [
        f"Equivalent: the interval lies within the margin of {100 * margin['share']:g}% of "
        f"{report['baseline']}{size}, even where it excludes zero. Better or worse: it excludes "
        "zero. Undecided: neither; that is no evidence of equality.",
        _about_text(report),
        report["method"] or "",
        report["budget"]["sentence"],
    ]
    return [
        "<h2>How the verdicts are made</h2>",
        *[_paragraph(text) for text in words if text],
        _table(cells.evidence_rows(report)),
        _paragraph(
            "Seeds needed, of an undecided arm: with so many seeds of every arm, 80% of such "
            "sweeps would decide it, if the true difference were the measured one.",
            "note",
        ),
    ]


def _about_text(report: Mapping[str, Any]) -> str:
    text = "Bits per byte are of the UTF-8 bytes of all held-out text, the same for every arm"
    tasks = report["recall"]
    domains = {name: d for name, d in report["domains"].items() if name not in tasks}
    sizes = [f"{name} {domain['bytes']:,}" for name, domain in domains.items()]
    listed = f": {', '.join(sizes)}" * bool(sizes)
    return f"{text}{listed}{'; recall tasks count by themselves' if tasks else ''}."


def _costs(report: Mapping[str, Any], shown: Sequence[Picture]) -> list[str]:
    context = report["context"] // 1024
    decoded = " --decode" * any(picture.name == "trade_decode" for picture in shown)
    return [
        "<h2>What the arms cost</h2>",
        _table(cells.cost_rows(report)),
        _paragraph(
            f"Per token. KV cache in 16 bit and attention FLOPs (scores and weighted values, mean "
            f"over a prefill) at a context of {context}K; experts as measured on held-out text. In "
            f"brackets: times {report['baseline']}.",
            "note",
        ),
        _table(cells.training_rows(report)),
        _table(cells.time_rows(report)),
        _paragraph(_about_time(report), "note"),
        _paragraph(_TRADES) if shown else "",
        *_figures(shown, report["command"] + decoded),
    ]


def _about_time(report: Mapping[str, Any]) -> str:
    text = "Of one run, mean over seeds; speed and time as measured on the sweep's machine."
    if any(arm.get("search") for arm in report["arms"]):
        text += " Search: all trials of an arm; rate: the factor on the learning rates it found."
    for decode in [arm["decode"] for arm in report["arms"] if arm.get("decode")][:1]:
        text += (
            f" Decoding: one sequence after a prompt of {decode['context']:,} tokens, median of "
            f"{decode['rounds']} rounds on {decode['device']}."
        )
    return text


def _gain(report: Mapping[str, Any], shown: Sequence[Picture]) -> list[str]:
    trend = report["scaling"]
    if not trend:
        return []
    return [
        "<h2>Compute-equivalent gain</h2>",
        _paragraph(
            f"At what factor on an arm's training FLOPs {report['baseline']} reaches its bits "
            f"per byte; above 1 the arm saves compute. {trend['sentence']}"
        ),
        _table(cells.gain_rows(report)),
        *_figures(shown, report["command"]),
    ]


def _domains(report: Mapping[str, Any]) -> list[str]:
    domains = report["domains"]
    if not domains:
        return []
    grey = [1 + index for index, name in enumerate(domains) if not domains[name]["is_shown"]]
    note = (
        "Bits per byte; in brackets the difference to the baseline and its verdict, with intervals "
        "that hold for all arms of a domain, not for all domains. Signal to noise: the deviation "
        "over arms, in deviations of one run over seeds, or over its last evaluations."
    )
    if grey:
        note += " Grey: below the threshold; the domain does not tell these arms apart."
    return [
        "<h2>By domain</h2>",
        _table(cells.domain_rows(report), grey=grey),
        _paragraph(note, "note"),
    ]


def _recall(report: Mapping[str, Any], shown: Sequence[Picture]) -> list[str]:
    tasks = report["recall"]
    if not tasks:
        return []
    grey = [1 + index for index, name in enumerate(tasks) if not tasks[name]["is_shown"]]
    common = ", ".join(f"{name} {task['common']}" for name, task in tasks.items())
    note = (
        f"Answers that are right to the last token, mean over the cells that all arms have "
        f"({common}); in brackets points more than {report['baseline']}, and the verdict with a "
        f"margin of {100 * recall_scores.MARGIN:g} points."
    )
    if grey:
        note += " Grey: below the signal-to-noise threshold, so without verdicts."
    return [
        "<h2>Recall</h2>",
        _table(cells.recall_rows(report), grey=grey),
        _paragraph(note, "note"),
        *_figures(shown, report["command"]),
    ]


def _inference(report: Mapping[str, Any]) -> list[str]:
    if not report["inference"]:
        return []
    note = (
        "The same weights with experts chosen in other ways: the paired difference to the arm's "
        "own routing, with a 95% interval of Student's t for each row by itself."
    )
    rows = _table(cells.inference_rows(report))
    return ["<h2>Inferred with another routing</h2>", rows, _paragraph(note, "note")]


def _routers(
    report: Mapping[str, Any], shown: Mapping[str, Sequence[Picture]], texts: Mapping[str, str]
) -> list[str]:
    lines = []
    for arm, text in texts.items():
        drawn = _figures(shown.get(f"router {arm}", []), report["command"])
        lines += [f"<h3>{html.escape(arm)}</h3>", *drawn, text]
    if lines:
        lines.insert(0, _paragraph("Of the first seed of each arm, on held-out text."))
    return _section("Routers", lines)


def _arms(report: Mapping[str, Any]) -> list[str]:
    return ["<h2>Arms</h2>", _table(cells.arm_rows(report), is_text=True)]


def _missing(report: Mapping[str, Any]) -> list[str]:
    if not report["missing"]:
        return []
    return [
        "<h2>What is missing</h2>",
        _table(cells.missing_rows(report), is_text=True),
        _paragraph("The command of the sweep, given again, goes on with these runs."),
    ]


def _origin(report: Mapping[str, Any]) -> list[str]:
    origin = report["provenance"]
    listed = []
    for number, made in enumerate(origin["environments"], 1):
        versions = ", ".join(" ".join(pair) for pair in made["versions"].items())
        listed.append(f"[{number}] {made['command']}\n    commit {made['commit']}\n    {versions}")
    texts: list[str] = []
    rows = [["run", "begun", "made by", "text"]]
    for run in origin["runs"]:
        digests = {**run["data"], "tokenizer": run["tokenizer"] or "?"}
        text = ", ".join(f"{name} {digest[:16]}" for name, digest in digests.items())
        if text not in texts:
            texts.append(text)
        made_by = " ".join(f"[{index + 1}]" for index in run["environments"])
        begun = run["begun"][:16].replace("T", " ")
        name = f"{run['arm']} seed {run['seed']}"
        rows.append([name, begun, made_by, f"text {texts.index(text) + 1}"])
    listed += [f"text {number}, sha256: {text}" for number, text in enumerate(texts, 1)]
    today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return [
        "<h2>Where it comes from</h2>",
        pages.listing("\n".join(listed)),
        _table(rows, is_text=True),
        _paragraph(
            f"Times are UTC. Page made {today} by lightning_jax {shipped.version()}: "
            f"{report['command']}. Every config field is in sweep.json, the numbers of the tables "
            "are in report.json, and one row for each arm in report.csv."
        ),
    ]
