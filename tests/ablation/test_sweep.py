"""A sweep file is checked whole before anything runs."""

from pathlib import Path

import pytest

from lightning_jax.ablation import sweep as sweeps
from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from tests.ablation.fake_runs import small_sweep

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
    assert list(sweep.arms) == ["G", "Gg", "LLLG", "LLLGLLLg"]


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
