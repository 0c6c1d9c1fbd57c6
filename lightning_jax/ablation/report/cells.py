"""The tables of a sweep's report, as text: the same cells for the terminal and the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_jax.ablation import inference
from lightning_jax.ablation.results import METRIC
from lightning_jax.accounting import count_text

Rows = list[list[str]]
_NONE = "-"


def quality_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: bits per byte, paired difference with its interval, and verdict."""
    rows = [["arm", "bits/byte", "difference [95%]", "verdict"]]
    for arm in report["arms"]:
        if METRIC not in arm:
            rows.append([arm["arm"], _NONE, _NONE, "no result"])
            continue
        rows.append([arm["arm"], f"{arm[METRIC]['mean']:.4f}", *_compared(report, arm)])
    return rows


def _compared(report: Mapping[str, Any], arm: Mapping[str, Any]) -> list[str]:
    difference = arm["difference"]
    if difference is not None:
        return [percent(difference["percent"]), difference["verdict"]]
    if arm["arm"] == report["baseline"]:
        return [_NONE, "baseline"]
    return [_NONE, "withheld" if report["withheld"] else _NONE]


def percent(ends: Mapping[str, float | None]) -> str:
    """Returns a difference: "-0.31% [-0.50, -0.12]", without an interval for one pair."""
    mean, low, high = (ends[key] for key in ("mean", "low", "high"))
    if mean is None:
        return _NONE
    text = f"{mean:+.2f}%"
    return text if low is None or high is None else f"{text} [{low:+.2f}, {high:+.2f}]"


def evidence_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: what the verdicts rest on."""
    rows = [["arm", "seeds", "std over seeds", "p, difference", "p, equivalence", "seeds needed"]]
    for arm in report["arms"]:
        if METRIC not in arm:
            continue
        deviation, difference = arm[METRIC]["std"], arm["difference"] or {}
        needed = difference.get("seeds_needed")
        rows.append(
            [
                arm["arm"],
                str(len(difference.get("seeds", arm["seeds"]))),
                _NONE if deviation is None else f"{deviation:.4f}",
                _p(difference.get("p")),
                _p(difference.get("p_equivalent")),
                _NONE if needed is None else str(needed),
            ]
        )
    return rows


def _p(value: float | None) -> str:
    if value is None:
        return _NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# Header, entry of `costs`.
_PER_TOKEN = {
    "active params": "params_active",
    "KV B/token": "kv_bytes_per_token",
    "attn FLOPs": "attention_flops_per_token",
    "experts": "experts_per_token",
    "busiest expert": "load_max_over_mean",
}
_TRAINING = {"tokens": "train_tokens", "FLOPs": "train_flops", "tokens/s": "tokens_per_second"}
# Other work on the machine moves it: no ratio to the baseline.
_NOISY = "tokens_per_second"


def cost_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: what a token costs each arm, from its config and measured experts."""
    return _with_ratios(report, _PER_TOKEN)


def training_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: what training cost each arm, mean over seeds."""
    return _with_ratios(report, _TRAINING)


def time_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: minutes of one training and of the arm's search, speed of decoding.

    `rate` is the factor on the learning rates that the search has found.
    """
    columns = {
        "train min": lambda arm: _of(arm["costs"], "seconds", ".1f", 60),
        "search min": lambda arm: _of(arm["search"], "seconds", ".1f", 60),
        "rate": lambda arm: _of(arm["search"], "factor", ".2f"),
        "decode tok/s": lambda arm: _of(arm["decode"], "tokens_per_second", ",.0f"),
        "prefill s": lambda arm: _of(arm["decode"], "prefill_seconds", ".3g"),
    }
    arms = [arm for arm in report["arms"] if METRIC in arm]
    cells = {name: [cell(arm) for arm in arms] for name, cell in columns.items()}
    known = {name: column for name, column in cells.items() if {*column} != {_NONE}}
    lines = zip([arm["arm"] for arm in arms], *known.values(), strict=True)
    return [["arm", *known], *map(list, lines)]


def missing_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: runs without a result, together with others that have the same reason."""
    found: dict[str, dict[str, list[str]]] = {}
    for run in report["missing"]:
        found.setdefault(run["reason"], {}).setdefault(run["arm"], []).append(str(run["seed"]))
    rows = [["no result", "why"]]
    for reason, arms in found.items():
        parts = [
            f"{arm} seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}" for arm, seeds in arms.items()
        ]
        rows.append(["; ".join(parts), reason])
    return rows


def _of(entry: Mapping[str, Any] | None, key: str, form: str, unit: float = 1) -> str:
    value = (entry or {}).get(key)
    return _NONE if value is None else format(value / unit, form)


def _with_ratios(report: Mapping[str, Any], columns: Mapping[str, str]) -> Rows:
    arms = [arm for arm in report["arms"] if METRIC in arm]
    known = {
        header: name
        for header, name in columns.items()
        if any(arm["costs"][name] is not None for arm in arms)
    }
    base = next((arm["costs"] for arm in arms if arm["arm"] == report["baseline"]), {})
    base = {name: value for name, value in base.items() if name != _NOISY}
    rows = [["arm", *known]]
    for arm in report["arms"]:
        costs = arm.get("costs", {})
        rows.append([arm["arm"], *(_ratio(costs.get(n), base.get(n)) for n in known.values())])
    return rows


def _ratio(value: float | None, base: float | None) -> str:
    """The number and, where it differs, how many times the baseline's it is."""
    if value is None:
        return _NONE
    text = f"{value:,.0f}" if 100 <= value < 10_000 else count_text(value).replace(" ", "")
    if not base or abs(value / base - 1) < 0.005:
        return text
    return f"{text} (x{value / base:.2f})"


