"""Every run says which command, commit and versions made it, and of which text."""

import json

from lightning_jax.ablation.report.provenance import changed_text, provenance
from tests.ablation.fake_runs import small_sweep, write_rows, write_run


def test_equal_environments_are_named_once(tmp_path):
    sweep = small_sweep()
    runs = sweep.runs()
    for run in runs[:2]:
        write_run(sweep.config(run), run.folder(tmp_path))
    write_rows(runs[2].folder(tmp_path), 1)
    found = provenance(runs, tmp_path)
    assert found["environments"] == [
        {
            "command": "python -m experiments.sweep '--sweep=a b.py'",
            "commit": "abc",
            "versions": {"python": "?", "jax": "0.10"},
        }
    ]
    assert [(run["arm"], run["seed"], run["environments"]) for run in found["runs"]] == [
        ("full", 0, [0]),
        ("shared", 0, [0]),
    ]


def test_text_that_differs_between_runs_is_found(tmp_path):
    sweep = small_sweep()
    for number, run in enumerate(sweep.runs()[:2]):
        write_run(sweep.config(run), run.folder(tmp_path))
        path = run.folder(tmp_path) / "run.json"
        record = json.loads(path.read_text())
        record["data"] = {
            "code": {"fingerprint": f"text {number}"},
            "docs": {"fingerprint": "same"},
        }
        record["sessions"].append({**record["sessions"][0], "git_commit": "def"})
        path.write_text(json.dumps(record))
    found = provenance(sweep.runs(), tmp_path)
    assert changed_text(found) == ["code"]
    assert [made["commit"] for made in found["environments"]] == ["abc", "def"]
    assert found["runs"][1]["environments"] == [0, 1]
    assert found["runs"][1]["data"] == {"code": "text 1", "docs": "same"}
