"""A run's facts without a training: two stages, two domains, three tokens of text."""

from types import SimpleNamespace

import numpy as np

from lightning_jax.card.facts import Facts
from lightning_jax.data.compression import Compared
from lightning_jax.infer.readings import TextRouting
from lightning_jax.train.plan import Plan
from lightning_jax.train.record import Record
from tests.tiny import tiny_run

CONFIG = tiny_run("unread", model__vocab_size=272)
# Two layers of eight experts, at most two a token; 8 is an empty slot.
INDEX_RTC = np.array([[[0, 8], [1, 2], [3, 8]], [[0, 1], [0, 2], [3, 8]]])
SESSION = {
    "first_step": 1,
    "command": ["/somewhere/experiments/train.py", "--workdir=runs/a"],
    "versions": {"jax": "0.10"},
    "git_commit": "abc",
}


def facts(**changes):
    """The facts of the run after all of its steps."""
    plan = Plan.of(CONFIG)
    steps = plan.total_steps
    row = {"step": steps, "tokens": plan.total_tokens, "stage": CONFIG.stages[-1].name}
    run = SimpleNamespace(
        model=CONFIG.model, config=CONFIG, step=steps, loaded=SimpleNamespace(meta=plan.meta(steps))
    )
    values = dict(
        workdir="runs/<a>",
        run=run,
        rows=[{**row, "loss": 2.0, "tokens_per_second": plan.total_tokens / 60}],
        evaluation={
            "code": {"loss": 1.0, "tokens": 30, "bytes": 50, "experts_per_token": 3.0},
            "docs": {"loss": 1.0, "tokens": 10, "bytes": 40, "experts_per_token": 1.0},
        },
        record=Record({"data": {"code": {"fingerprint": "f" * 64}}, "sessions": [SESSION]}),
        held_out=[
            Compared("code", 100, 1.8, {"gzip -9": 2.0, "xz -9e": 1.6}),
            Compared("docs", 40, None, {"gzip -9": 2.0, "xz -9e": 1.6}),
        ],
        routing=TextRouting(("a<", "b", "\n"), (0, 1), INDEX_RTC, 8),
        sample="def x < y",
        changed=[("model.unit", "LLLGLLLg", "LG"), ("seed", None, 3)],
    )
    return Facts(**{**values, **changes})
