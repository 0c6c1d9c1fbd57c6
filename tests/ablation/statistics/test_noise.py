"""Signal, noise and the bootstrap are right where the answer is known."""

import math

import numpy as np
import pytest

from lightning_jax.ablation.statistics.noise import (
    SIGNAL_TO_NOISE,
    bootstrap_documents,
    checkpoint_noise,
    signal_to_noise,
)
from lightning_jax.config.errors import UserError


def simulate(generator, signal, seeds=4, arms=6):
    """Scores with noise of deviation 1, arms of deviation `signal`, seeds that differ wildly."""
    effects = generator.normal(0, signal, arms)
    seed_effects = 30 * generator.standard_t(2, size=seeds)
    return {
        f"arm{index}": dict(enumerate(seed_effects + effect + generator.normal(size=seeds)))
        for index, effect in enumerate(effects)
    }


def test_by_hand():
    # Means 1, 2 and 6 have variance 7. Residuals: four of +-0.1, two of 0; 2 degrees of freedom.
    scores = {"a": {0: 1.1, 1: 0.9}, "b": {0: 1.9, 1: 2.1}, "c": {0: 6.0, 1: 6.0}}
    noise = 4 * 0.1**2 / 2
    assert signal_to_noise(scores) == pytest.approx(math.sqrt((7 - noise / 2) / noise))
    assert signal_to_noise(scores, noise=2.0) == pytest.approx(math.sqrt((7 - 4 / 2) / 4))


@pytest.mark.parametrize("signal", [0.0, 3.0])
def test_the_ratio_is_that_of_the_simulation(signal):
    generator = np.random.default_rng(1)
    ratios = [signal_to_noise(simulate(generator, signal)) for _ in range(300)]
    if signal:
        assert np.median(ratios) == pytest.approx(signal, rel=0.15)
    else:
        assert np.mean(np.array(ratios) > SIGNAL_TO_NOISE) <= 0.05


def test_missing_runs_are_left_out():
    scores = simulate(np.random.default_rng(0), 3.0)
    expected = signal_to_noise({arm: scores[arm] for arm in list(scores)[:5]})
    scores["arm5"] = {2: scores["arm5"][2]}
    assert signal_to_noise(scores) == pytest.approx(expected)
    del scores["arm0"][0], scores["arm3"][2]
    assert signal_to_noise(scores) > 0


def test_unknown_and_extreme_ratios():
    assert signal_to_noise({}) is None
    assert signal_to_noise({"a": {0: 1.0, 1: 2.0}}) is None
    one_seed = {"a": {0: 1.0}, "b": {0: 3.0}}
    assert signal_to_noise(one_seed) is None
    assert signal_to_noise(one_seed, noise=0.5) == pytest.approx(math.sqrt((2 - 0.25) / 0.25))
    exact = {"a": {0: 1.0, 1: 2.0}, "b": {0: 1.0, 1: 2.0}}
    assert signal_to_noise(exact) == 0
    assert signal_to_noise({**exact, "b": {0: 1.5, 1: 2.5}}) == math.inf


def test_checkpoints_of_a_run_that_still_learns():
    assert checkpoint_noise([5.0, 4.0, 3.0, 2.0]) == pytest.approx(0, abs=1e-12)
    # Residuals of a line of slope -1: +-0.3 at the ends, with the slope that they add.
    assert checkpoint_noise([1.0, 2.0, 1.0]) == pytest.approx(math.sqrt(6) / 3)
    assert checkpoint_noise([1.0, 2.0]) is None
    generator = np.random.default_rng(0)
    found = [checkpoint_noise(-2 * np.arange(6) + generator.normal(size=6)) for _ in range(2000)]
    assert np.mean(np.square(found)) == pytest.approx(1, abs=0.05)


def test_the_bootstrap_covers_the_truth_at_its_rate():
    generator = np.random.default_rng(0)
    covered = []
    for seed in range(200):
        sizes = generator.integers(50, 500, 150)
        nats = sizes * 0.7 * generator.gamma(20, 1 / 20, 150)
        low, high = bootstrap_documents(nats, sizes, draws=400, seed=seed)
        covered.append(low <= 0.7 / math.log(2) <= high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.045)


def test_the_bootstrap_of_documents_that_are_alike():
    low, high = bootstrap_documents([10.0, 20.0, 30.0], [10, 20, 30])
    assert (low, high) == pytest.approx((1 / math.log(2),) * 2)
    assert bootstrap_documents([1.0, 4.0, 2.0], [2, 3, 4]) == bootstrap_documents(
        np.array([1.0, 4.0, 2.0]), np.array([2, 3, 4])
    )


@pytest.mark.parametrize(
    ("nats", "sizes", "message"),
    [
        ([1.0, 2.0], [1], "bytes_D = .*as nats_D"),
        ([1.0], [1], "nats_D = .*two documents or more"),
        ([1.0, 2.0], [3, 0], "bytes_D = 0.0: must be above 0"),
    ],
)
def test_bad_documents(nats, sizes, message):
    with pytest.raises(UserError, match=message):
        bootstrap_documents(nats, sizes)
