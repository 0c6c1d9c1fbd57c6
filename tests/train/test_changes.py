"""What a resumed run may change: the table, in the code and in the docs, and what it decides."""

import dataclasses
import fnmatch
import re
from pathlib import Path

import pytest

from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, to_dict
from lightning_jax.train import changes
from lightning_jax.train.plan import Plan
from tests.tiny import tiny_run

CONFIG = tiny_run("corpus.jsonl", model__vocab_size=272)
STEPS = [segment.end_step for segment in Plan.of(CONFIG).segments]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "runs.md"


def changed(path, value):
    """The config with one dotted field set."""
    values = to_dict(CONFIG)
    *parents, last = path.split(".")
    target = values
    for name in parents:
        target = target[name]
    target[last] = value
    return build(RunConfig, values)


def check(config, steps):
    """Checks a config against CONFIG after so many steps; None is without a checkpoint."""
    saved = None if steps is None else Plan.of(CONFIG).meta(steps)
    return changes.check(to_dict(CONFIG), to_dict(config), saved)


# The steps of the checkpoint to resume from: none before any checkpoint, one in the first
# stage, at its end, in the second stage, at the end of the run.
CASES = (None, 1, STEPS[0], STEPS[0] + 1, STEPS[1])
ALWAYS, NEVER = (True,) * 5, (False,) * 5
SECOND = (False, False, False, True, True)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("seed", 7, ALWAYS),
        ("model.unit", "G", ALWAYS),
        ("model.vocab_size", 288, ALWAYS),
        ("model.compute_dtype", "bfloat16", ALWAYS),
        ("model.attention.rope_base_global", 40_000.0, ALWAYS),  # a stage has no base of its own
        ("model.moe.z_weight", 0.5, ALWAYS),
        ("optimizer.clip_norm", 2.0, ALWAYS),
        ("optimizer.weight_decay", 0.5, ALWAYS),
        ("data.packing", "first_fit", ALWAYS),
        ("data.tokenizer", "bpe:300", ALWAYS),
        ("data.eval_fraction", 0.25, ALWAYS),
        ("stages.stable.mixture.a", 0.5, ALWAYS),
        ("stages.stable.batch_size", 8, ALWAYS),
        ("stages.stable.warmup_tokens", 128, ALWAYS),
        ("stages.decay.batch_size", 8, SECOND),
        ("stages.decay.tokens", 4096, SECOND),
        ("data.sources.a.path", "other.jsonl", NEVER),  # if its text is the same: see test_start
        ("stages.stable.accumulate", 2, NEVER),
        ("model.remat", "full", NEVER),
        ("model.moe.implementation", "blocked", NEVER),
        ("model.moe.transport", "all_gather", NEVER),
        ("model.moe.exchange_rows", 0.25, NEVER),
        ("model.moe.capacity_factor", 1.0, ALWAYS),
        ("data.prefetch", 0, NEVER),
        ("log_every", 50, NEVER),
        ("checkpoint_every", 50, NEVER),
        ("eval_tokens", 50, NEVER),
        ("sample_prompt", "class ", NEVER),
        ("mesh.fsdp", 2, NEVER),
        # Case A5: what the error of a loss that is not finite advises.
        ("optimizer.on_nan", "skip", NEVER),
        ("stages.stable.learning_rate", 1e-4, (False, False, False, True, True)),
        ("stages.decay.learning_rate", 1e-4, NEVER),
        ("stages.decay.final_learning_rate", 1e-5, NEVER),
    ],
)
def test_what_a_resumed_run_may_change(field, value, refused):
    other = changed(field, value)
    for steps, refuse in zip(CASES, refused, strict=True):
        if not refuse:
            assert [name for name, _, _ in check(other, steps)] == [field]
            continue
        with pytest.raises(UserError) as error:
            check(other, steps)
        assert str(error.value).startswith(f"{field} = {value!r}: this workdir's run has ")
        assert "\n" not in str(error.value)
    # The advice of that line, "the run's own value".
    assert all(check(CONFIG, steps) == [] for steps in CASES)


def leaves(values, path=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}"


@pytest.mark.parametrize("field", [*leaves(to_dict(CONFIG))])
def test_every_field_is_fixed_but_those_of_the_table(field):
    """In the first stage; values need not be valid, for the comparison comes after them."""
    values = to_dict(CONFIG)
    *parents, last = field.split(".")
    target = values
    for name in parents:
        target = target[name]
    target[last] = "another"
    is_later = field.startswith("stages.decay.")
    times = {changes.ALWAYS, changes.SAME_TEXT} | ({changes.LATER} if is_later else set())
    times |= {changes.CURRENT} if field.startswith("stages.") else set()
    patterns = [p for rule in changes.MAY_CHANGE if rule.when in times for p in rule.fields]
    saved = Plan.of(CONFIG).meta(1)
    if any(fnmatch.fnmatchcase(field, pattern) for pattern in patterns):
        assert [name for name, _, _ in changes.check(to_dict(CONFIG), values, saved)] == [field]
    else:
        with pytest.raises(UserError, match=f"^{re.escape(field)} = 'another'"):
            changes.check(to_dict(CONFIG), values, saved)


