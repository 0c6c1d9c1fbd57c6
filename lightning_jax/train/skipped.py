"""Steps that were skipped because their loss or gradient was not finite (`on_nan = "skip"`)."""

from __future__ import annotations

import math

# A skipped step changes no weight. Where this many different batches in a row give no finite loss
# or gradient, the next ones will not either.
MOST_IN_A_ROW = 100


class SkippedSteps:
    """Counts the skipped steps that follow one another, from the counter of the train state."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._in_a_row = 0

    def count(self, bad_steps: int, loss: float) -> int:
        """Returns how many steps up to this one were skipped in a row.

        Args:
          bad_steps: skipped steps of the run up to this one.
          loss: of this step.
        """
        # The counter goes on from the checkpoint: the first step of a session has none before it.
        skipped = not math.isfinite(loss) if self._total is None else bad_steps > self._total
        self._total = bad_steps
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        return self._in_a_row


def summary(skipped: int, steps: int) -> str:
    """Returns the line that says how many of a run's steps were skipped."""
    return f"{skipped} of {steps} steps skipped: their loss or gradient was not finite"
