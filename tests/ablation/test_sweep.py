"""A sweep file is checked whole before anything runs."""

import dataclasses
import json
from pathlib import Path

import pytest

from lightning_jax.ablation import sweep as sweeps
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep
from tests.tiny import tiny_config

SWEEPS = Path(__file__).resolve().parents[2] / "configs" / "sweeps"


# Case F4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(arms={"full": {"model.unti": "G"}}), "field model.unti: did you mean model.unit"),
        (dict(arms={"full": {"model.unit.x": "G"}}), "model.unit has no fields"),
        (dict(arms={"full": {"model.unit": "l"}}), "arm 'full': model.unit = 'l'"),
        (dict(arms={"full": {"model.unit": 3}}), "arm 'full': model.unit = 3"),
        (dict(arms={"full": {"seed": 3}}), "seed cannot be changed"),
        (dict(arms={"full": "G"}), "arms.full = 'G'"),
        (dict(arms={"a/b": {}}, baseline="a/b"), "arms = 'a/b'"),
        (dict(arms={"full": {}, "Full": {}}), "different without case"),
        (dict(arms={}), "at least one arm"),
        (dict(baseline="ful"), 'baseline = .ful.: .*did you mean "full"'),
        (dict(seeds=()), r"seeds = \(\)"),
        (dict(seeds=(0, 0)), "different numbers"),
        (dict(seeds=(0, True)), "one or more numbers"),
        (dict(seeds=3), "seeds = 3: must be a list"),
        (dict(question=" "), "question = ' '"),
        (dict(bse={}), 'unknown sweep field bse: .*did you mean "base"'),
        *(
            (dict(arms={name: {}}, baseline=name), f"arms = '{name}': must be another name")
            for name in ("search", "Compiled", "submitit", "results.csv", "report_x.png")
        ),
        (dict(arms={"a" * 101: {}}, baseline="a" * 101), "at most 100 letters"),
        (dict(factors=["model.unit"]), "factors = .*: must be a mapping"),
        (dict(factors={"pattern": []}), r"factors.pattern = \[\]: must be a list of fields"),
        (dict(factors={"pattern": "model.unit"}), "factors.pattern = 'model.unit': must be a list"),
        (
            dict(factors={"pattern": ["model.uni"]}),
            "factors.pattern = 'model.uni': there is no such field",
        ),
        (dict(several={"hybird": "?"}), 'several = .hybird.: .*did you mean "hybrid"'),
        (dict(several={"hybrid": 3}), "several.hybrid = 3: must be text"),
        (dict(several={"hybrid": "?"}), "several.hybrid = '.': must be left out: .* in one factor"),
        (dict(several={"full": "?"}), "several.full = '.': must be left out: .* in nothing"),
        (dict(budget="flop"), 'budget = .flop.: .*did you mean "flops"'),
        (dict(scaling=0.5), "scaling = 0.5: must be a list"),
        (dict(scaling=[1.0]), r"scaling = \(1.0,\): must be shares of the tokens"),
        (dict(scaling=[0]), r"scaling = \(0,\): must be shares"),
        (dict(scaling=[1.0000001]), r"scaling = .* but not 1"),
        (dict(scaling=[2, 2.0]), r"scaling = \(2, 2.0\): must be different"),
        (dict(search={"trails": 3}), 'search = .trails.: .*did you mean "trials"'),
        (dict(search={"trials": 2}), r"search: trials = 2: must be a whole number in \[3"),
        (dict(inference={"a/b": {"top_k": 2}}), "inference = 'a/b': must be named with at most"),
        (dict(inference={"a": 0.5}), r'inference.a = 0.5: must be a routing, such as {"top_p"'),
        (dict(inference={"a": {}}), r"inference.a = {}: must be a routing"),
        (dict(inference={"a": {"top_k": 2}}), "inference = .*: must be left out: no arm has exp"),
        (dict(inference={"a": {"topk": 2}}), 'inference.a = .topk.: .*did you mean "top_k"'),
        (dict(inference={"a": {"top_k": 0}}), "inference.a: top_k = 0: must be a whole number"),
        (dict(inference={"a": {"routing": "top"}}), "eval.routing = 'top': must be one of top_k"),
        (dict(search={"low": 4.0}), "search.high = 3.0: must be above search.low = 4.0"),
    ],
)
def test_a_bad_sweep_is_refused_with_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        small_sweep(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [(dict(only=["ful"]), 'did you mean "full"'), (dict(seeds=[7]), "seeds = 7: must be one of 0")],
)
def test_a_selection_that_is_not_in_the_sweep_is_refused(chosen, message):
    with pytest.raises(UserError, match=message):
        small_sweep().runs(**chosen)


def test_the_pattern_sweep_compares_equal_depth_and_changes_reach_every_arm():
    sweep = sweeps.load_sweep(SWEEPS / "pattern.py", {"stages.stable.tokens": 100_000})
    configs = [sweep.config(Run(arm, 1)) for arm in sweep.arms]
    assert {config.model.num_layers for config in configs} == {8}
    assert {config.stages[0].tokens for config in configs} == {100_000}
    assert {config.seed for config in configs} == {1}
    # Both the pattern and the window, which full attention has not, differ from the baseline's.
    assert [*sweep.several] == [arm for arm in sweep.arms if arm != "G"]


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_shipped_sweeps_change_one_factor_per_arm_or_say_why(path):
    sweep = sweeps.load_sweep(path)
    assert sweep.baseline not in sweep.several


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"s.py: it has no function get_sweep"),
        ("def get_sweep():\n    return 1 / 0", r"s.py:2: ZeroDivisionError"),
        ("def get_sweep(:", r"s.py:1: SyntaxError"),
        ("def get_sweep():\n    return None", r"get_sweep\(\) = None"),
        ("def get_sweep():\n    return {}", "question is missing"),
        ("import sys\ndef get_sweep():\n    sys.exit(0)", r"s.py:3: SystemExit: 0"),
        ("import sys\nsys.exit(0)", r"s.py:2: SystemExit: 0"),
    ],
)
def test_a_bad_sweep_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "s.py").write_text(text)
    with pytest.raises(UserError, match=message):
        sweeps.load_sweep(tmp_path / "s.py")


