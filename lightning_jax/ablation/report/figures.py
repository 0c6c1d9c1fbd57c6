"""Figures of a sweep's report. Each shows the numbers that the verdicts are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from lightning_jax.ablation.report import curves
from lightning_jax.ablation.results import METRIC
from lightning_jax.accounting import count_text

# Okabe and Ito's palette: told apart with any colour vision.
VERDICTS = {
    "better": "#007A5A",
    "worse": "#C04A00",
    "equivalent": "#0072B2",
    "undecided": "#777777",
}
_COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*"
# Inches: narrow, so that the letters can be read on a phone.
WIDTH = 5.2
_BAND = "#E4E4E4"

_BASE = {"mean": 0.0, "low": None, "high": None}
# Costs that quality is drawn against, by the name of their file: where an arm has it, axis label.
TRADES = {
    "kv": ("costs", "kv_bytes_per_token", "KV cache, bytes per token at a context of {context}K"),
    "flops": ("costs", "train_flops", "training FLOPs"),
    "params": ("costs", "params_active", "parameters used per token"),
    "decode": ("decode", "tokens_per_second", "decoded tokens per second, measured"),
}


def looks(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the colour, line and marker of each arm, the same in all figures."""
    count = len(_COLORS)
    return {
        arm["arm"]: {
            "color": _COLORS[index % count],
            "linestyle": _LINES[index // count % len(_LINES)],
            "marker": _MARKERS[index % len(_MARKERS)],
        }
        for index, arm in enumerate(report["arms"])
    }


def intervals(report: Mapping[str, Any]) -> Figure | None:
    """Draws the paired difference of each arm with its simultaneous interval, and the margin.

    The intervals are those of the verdicts. Small dots are single seeds. None without differences.
    """
    arms = [arm for arm in report["arms"] if _is_compared(arm)]
    if not arms:
        return None
    figure = Figure(figsize=(WIDTH, 1.25 + 0.46 * len(arms)), layout="constrained")
    axes = figure.subplots()
    share = 100 * report["margin"]["share"]
    axes.axvspan(-share, share, color=_BAND, lw=0, zorder=0)
    axes.axvline(0, color="#000000", lw=1, zorder=1)
    for row, arm in enumerate(arms):
        difference = arm["difference"]
        color, percent = VERDICTS[difference["verdict"]], difference["percent"]
        seeds = difference["by_seed"]
        axes.plot(seeds, [row + 0.2] * len(seeds), "o", ms=3, color=color, alpha=0.45, mew=0)
        _interval(axes, percent, row, color)
        axes.annotate(
            difference["verdict"],
            (1.02, row),
            xycoords=axes.get_yaxis_transform(),
            color=color,
            va="center",
            weight="bold",
            annotation_clip=False,
        )
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.set_ylim(len(arms) - 0.4, -0.6)
    _reach(axes, [x for arm in arms for x in _numbers(arm["difference"])], share)
    axes.set_xlabel(f"bits per byte minus {report['baseline']}, in percent (left is better)")
    axes.set_title(f"Paired differences, 95% together; grey: within {share:g}%", fontsize=10)
    _plain(axes)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _is_compared(arm: Mapping[str, Any]) -> bool:
    difference = arm.get("difference")
    return difference is not None and difference["mean"] is not None


def _interval(axes: Axes, percent: Mapping[str, Any], row: float, color: str) -> None:
    mean, low, high = percent["mean"], percent["low"], percent["high"]
    if low is None:
        axes.plot(mean, row, "o", ms=7, mfc="white", mec=color, mew=1.6, zorder=3)
        return
    reach = [[mean - low], [high - mean]]
    axes.errorbar(mean, row, xerr=reach, fmt="o", ms=7, color=color, lw=2.2, capsize=4, zorder=3)


def _numbers(difference: Mapping[str, Any]) -> list[float]:
    percent = difference["percent"]
    ends = [percent[key] for key in ("mean", "low", "high") if percent[key] is not None]
    return [*ends, *difference["by_seed"]]


def _reach(axes: Axes, values: Sequence[float], share: float) -> None:
    """Shows all values, zero and the whole margin."""
    low, high = min(*values, -share), max(*values, share)
    pad = 0.06 * (high - low)
    axes.set_xlim(low - pad, high + pad)


def learning(report: Mapping[str, Any], found: curves.Curves) -> Figure | None:
    """Draws training loss by arm, and below the paired difference to the baseline.

    Bands are the range over seeds, not the intervals of the verdicts.
    """
    baseline, look = report["baseline"], looks(report)
    found = {arm: found[arm] for arm in look if arm in found}
    if not found:
        return None
    others = {arm: curves.paired(found, arm, baseline) for arm in found if arm != baseline}
    pairs = {arm: pair for arm, pair in others.items() if pair is not None}
    figure = Figure(figsize=(WIDTH, 5.6 if pairs else 3.4), layout="constrained")
    top, *rest = np.ravel(figure.subplots(1 + bool(pairs), sharex=True))
    shown = []
    for arm, (tokens, by_seed) in found.items():
        losses, style = np.stack([*by_seed.values()]), {**look[arm], "marker": ""}
        top.plot(tokens, losses.mean(0), label=arm, lw=1.6, **style)
        if len(losses) > 1:
            top.fill_between(
                tokens, losses.min(0), losses.max(0), color=style["color"], alpha=0.13, lw=0
            )
        # The first fall is the same for all arms and would flatten their differences.
        shown.append(losses[:, losses.shape[1] // 5 :])
    low, high = min(map(np.min, shown)), max(map(np.max, shown))
    top.set_ylim(low - 0.05 * (high - low) - 1e-6, high + 0.05 * (high - low) + 1e-6)
    top.set(ylabel="training loss, nats per token")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    for axes in rest:
        _paired_curves(axes, pairs, look)
        axes.set_ylabel(f"loss minus {baseline}")
    [*rest, top][0].set_xlabel("training tokens")
    for axes in (top, *rest):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0)
        axes.grid(alpha=0.25)
        _plain(axes)
    return figure


def _paired_curves(
    axes: Axes, pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], look: Mapping[str, Any]
) -> None:
    axes.axhline(0, color="#000000", lw=1)
    shown = [np.zeros(1)]
    for arm, (tokens, difference) in pairs.items():
        axes.plot(tokens, difference.mean(0), lw=1.6, **{**look[arm], "marker": ""})
        low, high = difference.min(0), difference.max(0)
        axes.fill_between(tokens, low, high, color=look[arm]["color"], alpha=0.13, lw=0)
        late = slice(len(tokens) // 5, None)
        shown += [low[late], high[late]]
    values = np.concatenate(shown)
    pad = 0.06 * float(np.ptp(values)) + 1e-9
    axes.set_ylim(float(values.min()) - pad, float(values.max()) + pad)


def trades(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Draws the difference in quality against each cost in which arms differ, by `TRADES`.

    Bars are the intervals of the verdicts; the dotted line joins the arms that no other arm beats
    in both, by their means.
    """
    found = {}
    arms = [arm for arm in report["arms"] if METRIC in arm]
    arms = [arm for arm in arms if _is_compared(arm) or arm["arm"] == report["baseline"]]
    for name, (part, key, label) in TRADES.items():
        points = [(arm, (arm[part] or {}).get(key)) for arm in arms]
        known = [(arm, cost) for arm, cost in points if cost is not None]
        costs = [cost for _, cost in known]
        if len(known) > 1 and max(costs) > 1.005 * min(costs):
            label = label.format(context=report["context"] // 1024)
            found[name] = _trade(report, known, label, more_is_better=name == "decode")
    return found


def _trade(
    report: Mapping[str, Any],
    points: Sequence[tuple[Mapping[str, Any], float]],
    label: str,
    *,
    more_is_better: bool,
) -> Figure:
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes, look = figure.subplots(), looks(report)
    share = 100 * report["margin"]["share"]
    axes.axhspan(-share, share, color=_BAND, lw=0, zorder=0)
    costs, means, reach = [cost for _, cost in points], [], [-share, share]
    for index, (arm, cost) in enumerate(points):
        percent = arm["difference"]["percent"] if arm["difference"] else _BASE
        mean, low, high = percent["mean"], percent["low"], percent["high"]
        bars = None if low is None else [[mean - low], [high - mean]]
        # Arms of equal cost stand side by side.
        shift = 7 * (costs[:index].count(cost) - (costs.count(cost) - 1) / 2) / 72
        place = axes.transData + ScaledTranslation(shift, 0, figure.dpi_scale_trans)
        style = {**look[arm["arm"]], "linestyle": "", "transform": place}
        axes.errorbar(cost, mean, bars, ms=7, capsize=3, elinewidth=1.4, label=arm["arm"], **style)
        means.append((-cost if more_is_better else cost, mean))
        reach += [mean] if low is None else [low, high]
    best = sorted({point for point in means if not any(_beats(other, point) for other in means)})
    if len(best) > 1:
        xs, ys = zip(*best, strict=True)
        axes.plot(np.abs(xs), ys, ":", color="#555555", lw=1.2, zorder=1)
    _cost_axis(axes, costs)
    pad = 0.05 * (max(reach) - min(reach))
    axes.set_ylim(min(reach) - pad, max(reach) + pad)
    axes.set(xlabel=label, ylabel=f"bits per byte minus {report['baseline']}, %")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    axes.grid(alpha=0.25)
    _plain(axes)
    return figure


def _cost_axis(axes: Axes, costs: Sequence[float]) -> None:
    """Shows costs that are far apart by their logarithm, with ticks at the costs themselves."""
    low, high = min(costs), max(costs)
    if high <= 3 * low:
        pad = 0.12 * (high - low)
        axes.set_xlim(low - pad, high + pad)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        return
    axes.set_xscale("log")
    axes.set_xlim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
    ticks: list[float] = []
    for cost in sorted(costs):
        if not ticks or cost > 1.4 * ticks[-1]:
            ticks.append(cost)
    axes.set_xticks(ticks, [f"{x:,.0f}" if x < 1e4 else count_text(x) for x in ticks])
    axes.set_xticks([], minor=True)


def gains(report: Mapping[str, Any]) -> Figure | None:
    """Draws the baseline's bits per byte over training FLOPs, the fit, and the arms.

    A dotted line leads from an arm to the budget at which the baseline reaches its loss. None
    without a fit.
    """
    trend = report["scaling"]
    if not trend:
        return None
    look, fit = looks(report), trend["fit"]
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    style = {**look[report["baseline"]], "linestyle": ""}
    for budget in trend["budgets"]:
        values = [*budget["by_seed"].values()]
        axes.plot([budget["flops"]] * len(values), values, **style, ms=3, alpha=0.4)
        axes.plot(budget["flops"], np.mean(values), **style, ms=7)
    places, costs = {}, [budget["flops"] for budget in trend["budgets"]]
    for arm in report["arms"]:
        gain = arm.get("gain")
        if gain and gain["value"] is not None:
            places[arm["arm"]] = gain["flops"], arm[METRIC]["mean"], gain["value"]
            costs += [gain["flops"]]
            if not gain["extrapolated"]:
                costs += [gain["flops"] * gain["value"]]
    for arm, (flops, loss, value) in places.items():
        axes.plot(flops, loss, ms=7, **{**look[arm], "linestyle": ""}, label=arm)
        axes.plot([flops, flops * value], [loss, loss], ":", color=look[arm]["color"], lw=1.2)
    reach = np.geomspace(min(costs) / 1.15, max(costs) * 1.15, 60)
    exponents = np.array([*fit["slopes"].values()])
    shifts = np.array([*fit["intercepts"].values()])
    line = fit["floor"] + np.exp(shifts[:, None] - exponents[:, None] * np.log(reach)).mean(0)
    color = look[report["baseline"]]["color"]
    axes.plot(reach, line, color=color, lw=1.4, label=f"{report['baseline']}, fitted")
    _cost_axis(axes, costs)
    axes.set_xlim(reach[0], reach[-1])
    axes.set(xlabel="training FLOPs", ylabel="held-out bits per byte")
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    axes.grid(alpha=0.25)
    _plain(axes)
    return figure


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
