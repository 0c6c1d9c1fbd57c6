"""Another routing at inference than the run's."""

import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.config.routing import EvalRouting
from tests.tiny import tiny_model


def test_nothing_asked_for_changes_nothing():
    model = tiny_model()
    assert EvalRouting().of(model) is model
    assert EvalRouting(routing="top_p", top_p=0.2).of(model) == model
    dense = tiny_model(moe__num_experts=0)
    assert EvalRouting().of(dense) is dense


def test_another_routing():
    moe = EvalRouting(routing="top_k", top_k=3).of(tiny_model()).moe
    assert (moe.eval_routing, moe.top_k, moe.train_routing) == ("top_k", 3, "top_p")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(top_k=0), "^eval.top_k = 0: must be in"),
        (dict(top_p=float("nan")), r"^eval.top_p = nan: must be in \(0, 1\]"),
        (dict(top_p=1.5), r"^eval.top_p = 1.5: must be in \(0, 1\]"),
        (dict(routing="top_q"), "^eval.routing = 'top_q': must be one of top_k, top_p, dense"),
        (dict(top_k=2), "^eval.top_k = 2: needs --eval.routing=top_k, it is 'top_p'"),
        (dict(routing="top_k", top_p=0.5), "^eval.top_p = 0.5: needs --eval.routing=top_p"),
        (dict(routing="top_k", top_k=99), "top_k = 99"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        EvalRouting(**options).of(tiny_model())


def test_a_model_without_experts_has_no_routing():
    for routing in (EvalRouting(top_p=0.5), EvalRouting(routing="dense")):
        with pytest.raises(UserError, match="this run's model has no experts"):
            routing.of(tiny_model(moe__num_experts=0))
