import io
import json
import sys
import types

import pytest

from benchmarks import report
from benchmarks.measure import Options
from lightning_jax.config.errors import UserError

ROWS = [
    {"table": "one", "name": "a", "ms": 1.25, "ratio": 30.0},
    {"table": "one", "name": "b", "ms": 1234.5, "note": "torch is not installed: skipped"},
    {"table": "two", "name": "c", "tokens": 4096},
]


@pytest.fixture
def suite(monkeypatch):
    module = types.ModuleType("suite")
    module.run = lambda options: [{**row, "rounds": options.rounds} for row in ROWS]
    monkeypatch.setitem(sys.modules, "benchmarks.fake", module)
    monkeypatch.setattr(report, "SUITES", (*report.SUITES, "fake"))


def test_a_report_says_what_was_measured_where(suite, tmp_path):
    found = report.run_suite("fake", Options(rounds=7))
    path = tmp_path / "results" / "fake.json"
    report.write(found, path)
    assert json.loads(path.read_text()) == found
    assert found["suite"] == "fake" and found["rows"][0]["rounds"] == 7
    assert {"cpu", "cores", "memory_gb", "device"} <= set(found["machine"])
    assert {"python", "jax", "torch"} <= set(found["versions"])
    assert found["date"].endswith("+00:00") and "commit" in found


def test_tables(suite):
    file = io.StringIO()
    report.print_tables(report.run_suite("fake", Options()), file)
    text = file.getvalue()
    assert "one" in text and "two" in text and "1,234" in text and "1.25" in text


def test_profiles_have_a_table_of_their_own():
    profiles = {"E8": {"experts: dot_general": 70.0}, "E64": {"experts: gather": 1.5, "rest": 0.5}}
    file = io.StringIO()
    report.print_tables({"suite": "moe", "rows": [ROWS[0] | {"profile": profiles}]}, file)
    first, second = file.getvalue().split("a: where its")
    assert "profile" not in first and "1.25" in first
    assert "experts: dot_general" in second and "E64" in second and "1.5" in second


def test_a_profile_that_a_suite_does_not_make_is_refused():
    with pytest.raises(UserError, match="--profile is for the suites attention, moe, train"):
        report.run_suite("startup", Options(profile=True))


def test_an_unknown_suite_is_named():
    with pytest.raises(UserError, match='did you mean "attention"'):
        report.run_suite("atention", Options())


# Case F5
@pytest.mark.parametrize("only", ["zzz", "E64,zzz"])
def test_a_part_that_no_row_has_is_named(monkeypatch, only):
    module = types.ModuleType("suite")
    rows = ("moe_E64", "moe_E8")
    module.run = lambda options: [{"name": name} for name in rows if options.wants(name)]
    monkeypatch.setitem(sys.modules, "benchmarks.fake", module)
    monkeypatch.setattr(report, "SUITES", (*report.SUITES, "fake"))
    options = Options(only=tuple(only.split(",")))
    right = "only = 'zzz': no row of the suite fake has that in its name, one of moe_E64, moe_E8"
    if only == "zzz":
        with pytest.raises(UserError, match=right):
            report.run_suite("fake", options)
    else:
        # The program prints what it measured before it says so.
        assert len(report.run_suite("fake", options)["rows"]) == 1
        assert report.no_such_rows("fake", options) == right
