"""Two runs side by side, from folders as `train.loop` leaves them."""

import json

import pytest

from lightning_jax.ablation import compare
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep, write_rows, write_run


@pytest.fixture
def pair(tmp_path):
    """Two finished runs, which differ in their pattern."""
    sweep = small_sweep()
    for arm, code in (("full", 2.0), ("hybrid", 1.9)):
        write_run(sweep.config(Run(arm, 0)), tmp_path / arm, code=code)
    return tmp_path / "full", tmp_path / "hybrid"


def test_two_runs_differ_in_what_their_folders_say(pair):
    found = compare.compare(*pair)
    assert found["config"] == [{"field": "model.unit", "values": ["GG", "LG"]}]
    assert found["bits_per_byte"]["code"] == {
        "values": [2.0, 1.9],
        "difference": pytest.approx(-0.1),
    }
    # 3,000 bytes of code and 500 of docs, at 2.5.
    values = [(2.0 * 3000 + 2.5 * 500) / 3500, (1.9 * 3000 + 2.5 * 500) / 3500]
    assert found["bits_per_byte"]["all text"]["values"] == pytest.approx(values)
    first, second = found["runs"]
    assert first["finished"] and first["steps"] == 20 and first["trained_tokens"] == 2000
    assert first["kv_bytes_per_token"] > second["kv_bytes_per_token"]
    assert first["command"] == "python -m experiments.sweep '--sweep=a b.py'"
    assert found["curve"]["tokens"] == [125 + 250 * n for n in range(8)]
    ones, twos = found["curve"]["losses"]
    assert [two - one for one, two in zip(ones, twos, strict=True)] == pytest.approx([-0.1] * 8)
    assert found["notes"] == ["Two runs do not show what is chance: a sweep compares over seeds."]


def test_a_run_that_goes_on_is_compared_as_far_as_it_is(pair):
    first, second = pair
    (second / "evaluation.json").unlink()
    write_rows(second, 10)
    found = compare.compare(first, second)
    assert found["bits_per_byte"]["code"] == {"values": [2.0, None], "difference": None}
    assert found["runs"][1]["steps"] == 10 and found["curve"]["tokens"][-1] < 1000
    assert found["notes"][0] == f"{second} has not finished: no held-out scores."


def test_scores_on_other_bytes_are_not_compared(pair):
    path = pair[1] / "evaluation.json"
    rows = json.loads(path.read_text())
    rows["docs"]["bytes"] += 1
    path.write_text(json.dumps(rows))
    found = compare.compare(*pair)
    assert found["bits_per_byte"]["docs"]["difference"] is None
    assert found["bits_per_byte"]["code"]["difference"] == pytest.approx(-0.1)
    assert "Held-out bytes of docs differ (500 and 501): scores are not compared." in found["notes"]


def test_text_that_was_changed_is_named(pair):
    for index, folder in enumerate(pair):
        record = json.loads((folder / "run.json").read_text())
        record["data"] = {"code": {"fingerprint": f"{index}" * 64}}
        (folder / "run.json").write_text(json.dumps(record))
    assert "The text of code is not the same." in compare.compare(*pair)["notes"]


def test_the_page_and_the_terminal_have_the_same_tables(pair, tmp_path, capsys):
    found = compare.compare(*pair)
    compare.write_page(found, tmp_path / "page.html")
    compare.print_comparison(found)
    page, shown = (tmp_path / "page.html").read_text(), capsys.readouterr().err
    for title, rows in compare.tables_of(found).items():
        assert title in shown and title in page
        for cell in rows[-1]:
            assert cell.replace('"', "&quot;") in page
    assert "x0.5" in shown and (tmp_path / "page.png").read_bytes()[:4] == b"\x89PNG"


def test_folders_that_are_no_runs_are_refused(pair, tmp_path):
    with pytest.raises(UserError, match="must be the folder of a run"):
        compare.compare(pair[0], tmp_path)
    with pytest.raises(UserError, match="is given twice"):
        compare.compare(pair[0], f"{pair[0]}/")
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(UserError, match="is given twice"):
        compare.compare(pair[0], tmp_path / "link")
