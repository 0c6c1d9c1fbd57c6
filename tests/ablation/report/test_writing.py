"""The folder of a sweep gets its report; equal words everywhere."""

import csv
import json

import pytest

from lightning_jax import plots
from lightning_jax.ablation import report
from lightning_jax.ablation.report import page
from lightning_jax.config.errors import UserError
from lightning_jax.runtime import tables
from tests.ablation.fake_runs import SCORES, small_sweep, write_sweep
from tests.tiny import tiny_config


@pytest.fixture
def undrawn(monkeypatch):
    """Replaces the drawing of figures, which takes most of the time."""
    monkeypatch.setattr(plots, "png", lambda *_, **__: b"png")


def test_the_folder_gets_the_report(tmp_path, capsys):
    write_sweep(tmp_path)
    (tmp_path / "report_old.png").write_bytes(b"of an earlier report")
    summary = report.write_report(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == summary
    assert summary["command"] == f"python -m experiments.report --workdir={tmp_path}"
    names = {path.name for path in tmp_path.glob("report*")}
    assert names == {"report.html", "report.json", "report.csv"} | {
        f"report_{name}.png"
        for name in ("intervals", "learning", "trade_kv", "trade_flops", "trade_params")
    }
    assert (tmp_path / "report_intervals.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["difference/verdict"] for row in rows] == ["", "undecided", "better"]
    report.print_report(summary)
    output = capsys.readouterr()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert output.out == ""
    for line in [summary["headline"], *(arm["sentence"] for arm in summary["arms"])]:
        assert line in output.err and line in text


def test_nothing_is_cut_off_at_80_columns(undrawn, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tables, "WIDE", 80)
    arms = {"full": {"model.unit": "GG"}, "a_name_that_is_very_long_indeed_for_an_arm": {}}
    sweep = small_sweep(arms=arms)
    write_sweep(tmp_path, sweep, scores={arm: SCORES["full"] for arm in arms})
    report.print_report(report.write_report(tmp_path))
    output = capsys.readouterr().err
    assert "…" not in output and "equivalent" in output


@pytest.mark.parametrize("scores", [{"shared": SCORES["shared"]}, {"full": (2.0,)}])
def test_a_sweep_that_has_just_begun_has_a_report(undrawn, tmp_path, scores):
    write_sweep(tmp_path, scores=scores)
    summary = report.write_report(tmp_path)
    report.print_report(summary)
    assert "What is missing" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_router_that_cannot_be_read_is_said(undrawn, tmp_path):
    base = tiny_config(model__num_units=1)
    sweep = small_sweep(base=base, arms={"full": {"model.unit": "GG"}, "hybrid": {}}, seeds=(0,))
    write_sweep(tmp_path, sweep, experts=2.0)
    report.write_report(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.count("Not shown: ") == 2
    report.write_report(tmp_path, routers=False)
    assert "Routers" not in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["nothing", "."])
def test_a_folder_without_a_sweep_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="must be a folder that experiments.sweep made"):
        report.write_report(tmp_path / folder)


def test_a_folder_that_has_no_report_is_left_as_it_is(undrawn, tmp_path, monkeypatch):
    write_sweep(tmp_path, scores={})
    with pytest.raises(UserError, match=r"no run of the sweep has a result \(not started\)"):
        report.write_report(tmp_path)
    write_sweep(tmp_path)
    files = set(tmp_path.iterdir())
    monkeypatch.setattr(page, "build", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(tmp_path)
    assert set(tmp_path.iterdir()) == files
    (tmp_path / "sweep.json").write_text('{"arms": 3}')
    with pytest.raises(UserError, match=r"sweep.json: not a sweep \(sweep field question is mis"):
        report.write_report(tmp_path)
