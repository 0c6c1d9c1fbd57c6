"""Curves are window means; the page is one file and escapes what it is given."""

import base64
import json
import re

import numpy as np
import pytest

from lightning_jax.ablation import page
from lightning_jax.ablation.results import Run
from tests.ablation.fake_runs import small_sweep, write_rows, write_run


def log(folder, losses):
    folder.mkdir(parents=True)
    rows = [{"step": i, "tokens": 10 * i, "loss": loss} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_are_means_of_even_windows(tmp_path):
    runs = [Run("a", 0), Run("a", 1)]
    log(runs[0].folder(tmp_path), np.arange(80.0))
    log(runs[1].folder(tmp_path), np.arange(80.0) + 2)
    tokens, losses = page.curves(runs, tmp_path)["a"]
    assert losses.shape == (2, 40)
    np.testing.assert_allclose(tokens, np.arange(10, 800, 20))
    np.testing.assert_allclose(losses[0], np.arange(0.5, 80, 2))
    np.testing.assert_allclose(losses[1] - losses[0], 2)


def test_a_curve_ends_with_its_shortest_seed_and_gaps_are_bridged(tmp_path):
    runs = [Run("a", 0), Run("a", 1), Run("b", 0)]
    log(runs[0].folder(tmp_path), [4.0, 3.0, 2.0, 1.0])
    log(runs[1].folder(tmp_path), [4.0, None])
    found = page.curves(runs, tmp_path)
    assert list(found) == ["a"]
    tokens, losses = found["a"]
    assert tokens.tolist() == [5.0] and losses.tolist() == [[4.0], [4.0]]


@pytest.mark.parametrize("costs", [(4096, 2048), (4096, 4096)])
def test_plot_is_a_png_whatever_the_costs_and_seeds(costs):
    arms = [
        {
            "arm": f"arm{i}",
            "seeds": [0],
            "bits_per_byte": {"mean": 2.0, "std": None, "min": 2.0, "max": 2.0, "by_seed": [2.0]},
            "costs": {"kv_bytes_per_token": cost},
        }
        for i, cost in enumerate(costs)
    ]
    arms.append({"arm": "lost", "seeds": []})
    image = page.plot({"arms": arms, "context": 65536}, {})
    assert image.startswith(b"\x89PNG")


def test_the_page_holds_everything_and_escapes_it(tmp_path):
    report = {
        "question": "Is <b> cheaper & better?",
        "seeds": [0, 1],
        "arms": [
            {"arm": "a", "changes": {"model.unit": "<G>"}, "domains": {"code": 1.25}},
            {"arm": "lost", "changes": {}},
        ],
    }
    text = page.build(
        report, ["arm", "x"], [["a", "<1"]], ["lost & found"], b"png", "python -m <x>"
    )
    for part in ("Is &lt;b&gt; cheaper &amp; better?", "<td>&lt;1</td>", "model.unit = &lt;G&gt;"):
        assert part in text
    for part in ("lost &amp; found", "<td>1.2500</td>", "python -m &lt;x&gt;", "<td>nothing</td>"):
        assert part in text
    assert base64.b64decode(re.search(r"base64,([^\"]*)", text)[1]) == b"png"
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_origin_names_each_command_commit_and_version_once(tmp_path):
    sweep = small_sweep()
    for run in sweep.runs()[:2]:
        write_run(sweep.config(run), run.folder(tmp_path))
    write_rows(sweep.runs()[2].folder(tmp_path), 1)
    assert page.origin(sweep.runs(), tmp_path).splitlines() == [
        "python -m experiments.sweep '--sweep=a b.py'",
        "commit abc",
        "jax 0.10",
    ]