@pytest.mark.parametrize("steps", CASES)
def test_the_base_of_a_model_whose_stages_have_their_own(steps):
    """A model read from the newest checkpoint (configs/imported.py) has the base of its stage."""
    stages = tuple(dataclasses.replace(stage, rope_base_global=5e4) for stage in CONFIG.stages)
    before = to_dict(dataclasses.replace(CONFIG, stages=stages))
    now = to_dict(
        dataclasses.replace(changed("model.attention.rope_base_global", 5e4), stages=stages)
    )
    saved = None if steps is None else Plan.of(CONFIG).meta(steps)
    field = "model.attention.rope_base_global"
    assert changes.check(before, now, saved) == [(field, 1e4, 5e4)]


def test_stages_that_have_not_begun_come_and_go():
    stable, decay = CONFIG.stages
    more = dataclasses.replace(decay, name="more")

    def after(steps, *stages):
        return check(dataclasses.replace(CONFIG, stages=stages), steps)

    for stages in ((stable,), (stable, more), (stable, more, decay), (stable, decay, more)):
        after(STEPS[0], *stages)
    after(STEPS[1], stable, decay, more)
    # Case A3, and its neighbours: a stage that was passed, another order, another name.
    for stages in ((stable,), (stable, more)):
        message = "checkpoint 10 belongs to stage 'decay', which the config lacks"
        with pytest.raises(UserError, match=rf"^stages = \[.*\]: {message}; use another"):
            after(STEPS[1], *stages)
    for stages in ((decay,), (decay, stable), (stable, more, decay), (more, decay)):
        with pytest.raises(UserError, match=r"^stages = \[.*\]: must begin with \['stable', 'de"):
            after(STEPS[1], *stages)
    with pytest.raises(UserError, match=r"must begin with \['stable'\]"):
        after(None, more)


def test_stages_that_have_not_begun_change_places():
    more = dataclasses.replace(CONFIG.stages[1], name="more")
    longer = to_dict(dataclasses.replace(CONFIG, stages=(*CONFIG.stages, more)))
    turned = to_dict(dataclasses.replace(CONFIG, stages=(CONFIG.stages[0], more, CONFIG.stages[1])))
    changes.check(longer, turned, Plan.of(CONFIG).meta(STEPS[0]))
    with pytest.raises(UserError, match="must begin with"):
        changes.check(longer, turned, Plan.of(CONFIG).meta(STEPS[1]))


def test_a_source_that_comes_or_goes_is_another_run():
    values = to_dict(CONFIG)
    values["data"]["sources"]["c"] = {**values["data"]["sources"]["a"], "weight": 0.0}
    with pytest.raises(UserError, match=r"^data.sources.c = \{.*\}: this workdir's run has None"):
        check(build(RunConfig, values), 1)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("model.unit", "G", True),
        ("model.vocab_size", 288, True),
        ("data.tokenizer", "bpe:300", True),
        ("model.remat", "full", False),
        ("seed", 7, False),
        ("optimizer.clip_norm", 2.0, False),
        ("data.packing", "first_fit", False),
        ("data.sources.a.path", "other.jsonl", False),
        ("stages.stable.learning_rate", 0.5, False),
        ("stages.stable.tokens", 4096, False),
    ],
)
def test_weights_from_elsewhere_fix_model_and_tokenizer_alone(field, value, refused):
    if not refused:
        assert check(changed(field, value), 0)
        return
    with pytest.raises(UserError, match=f"^{field} = "):
        check(changed(field, value), 0)


def test_weights_from_elsewhere_leave_the_stages_free():
    stable, decay = CONFIG.stages
    only = dataclasses.replace(stable, name="only")
    for stages in ((only,), (decay, stable), (decay,)):
        check(dataclasses.replace(CONFIG, stages=stages), 0)


def test_the_docs_have_the_table_of_the_code():
    rows = re.findall(r"^\| `([^`|]+)` \| ([^|]+) \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    documented = [(tuple(fields.split(", ")), when, why) for fields, when, why in rows]
    rules = [dataclasses.astuple(rule) for rule in changes.MAY_CHANGE]
    assert [row for row in documented if row in rules] == rules
    # No row of that table is left over: all fields there are fields of a config.
    known = [*to_dict(CONFIG), "stages"]
    table = [row for row in documented if row[0][0].split(".")[0] in known]
    assert table == rules
