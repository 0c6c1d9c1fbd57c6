"""How many steps were skipped, in a row and in all."""

import math

import pytest

from lightning_jax.train.skipped import SkippedSteps, summary

NAN = math.nan


# Case D2
@pytest.mark.parametrize(
    ("steps", "in_a_row"),
    [
        ([(1.0, 0), (1.0, 0)], [0, 0]),
        ([(NAN, 1), (NAN, 2), (1.0, 2), (NAN, 3)], [1, 2, 0, 1]),
        # A gradient that is not finite under a finite loss.
        ([(1.0, 0), (1.0, 1), (1.0, 2)], [0, 1, 2]),
        # A resumed run: what was skipped before the session is not in this row.
        ([(1.0, 7), (NAN, 8), (math.inf, 9)], [0, 1, 2]),
    ],
)
def test_steps_skipped_in_a_row(steps, in_a_row):
    skipped = SkippedSteps()
    assert [skipped.count(bad_steps, loss) for loss, bad_steps in steps] == in_a_row


def test_the_last_line_of_a_run():
    assert summary(28, 30) == "28 of 30 steps skipped: their loss or gradient was not finite"
