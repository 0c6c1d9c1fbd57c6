"""How far a run is comes from the end of its log, whatever state that is in."""

import pytest

from lightning_jax.ablation.tasks import Progress, Task
from lightning_jax.train.plan import Plan
from tests.ablation.fake_runs import small_sweep, write_rows

CONFIG = small_sweep().config(small_sweep().runs()[0])
PLAN = Plan.of(CONFIG)
NOTHING = Progress(0, PLAN.total_steps)


def test_progress_is_that_of_the_last_logged_step(tmp_path):
    # Rows of 100 tokens and, after the first, 100 tokens a second.
    write_rows(tmp_path, 7)
    found = Progress.of(Task("a", CONFIG, tmp_path))
    assert (found.step, found.steps, found.speed) == (7, PLAN.total_steps, 100.0)
    assert found.left == pytest.approx((PLAN.total_tokens - 700) / 100)
    assert found.loss is not None


@pytest.mark.parametrize(
    "end",
    [
        '{"step": 8, "eval": {"code": {"loss": 2.0}}}\n',
        '{"step": 8, "tokens": 800, "loss": 1.0, "tokens_per_sec',
    ],
)
def test_what_follows_the_last_whole_step_is_left_out(tmp_path, end):
    write_rows(tmp_path, 7)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(end)
    assert Progress.of(Task("a", CONFIG, tmp_path)).step == 7


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[1]\n",
        "nothing\n",
        '{"tokens_per_second"\n',
        '{"step": 1, "tokens": 9, "loss": null, "tokens_per_second": 0}\n',
        '["tokens_per_second"]\n',
    ],
)
def test_a_log_without_a_step_says_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert Progress.of(Task("a", CONFIG, tmp_path)) == NOTHING


def test_a_loss_that_was_not_finite_is_not_known(tmp_path):
    row = '{"step": 1, "tokens": 9, "loss": null, "tokens_per_second": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    found = Progress.of(Task("a", CONFIG, tmp_path))
    assert (found.step, found.loss) == (1, None)
