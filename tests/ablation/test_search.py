"""A search finds the best learning rate of each arm, says what it cost, and can be interrupted."""

import json
import math
from types import SimpleNamespace

import pytest

from lightning_jax.ablation import search
from lightning_jax.ablation.results import Run, run_row
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep, write_run

pytest.importorskip("optuna")

ARMS = ("full", "shared", "hybrid")
SCALES = {"full": 1.0, "shared": 1.0, "hybrid": 0.5}
# By number of local layers and borrowed keys: the factor at which an arm is best.
BEST = {"GG": 1.2, "Gg": 0.5, "LG": 9.0}


@pytest.fixture
def pool():
    """Trains without work: arms are best at `BEST`; has `trained` and `broken` tasks."""
    sweep, trained, broken = searched(), [], {}

    def train(tasks):
        for task in tasks:
            trained.append(task)
            if any(word in task.name for word in broken):
                yield task, "loss is not finite"
                continue
            base = sweep.config(Run("full", 0)).stages[0].learning_rate
            factor = task.config.stages[0].learning_rate / base
            best = BEST[task.config.model.unit]
            write_run(task.config, task.folder, code=2 + math.log(factor / best) ** 2)
            yield task, None

    return SimpleNamespace(train=train, trained=trained, broken=broken)


def searched(**changes):
    return small_sweep(search={"trials": 6, "low": 0.3, "high": 3.0, "tokens": 0.5} | changes)


def test_each_arm_gets_its_best_factor(tmp_path, pool):
    sweep = searched()
    found = search.factors(sweep, tmp_path, ARMS, SCALES, pool)
    assert found["full"] == pytest.approx(1.2, rel=0.35)
    assert found["shared"] == pytest.approx(0.5, rel=0.35)
    assert found["hybrid"] == 3.0
    assert len(pool.trained) == 18
    kept = json.loads((tmp_path / "search.json").read_text())
    for arm, record in kept.items():
        assert len(record["trials"]) == 6
        best = min(record["trials"], key=lambda trial: trial["bits_per_byte"])
        assert record["factor"] == best["factor"] == found[arm]
        rows = [run_row(Run(arm, 0), tmp_path / "search" / arm / f"trial_{k}") for k in range(6)]
        for name in ("seconds", "train_flops"):
            assert record[name] == pytest.approx(sum(row[name] for row in rows))
    assert {arm: record["edge"] for arm, record in kept.items()} == {
        "full": None,
        "shared": None,
        "hybrid": "high",
    }


def test_trials_are_those_of_the_arm_with_less_text_and_another_seed(tmp_path, pool):
    sweep = searched()
    search.factors(sweep, tmp_path, ARMS, SCALES, pool)
    for task in pool.trained:
        arm = task.folder.parent.name
        plain = sweep.config(Run(arm, 0), tokens=0.5 * SCALES[arm])
        assert task.config.seed not in sweep.seeds
        for now, before in zip(task.config.stages, plain.stages, strict=True):
            assert now.tokens == before.tokens
            share = now.learning_rate / before.learning_rate
            assert 0.3 <= share <= 3.0 + 1e-9
            assert now.final_learning_rate == pytest.approx(before.final_learning_rate * share)
    # The grid is the same for all arms, and comes first.
    assert [task.name for task in pool.trained[:4]] == [
        f"full trial {k}, learning rate times {factor}"
        for k, factor in enumerate(("0.3", "0.646", "1.39", "3"))
    ]


def test_an_interrupted_search_goes_on_as_if_nothing_had_happened(tmp_path, pool):
    sweep = searched()
    whole = search.factors(sweep, tmp_path / "whole", ARMS, SCALES, pool)
    train, pool.trained[:] = pool.train, []

    def interrupted(tasks):
        for found in train(tasks):
            yield found
            if len(pool.trained) == 14:
                raise SystemExit(143)

    with pytest.raises(SystemExit):
        arms = (sweep, tmp_path / "cut", ARMS, SCALES)
        search.factors(*arms, SimpleNamespace(train=interrupted))
    assert not (tmp_path / "cut" / "search.json").exists()
    assert search.factors(*arms, pool) == whole
    assert len(pool.trained) == 18
    assert search.factors(*arms, None) == whole
    texts = [(tmp_path / name / "search.json").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_a_failed_trial_is_no_best_one_and_an_arm_may_have_none(tmp_path, pool, caplog):
    pool.broken.update({"full trial 2": 1, "shared": 1})
    sweep = searched()
    found = search.factors(sweep, tmp_path, ARMS, SCALES, pool)
    assert set(found) == {"full", "hybrid"}
    trials = json.loads((tmp_path / "search.json").read_text())["full"]["trials"]
    assert trials[2]["bits_per_byte"] is None and trials[2]["failure"] == "loss is not finite"
    assert "full trial 2, learning rate times 1.39 failed: loss is not finite" in caplog.text
    # What failed is tried again.
    pool.broken.clear()
    pool.trained.clear()
    assert set(search.factors(sweep, tmp_path, ARMS, SCALES, pool)) == set(ARMS)
    assert {task.folder.parent.name for task in pool.trained} == {"shared"}


def test_a_best_rate_at_the_edge_is_said_each_time(tmp_path, pool, caplog):
    for given in (pool, None):
        caplog.clear()
        search.factors(searched(), tmp_path, ["hybrid"], SCALES, given)
        assert "arm 'hybrid'" in caplog.text and "search.high = 3: widen it" in caplog.text


def test_without_a_search_all_rates_are_those_of_the_config(tmp_path):
    assert search.factors(small_sweep(), tmp_path, ARMS, SCALES, None) == dict.fromkeys(ARMS, 1.0)
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_of_another_search_is_refused(tmp_path, pool):
    with pytest.raises(UserError, match="arm 'full': its learning rate has not been searched"):
        search.factors(searched(), tmp_path, ARMS, SCALES, None)
    search.factors(searched(), tmp_path, ARMS, SCALES, pool)
    with pytest.raises(UserError, match="tokens = .*: full trial 0, .* in this workdir has"):
        search.factors(searched(trials=7, tokens=1.0), tmp_path, ARMS, SCALES, pool)
    (tmp_path / "search.json").write_text('{"full": {"factor": -1}}')
    with pytest.raises(UserError, match="search.json: full"):
        search.factors(searched(), tmp_path, ARMS, SCALES, pool)


def test_a_search_between_other_rates_is_another_search(tmp_path, pool):
    search.factors(searched(), tmp_path, ARMS, SCALES, pool)
    with pytest.raises(UserError, match="search.low = 0.2, search.high = 3: .* of arm 'full'"):
        search.factors(searched(low=0.2), tmp_path, ARMS, SCALES, None)
    with pytest.raises(UserError, match="tokens = .*: full trial 0, .* in this workdir has"):
        search.factors(searched(tokens=1.0), tmp_path, ARMS, SCALES, None)
