"""Every field of a run against values that no run can take, and the names of registries."""

import copy
import dataclasses
import inspect
import math
import random

import jax
import pytest

from configs import base
from lightning_jax import accounting
from lightning_jax import model as lm
from lightning_jax.config import RunConfig
from lightning_jax.config import model as names
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import LARGEST_COUNT, build, to_dict
from lightning_jax.ops import attention, balance, exchange, experts, routing
from lightning_jax.train.plan import Plan
from tests.tiny import tiny_config

UGLY = [math.nan, math.inf, -math.inf, -1, -1e-9, 0, 0.0, 0.5, 1e-300, 1e308, 2**31, 2**63, 2**200]
UGLY += [
    "",
    "zzz",
    "a/b",
    "a.b",
    "a\0b",
    "x" * 10_000,
    "\ud800",
    None,
    [],
    {},
    {"": 1.0},
    True,
    b"b",
]
BASE = to_dict(build(RunConfig, tiny_config(model__vocab_size=64)))


def paths(values, at=()):
    """The path of every field and of every mapping of fields."""
    for key, value in values.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths(value, (*at, key))


def changed(path, value):
    values = copy.deepcopy(BASE)
    target = values
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return values


def leaves(value):
    if isinstance(value, dict):
        for entry in value.values():
            yield from leaves(entry)
    else:
        yield value


def is_small(model):
    """Whether the shapes of a model can be computed in a moment."""
    return model.num_layers < 20 and accounting.parameters(model).total < 2**33


def check_accepted(config):
    """A config that is accepted holds only what can be written and counted."""
    values = to_dict(config)
    assert build(RunConfig, values) == config
    assert all(math.isfinite(leaf) for leaf in leaves(values) if isinstance(leaf, int | float))
    plan = Plan.of(config)
    for step in (0, plan.total_steps - 1, plan.total_steps):
        knobs = plan.knobs(step)
        numbers = [*knobs[:2], *knobs.balance_weights.values(), knobs.z_loss_weight]
        assert all(map(math.isfinite, numbers)), numbers
    if config.model.vocab_size:
        rows = accounting.summary_rows(config.model, plan.max_seq_len)
        rows += accounting.comparison_rows(config.model)
        assert not [cell for row in rows for cell in row if "nan" in cell or "inf" in cell]


# Case D5
@pytest.mark.parametrize("path", list(paths(BASE)), ids=".".join)
def test_a_field_takes_a_value_or_names_it_in_one_line(path):
    for value in UGLY:
        try:
            config = build(RunConfig, changed(path, value))
        except UserError as error:
            line = str(error)
            assert "\n" not in line and len(line) < 1000
            # A rule over several fields may name another field of the same group.
            assert path[0] in line or path[-1] in line, line
        else:
            check_accepted(config)


# Case D5
@pytest.mark.slow
def test_accepted_models_have_shapes():
    tried = [(path, v) for path in paths({"model": BASE["model"]}) for v in (0, 1, 3, 1e-30, 1e30)]
    for path, value in random.Random(0).sample(tried, 60):
        try:
            config = build(RunConfig, changed(path, value))
        except UserError:
            continue
        if config.model.vocab_size and is_small(config.model):
            lm.abstract_params(config.model)


# Case D5
def test_several_ugly_values_at_once():
    generator = random.Random(0)
    every = list(paths(BASE))
    for _ in range(300):
        values = BASE
        for path in generator.sample(every, 3):
            try:
                values = changed_in(values, path, generator.choice(UGLY))
            except (KeyError, TypeError):
                continue  # a value above has replaced the group of this field
        try:
            config = build(RunConfig, values)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            check_accepted(config)


def changed_in(values, path, value):
    """A copy of nested dicts with one entry replaced."""
    if not path:
        return value
    return {**values, path[0]: changed_in(values[path[0]], path[1:], value)}


# Case D5
@pytest.mark.parametrize("group", ["stages", "data.sources"])
@pytest.mark.parametrize("name", ["", "a/b", "a.b", "a\nb", " a", "x" * 101, "\\", 3])
def test_names_of_stages_and_sources_are_parts_of_paths(group, name):
    *parents, last = group.split(".")
    values = BASE
    for parent in parents:
        values = values[parent]
    named = {**values[last], name: next(iter(values[last].values()))}
    with pytest.raises(UserError, match=f"a name in {group} = .*: must be 1 to 100 printable"):
        build(RunConfig, changed(tuple(group.split(".")), named))


def test_names_of_one_kind_are_distinct():
    run = build(RunConfig, base.get_config())
    with pytest.raises(UserError, match="stages = .*: must be of distinct names"):
        dataclasses.replace(run, stages=run.stages[:1] * 2)


# Case D6
def test_counts_of_tokens_go_beyond_int32_and_stay_exact():
    tokens = 20_000_000_000
    stage = dict(tokens=tokens, warmup_tokens=tokens // 4, decay="sqrt", decay_tokens=tokens // 2)
    values = changed(("stages", "stable"), {**BASE["stages"]["stable"], **stage})
    values["eval_tokens"] = LARGEST_COUNT
    config = build(RunConfig, values)
    assert config.stages[0].decay_tokens == tokens // 2 and config.eval_tokens == LARGEST_COUNT
    with pytest.raises(UserError, match="eval_tokens = 9007199254740993"):
        build(RunConfig, {**values, "eval_tokens": LARGEST_COUNT + 1})


def test_names_are_those_of_the_registries():
    registered = attention.IMPLEMENTATIONS
    honouring = [
        n for n, kernel in attention._KERNELS.items() if attention.SEGMENTS in kernel.honours
    ]
    assert set(names.ATTENTION_IMPLEMENTATIONS) == {"reference", *honouring} <= set(registered)
    assert experts.IMPLEMENTATIONS == names.EXPERTS_IMPLEMENTATIONS
    assert exchange.TRANSPORTS == names.TRANSPORTS
    assert names.ROUTINGS == routing.KINDS and names.ROUTER_SCORES == routing.SCORES
    policies = {
        name: inspect.signature(policy).parameters.values()
        for name, policy in vars(jax.checkpoint_policies).items()
        if not name.startswith("_") and callable(policy)
    }
    # A policy takes whatever it is asked about; the other functions make policies.
    plain = {
        name for name, takes in policies.items() if any(p.kind == p.VAR_KEYWORD for p in takes)
    }
    assert set(names.REMATS) == {"none", "full", *plain}


def test_balance_weights_are_named_as_the_losses():
    stats = jax.eval_shape(
        lambda logits: balance.balance_losses(
            balance.routing_stats(routing.route(logits, kind="top_k", slots=1))
        ),
        jax.ShapeDtypeStruct((4, 8), "float32"),
    )
    assert set(build(RunConfig, base.get_config()).model.moe.balance_weights) == set(stats)
