"""Groups of arms are combined, and what they say of the same field is refused."""

import pytest

from lightning_jax.ablation import combine
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep

PATTERN = {"full": {"model.unit": "GG"}, "hybrid": {"model.unit": "LG"}}
WINDOW = {"w4": {"model.attention.window": 4}, "w8": {"model.attention.window": 8}}


def test_a_product_has_all_choices_and_the_last_group_varies_fastest():
    arms = combine.product(PATTERN, WINDOW, {"wide": {"model.mlp_dim": 96}})
    assert list(arms) == ["full_w4_wide", "full_w8_wide", "hybrid_w4_wide", "hybrid_w8_wide"]
    assert arms["hybrid_w4_wide"] == {
        "model.unit": "LG",
        "model.attention.window": 4,
        "model.mlp_dim": 96,
    }


def test_groups_are_zipped_in_order():
    arms = combine.zipped(PATTERN, WINDOW)
    assert arms == {
        "full_w4": {"model.unit": "GG", "model.attention.window": 4},
        "hybrid_w8": {"model.unit": "LG", "model.attention.window": 8},
    }


def test_a_chain_is_one_group_after_another():
    assert list(combine.chain(PATTERN, WINDOW)) == ["full", "hybrid", "w4", "w8"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: combine.product(PATTERN, {"x": {"model.unit": "G"}}), "groups change model.unit"),
        (lambda: combine.zipped(PATTERN, {"one": {}}), r"zipped\(\) = \[2, 1\]: must be equally"),
        (lambda: combine.chain(PATTERN, PATTERN), "two arms are named 'full'"),
        (
            lambda: combine.product({"a_b": {}, "a": {}}, {"c": {}, "b_c": {}}),
            "two arms are named 'a_b_c'",
        ),
    ],
)
def test_arms_that_would_be_two_things_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_results_are_new_and_groups_stay_as_they_were():
    combine.chain(PATTERN)["full"]["model.mlp_dim"] = 1
    combine.product(PATTERN)["full"]["model.mlp_dim"] = 1
    assert PATTERN["full"] == {"model.unit": "GG"}


def test_a_sweep_of_a_product_says_why_its_arms_change_several_factors():
    arms = combine.product(PATTERN, WINDOW)
    sweep = small_sweep(arms=arms, baseline="full_w4", several={"*": "all pairs"})
    # Two of the three others differ in one factor alone.
    assert sweep.several == {"hybrid_w8": "all pairs"}
    with pytest.raises(UserError, match="arm 'hybrid_w8': differs .* in 2 factors"):
        small_sweep(arms=arms, baseline="full_w4")