def domain_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: bits per byte by domain, difference in percent and verdict of each arm.

    The last rows have each domain's signal-to-noise ratio, over seeds and, where it is known, over
    the last evaluations during training.
    """
    domains = report["domains"]
    rows = [["arm", *domains]]
    for arm in report["arms"]:
        if METRIC in arm:
            rows.append([arm["arm"], *(_in_domain(d, arm["arm"]) for d in domains.values())])
    rows.append(_ratios("signal/noise", domains, "signal_to_noise"))
    if any(domain["signal_to_checkpoint_noise"] is not None for domain in domains.values()):
        rows.append(_ratios("signal/checkpoint noise", domains, "signal_to_checkpoint_noise"))
    return rows


def _ratios(name: str, metrics: Mapping[str, Any], key: str) -> list[str]:
    ratios = [metric[key] for metric in metrics.values()]
    return [name, *(_NONE if ratio is None else f"{ratio:.1f}" for ratio in ratios)]


def _in_domain(domain: Mapping[str, Any], arm: str) -> str:
    mean, difference = domain["arms"].get(arm), domain["differences"].get(arm)
    text = _NONE if mean is None else f"{mean:.4f}"
    if difference is None or difference["mean"] is None:
        return text
    return f"{text} ({difference['percent']['mean']:+.2f}%, {difference['verdict']})"


def recall_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: exact matches by task, in percent, and the difference to the baseline.

    Differences are in points of a hundred; a task that does not tell arms apart has no verdicts.
    The last row has each task's signal-to-noise ratio.
    """
    tasks = report["recall"]
    rows = [["arm", *tasks]]
    for arm in report["arms"]:
        if METRIC in arm:
            rows.append([arm["arm"], *(_in_task(task, arm["arm"]) for task in tasks.values())])
    rows.append(_ratios("signal/noise", tasks, "signal_to_noise"))
    return rows


def _in_task(task: Mapping[str, Any], arm: str) -> str:
    score, difference = task["arms"].get(arm), task["differences"].get(arm)
    text = _NONE if score is None else f"{100 * score['mean']:.1f}%"
    if difference is None or difference["mean"] is None:
        return text
    # Where all recall nothing, or everything, the task is no test: they are not "equivalent".
    verdict = f", {difference['verdict']}" if task["is_shown"] else ""
    return f"{text} ({100 * difference['mean']:+.1f}{verdict})"


def inference_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: arms inferred with other routings, against their own."""
    rows = [["arm", "inferred with", "experts", "bits/byte", "difference [95%]"]]
    for row in report["inference"]:
        own = row["way"] == inference.OWN
        rows.append(
            [
                row["arm"],
                row["way"],
                f"{row['experts_per_token']:.2f}",
                f"{row[METRIC]:.4f}",
                _NONE if own else percent(row["percent"]),
            ]
        )
    return rows


def gain_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: how many times the arm's compute the baseline needs for the same loss."""
    rows = [["arm", "gain", "95% interval", "note"]]
    for arm in report["arms"]:
        if gain := arm.get("gain"):
            value, low, high = gain["value"], gain["low"], gain["high"]
            known = low is not None and high is not None
            note = "extrapolated" if gain["extrapolated"] else _NONE
            rows.append(
                [
                    arm["arm"],
                    "never reached" if value is None else f"x{value:.3g}",
                    f"{low:.3g} to {high:.3g}" if known else "unknown",
                    note,
                ]
            )
    return rows


def arm_rows(report: Mapping[str, Any]) -> Rows:
    """Rows, header first: the config fields that each arm changes in the base."""
    rows = [["arm", "changes in the base config"]]
    for arm in report["arms"]:
        changes = ", ".join(f"{field} = {value}" for field, value in arm["changes"].items())
        rows.append([arm["arm"], changes or "nothing"])
    return rows


def csv_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one flat dict for each arm: scores, difference, verdict, costs, domains."""
    rows = []
    for arm in report["arms"]:
        row: dict[str, Any] = {"arm": arm["arm"], "seeds": len(arm["seeds"])}
        if METRIC in arm:
            score, difference = arm[METRIC], arm["difference"] or {}
            row |= {METRIC: score["mean"], "std": score["std"]}
            keys = ("mean", "low", "high", "p", "p_equivalent", "verdict", "seeds_needed")
            row |= {f"difference/{key}": difference.get(key) for key in keys}
            row |= {f"costs/{key}": value for key, value in arm["costs"].items()}
            for name, domain in report["domains"].items():
                row[f"domains/{name}"] = domain["arms"].get(arm["arm"])
            row |= {f"gain/{key}": value for key, value in (arm["gain"] or {}).items()}
        rows.append(row)
    return rows