# A difference that is none: the controller moves every arm to the same number of experts.


@pytest.mark.parametrize("is_flag", [False, True])
def test_an_arm_that_seems_to_fix_top_p_is_refused(tmp_path, is_flag):
    text = (
        "from configs import base\ndef get_sweep():\n    arms = dict(low={arm}, high={{}})\n"
        "    return dict(question='?', base=base.get_config(), baseline='high', arms=arms, "
        "seeds=(0,))\n"
    )
    changes = {"model.moe.top_p": 0.3}
    path, given = tmp_path / "s.py", changes if is_flag else {}
    path.write_text(text.format(arm={} if is_flag else changes))
    with pytest.raises(UserError, match="arm 'low': model.moe.top_p=0.3 is only where the"):
        sweeps.load_sweep(path, given)
    arms = sweeps.load_sweep(path, {**given, "model.moe.target_experts": 0}).arms
    assert list(arms) == ["low", "high"]


def test_an_arm_adds_a_source_to_every_stage():
    arms = {"full": {}, "more": {"data.sources.poems": "poems.txt"}}
    sweep = small_sweep(arms=arms)
    run = sweep.config(Run("more", 0))
    assert all("poems" in run.data.weights(stage) for stage in run.stages)
    assert "poems" not in sweep.config(Run("full", 0)).data.source_names


def test_a_missing_sweep_file_suggests_one():
    with pytest.raises(UserError, match='did you mean ".*pattern.py"'):
        sweeps.load_sweep(SWEEPS / "patern.py")


def test_an_arm_that_changes_two_factors_must_say_so():
    two = {"model.unit": "LG", "model.attention.window": 4}
    arms = {**small_sweep().arms, "both": two}
    message = (
        r"arm 'both': differs from the baseline 'full' in 2 factors, model.unit, "
        r"model.attention.window: name those that are one in `factors`, or say why in "
    )
    with pytest.raises(UserError, match=message) as error:
        small_sweep(arms=arms)
    assert "\n" not in str(error.value)
    assert small_sweep(arms=arms, several={"both": "why"}).several == {"both": "why"}
    assert small_sweep(arms=arms, several={"*": "why"}).several == {"both": "why"}
    assert not small_sweep(arms=arms, factors={"reach": [*two]}).several
    # Against another baseline, one factor differs.
    apart = {"hybrid": arms["hybrid"], "both": two}
    assert not small_sweep(arms=apart, baseline="hybrid").several


def test_the_baseline_is_trained_with_other_tokens_too():
    sweep = small_sweep(scaling=[0.5, 2], seeds=(3, 4))
    assert sweep.scaling_arms == {"full@0.5": 0.5, "full@2": 2}
    assert [str(run) for run in sweep.runs()][-5:] == [
        "hybrid seed 4",
        "full@0.5 seed 3",
        "full@2 seed 3",
        "full@0.5 seed 4",
        "full@2 seed 4",
    ]
    whole, half = (sweep.config(Run(arm, 3)) for arm in ("full", "full@0.5"))
    assert half.model == whole.model and half.seed == 3
    assert [stage.tokens for stage in half.stages] != [stage.tokens for stage in whole.stages]
    only = sweep.runs(only=["full@2"], seeds=[4])
    assert only == [Run("full@2", 4)]


def test_tokens_and_rates_of_all_stages_follow_their_factors():
    sweep = small_sweep()
    stages = sweep.config(Run("full", 0)).stages
    assert sweep.config(Run("full", 0), tokens=1.0, rate=1.0).stages == stages
    for before, after in zip(stages, sweep.config(Run("full", 0), 0.5, 2.0).stages, strict=True):
        step = before.batch_size * before.seq_len
        assert after.tokens % step == 0
        assert abs(after.tokens - before.tokens / 2) <= step
        for name in ("warmup_tokens", "decay_tokens"):
            share = getattr(before, name) / before.tokens
            assert getattr(after, name) == pytest.approx(share * after.tokens, abs=1)
        assert after.learning_rate == 2 * before.learning_rate
    shortest = sweep.config(Run("full", 0), tokens=1e-9).stages
    assert all(s.warmup_tokens + s.decay_tokens <= s.tokens for s in shortest)
    # What is scaled are the whole steps that a run rounds a stage up to.
    changes = dict(stages__stable__tokens=5000, stages__stable__warmup_tokens=0)
    changes |= dict(stages__decay__tokens=1, stages__decay__decay_tokens=1)
    uneven = small_sweep(base=tiny_config(**changes)).config(Run("full", 0), tokens=1.5).stages
    assert [stage.tokens for stage in uneven] == [3 * 4096, 2 * 4096]


def test_a_search_has_defaults():
    assert small_sweep().search == {}
    assert small_sweep(search={"trials": 4}).search == {
        "trials": 4,
        "low": 0.3,
        "high": 3.0,
        "tokens": 1.0,
    }


def test_a_sweep_is_its_json():
    sweep = small_sweep(
        base=tiny_config(),
        factors={"pattern": ["model.unit"]},
        budget="flops",
        scaling=[0.5, 2.0],
        search={"trials": 4},
        inference={"few": {"routing": "top_p", "top_p": 0.3}},
        margin=0.01,
    )
    assert sweeps.build_sweep(json.loads(json.dumps(dataclasses.asdict(sweep)))) == sweep
