"""Critical values are those of the published tables."""

import numpy as np
import pytest
from scipy import stats

from lightning_jax.ablation.statistics import dunnett

# C. W. Dunnett, "New Tables for Multiple Comparisons with a Control", Biometrics 20 (1964),
# two-sided 5%, by degrees of freedom: 1, 2, 3, 4, 5, 6 and 9 arms.
TABLE = {
    5: (2.57, 3.03, 3.29, 3.48, 3.62, 3.73, 3.97),
    10: (2.23, 2.57, 2.76, 2.89, 2.99, 3.07, 3.24),
    20: (2.09, 2.38, 2.54, 2.65, 2.73, 2.80, 2.95),
    60: (2.00, 2.27, 2.41, 2.51, 2.58, 2.64, 2.77),
}


@pytest.mark.parametrize("degrees", TABLE)
def test_published_table(degrees):
    found = [dunnett.critical_value(count, degrees) for count in (1, 2, 3, 4, 5, 6, 9)]
    np.testing.assert_allclose(found, TABLE[degrees], atol=0.0101)


@pytest.mark.parametrize("degrees", [1, 2, 3, 10, 500])
@pytest.mark.parametrize("statistic", [0.0, 0.5, 2.0, 5.0, 30.0])
def test_one_arm_is_student(degrees, statistic):
    expected = 2 * stats.t.sf(statistic, degrees)
    assert dunnett.tail(statistic, 1, degrees) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_agrees_with_scipy():
    generator = np.random.default_rng(3)
    arms = [generator.normal(0.6 * index, 1, 6) for index in range(3)]
    control = generator.normal(0, 1, 6)
    found = stats.dunnett(*arms, control=control, rng=np.random.default_rng(0))
    expected = found.pvalue
    for statistic, p in zip(found.statistic, expected, strict=True):
        assert dunnett.tail(abs(statistic), 3, 20) == pytest.approx(p, abs=2e-3)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("count", [2, 10])
def test_the_tail_at_the_critical_value(count, correlation):
    critical = dunnett.critical_value(count, 4, 0.9, correlation)
    assert dunnett.tail(critical, count, 4, correlation) == pytest.approx(0.1, abs=1e-6)
    # Between one statistic and Bonferroni's bound, and the wider the less they go together.
    assert stats.t.ppf(0.95, 4) < critical < stats.t.ppf(1 - 0.05 / count, 4)
    assert critical > dunnett.critical_value(count, 4, 0.9, correlation + 0.2)


def test_infinity_has_no_tail():
    assert dunnett.tail(np.inf, 5, 3) == 0.0
