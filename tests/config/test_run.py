"""Every check of the config: what is refused, in which words, and the way there and back."""

import ast
import dataclasses
import json
import typing
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from lightning_jax.config import ModelConfig, RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, suggest, to_dict
from lightning_jax.config.model import ROUTINGS
from lightning_jax.config.pattern import parse_pattern

ROOT = Path(__file__).parents[2]


def changed(path, value):
    """The base config as nested dicts, with one field set; `...` deletes it."""
    values = to_dict(build(RunConfig, base.get_config()))
    *parents, last = path.split(".")
    target = values
    for name in parents:
        target = target[name]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return values


def test_base_goes_there_and_back():
    run = build(RunConfig, base.get_config())
    assert build(RunConfig, to_dict(run)) == run
    assert build(RunConfig, json.loads(json.dumps(to_dict(run)))) == run
    assert isinstance(to_dict(run)["stages"]["stable"]["mixture"], dict)
    assert "name" not in to_dict(run)["stages"]["stable"]


def test_stages_keep_the_order_in_which_they_are_written():
    values = base.get_config()
    values.stages = base.named(zero=base.stage(), alpha=base.stage(), middle=base.stage())
    run = build(RunConfig, values)
    assert [stage.name for stage in run.stages] == ["zero", "alpha", "middle"]
    values.stages.zero.mixture = base.named(docs=0.5, code=0.5)
    run = build(RunConfig, values)
    assert [name for name, _ in run.stages[0].mixture] == ["docs", "code"]
    values.stages.alpha = None
    assert [stage.name for stage in build(RunConfig, values).stages] == ["zero", "middle"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", 1, r'unknown config field modle: one of seed, .*did you mean "model"\?'),
        ("model.moe.top_q", 1, r'field model.moe.top_q: .*did you mean "top_p"\?'),
        ("stages.stable.tokenz", 1, r'stages.stable.tokenz: .*did you mean "tokens"\?'),
        ("zzzz", 1, "unknown config field zzzz: one of seed"),
        ("model.moe.top_p", ..., "config field model.moe.top_p is missing: configs/base.py"),
        ("model.model_dim", "64", "model.model_dim = '64': must be of type int"),
        ("model.model_dim", 64.5, "model.model_dim = 64.5: must be of type int"),
        ("model.model_dim", True, "model.model_dim = True: must be of type int"),
        ("model.scan", 1, "model.scan = 1: must be of type bool"),
        ("model.moe.top_p", None, "model.moe.top_p = None: must be of type float"),
        ("model", 3, "^model = 3: must be a mapping of fields"),
        ("stages", 3, "stages = 3: must be a mapping from name to value"),
        ("stages.stable", 3, "stages.stable = 3: must be a mapping of fields"),
        ("stages.stable.mixture.code", "a", "stages.stable.mixture.code = 'a': must be of type"),
    ],
)
def test_shape_of_the_config_is_checked(path, value, message):
    with pytest.raises(UserError, match=message):
        build(RunConfig, changed(path, value))


def test_not_a_mapping_at_all():
    with pytest.raises(UserError, match="config = 3: must be a mapping of fields"):
        build(RunConfig, 3)


def test_whole_numbers_convert_between_int_and_float():
    run = build(RunConfig, changed("model.model_dim", 64.0))
    assert run.model.model_dim == 64 and type(run.model.model_dim) is int
    run = build(RunConfig, changed("optimizer.clip_norm", 1))
    assert type(run.optimizer.clip_norm) is float


REFUSED = [
    ("model.attention.num_heads", 0, "at least 1"),
    ("model.attention.num_kv_heads", 3, "a divisor of num_heads = 4"),
    ("model.attention.num_kv_heads", 0, "a divisor of num_heads"),
    ("model.attention.head_dim", 31, "a positive even number"),
    ("model.attention.window", 0, r"at least 1 \(self is included\)"),
    ("model.attention.rope_base_global", 1.0, "above 1"),
    ("model.moe.num_experts", -1, r"0 \(dense\) or more"),
    ("model.moe.expert_dim", 0, "at least 1"),
    ("model.moe.num_shared_experts", -1, "0 or more"),
    ("model.moe.train_routing", "top_q", 'did you mean "top_p"'),
    ("model.moe.eval_routing", "", "one of top_k, top_p, dense"),
    ("model.moe.top_k", 17, "between 1 and num_experts = 16"),
    ("model.moe.max_experts", 0, "between 1 and num_experts = 16"),
    ("model.moe.top_p", 0.0, r"in \(0, 1\]"),
    ("model.moe.top_p", float("nan"), "a finite number"),
    ("model.moe.target_experts", 9.0, "between 1 and max_experts = 8"),
    ("model.moe.target_experts", 0.5, "between 1 and max_experts = 8"),
    ("model.moe.num_groups", 3, "a divisor of num_experts = 16"),
    (
        "model.moe.max_groups",
        1,
        r"0 \(no limit\) or between 2, for 8 choices out of groups of 4 exp",
    ),
    ("model.moe.max_groups", 5, "and num_groups = 4"),
    ("model.moe.capacity_factor", -1.0, r"0 \(dropless\) or above"),
    ("model.moe.transport", "all2all", "one of all_to_all, all_gather"),
    ("model.moe.exchange_rows", 0.0, "above 0"),
    ("model.moe.num_partitions", 3, "a divisor of the 4 experts of a group"),
    ("model.moe.switch_weight", -1.0, "0 or more"),
    ("model.model_dim", 0, "at least 1"),
    ("model.num_units", 0, "at least 1"),
    ("model.head_chunk", 0, "at least 1"),
    ("model.vocab_size", -1, r"0 \(tokenizer's\) or more"),
    ("model.norm_eps", 0.0, r"in \(0, 1\]"),
    (
        "model.compute_dtype",
        "bf16",
        r'must be one of float32, bfloat16 \(did you mean "bfloat16"\?\)',
    ),
    ("model.unit", "", "at least one letter"),
    ("optimizer.name", "adam", 'did you mean "adamw"'),
    ("optimizer.on_nan", "halt", "one of stop, skip"),
    ("optimizer.beta2", 1.0, r"in \[0, 0.999999\]"),
    ("optimizer.clip_norm", 0.0, "above 0"),
    ("optimizer.weight_decay", -0.1, "0 or more"),
    ("stages.stable.tokens", 0, "at least 1"),
    ("stages.stable.accumulate", 3, "a divisor of batch_size = 8"),
    ("stages.stable.mixture", {"code": 0.0}, "at least one weight above 0"),
    ("stages.stable.mixture.code", -1.0, "0 or more"),
    ("stages.stable.decay", "line", 'did you mean "linear"'),
    ("stages.stable.learning_rate", -1.0, "0 or more"),
    ("stages.stable.final_learning_rate", 1.0, "between 0 and learning_rate = 0.003"),
    ("stages.stable.warmup_tokens", -1, r"a whole number in \[0, 9007199254740992\]"),
    ("stages.stable.warmup_tokens", 800_001, "between 0 and tokens = 800000"),
    ("stages.stable.decay_tokens", 900_000, "at most tokens - warmup_tokens = 720000"),
    ("stages.stable.rope_base_global", 0.5, r"0 \(the model's\) or above 1"),
    ("stages", {}, "at least one stage"),
    ("data.tokenizer", "", '"bytes" or a path'),
    ("data.sources", {}, "at least one source"),
    ("data.sources.code.path", "", "a path or a glob"),
    ("data.sources.code.weight", -1.0, "0 or more"),
    ("data.eval_fraction", 0.0, r"in \(0, 1\)"),
    ("data.packing", "first", 'did you mean "first_fit"'),
    ("data.prefetch", -1, "between 0 and 1024 batches"),
    ("data.streams", 0, "at least 1"),
    ("data.streams", 3, "a divisor of stages.stable.batch_size = 8"),
    ("mesh.fsdp", 0, "at least 1, or -1"),
    ("log_every", 0, "at least 1"),
    ("eval_every", -1, r"0 \(never\) or more"),
    ("final_eval_tokens", -1, r"a whole number in \[0, 9007199254740992\]"),
    # Case D5: ranges that the type alone does not give, and names of registries.
    ("seed", -1, r"in \[0, 4294967295\]"),
    ("seed", 2**63 + 1, r"in \[0, 4294967295\]"),
    ("model.vocab_size", 2**40, r"in \[-2147483647, 2147483647\]"),
    ("model.norm_eps", 1e-42, "a finite number that float32 holds"),
    ("model.num_units", 2**20, "at most 10000 layers"),
    ("model.remat", "dots", "one of none, full, checkpoint_dots"),
    ("model.remat", "save_only_these_names", "one of none, full"),
    ("model.attention.implementation", "refrence", 'did you mean "reference"'),
    ("model.attention.implementation", "cudnn", "one of reference, xla"),
    ("model.moe.implementation", "raged_dot", 'did you mean "ragged_dot"'),
    ("model.moe.controller_ki", float("nan"), "a finite number"),
    ("model.moe.controller_kp", -1.0, "0 or more"),
    ("model.moe.bias_update_rate", -1.0, "0 or more"),
    ("model.moe.routed_scale", 0.0, "above 0"),
    ("optimizer.beta1", 0.99999999, r"in \[0, 0.999999\]"),
    ("stages.stable.learning_rate", 1e39, "a finite number that float32 holds"),
    ("stages.stable.mixture.code", float("nan"), "a finite number"),
    ("stages.stable.batch_size", 2**23, "such that batch_size . seq_len"),
    ("stages.stable.tokens", 2**53, "such that the run has at most 2147483647 steps"),
    ("stages.stable.name", "other", "left out"),
    ("data.tokenizer", "a\0b", "none of them NUL"),
    ("sample_prompt", "a\ud800", "text, without half of a surrogate pair"),
    ("data.text_field", "x" * 5000, "at most 4096 characters"),
]


@pytest.mark.parametrize(("path", "value", "right"), REFUSED)
def test_values_are_refused_by_field_value_and_what_would_be_right(path, value, right):
    with pytest.raises(UserError, match=right) as caught:
        build(RunConfig, changed(path, value))
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_rules_across_fields():
    values = changed("model.moe.train_routing", "top_k")
    with pytest.raises(UserError, match='0 unless train_routing is "top_p"'):
        build(RunConfig, values)
    values = changed("mesh.fsdp", -1)
    with pytest.raises(UserError, match="with -1 on one axis at the most"):
        build(RunConfig, values)
    values = changed("stages.stable.mixture", {"codes": 1.0})
    with pytest.raises(UserError, match=r"stages.stable.mixture = 'codes': .*\"code\""):
        build(RunConfig, values)
    values = changed("model.moe.num_experts", 0)
    values["model"]["mlp_dim"] = 0
    with pytest.raises(UserError, match="model.mlp_dim = 0: must be at least 1 where a layer"):
        build(RunConfig, values)


def test_a_stage_without_a_mixture_takes_every_source_by_its_own_weight():
    values = base.get_config()
    with values.unlocked():
        values.data.sources.poems = base.source("poems.txt", weight=3.0)
        values.data.sources.quiz = base.source("quiz.txt", weight=0.0)
    values.stages.decay.mixture = base.named(docs=1.0, code=0.0)
    run = build(RunConfig, values)
    stable, decay = run.stages
    assert run.data.weights(stable) == {"code": 0.9, "docs": 0.1, "poems": 3.0}
    assert run.data.weights(decay) == {"docs": 1.0}
    assert build(RunConfig, json.loads(json.dumps(to_dict(run)))) == run


def test_a_source_that_no_stage_trains_on_is_known():
    values = to_dict(build(RunConfig, base.get_config()))
    values["data"]["sources"]["poems"] = {"path": "poems.txt", "eval_path": "", "weight": 1.0}
    for stage in values["stages"].values():
        stage["mixture"] = {"code": 0.9, "docs": 0.1}
    assert build(RunConfig, values).forgotten_sources == ("poems",)
    # Weight 0, and a share of 0, are meant.
    values["data"]["sources"]["poems"]["weight"] = 0.0
    assert build(RunConfig, values).forgotten_sources == ()
    values["data"]["sources"]["poems"]["weight"] = 1.0
    values["stages"]["stable"]["mixture"]["poems"] = 0.0
    assert build(RunConfig, values).forgotten_sources == ()
    values["stages"]["stable"]["mixture"] = {}
    assert build(RunConfig, values).forgotten_sources == ()
    for source in values["data"]["sources"].values():
        source["weight"] = 0.0
    with pytest.raises(UserError, match=r"^data.sources.\*.weight = .*above 0 for a source"):
        build(RunConfig, values)


def test_a_dense_model_ignores_the_experts_fields():
    values = changed("model.moe.num_experts", 0)
    values["model"]["moe"].update(top_k=99, expert_dim=0, num_groups=7)
    model = build(RunConfig, values).model
    assert not any(spec.routed for spec in model.layers)


# Case D8
@pytest.mark.parametrize(
    ("changes", "trains"),
    [
        (dict(train_routing="top_k", top_k=1), False),
        (dict(train_routing="top_p", max_experts=1, target_experts=1.0), False),
        (dict(train_routing="top_k", top_k=1, router_score="sigmoid"), False),
        (dict(train_routing="top_k", top_k=1, renormalize_gates=False), True),
        (dict(train_routing="top_k", top_k=2), True),
        (dict(train_routing="top_p", max_experts=2, target_experts=1.0), True),
        (dict(train_routing="dense"), True),
        (dict(train_routing="top_p", eval_routing="top_k", top_k=1, target_experts=3.0), True),
        # One expert is no choice, and a dense model has no gates.
        (dict(train_routing="top_k", top_k=1, num_experts=1, max_experts=1, num_groups=1), True),
        (dict(train_routing="top_k", top_k=1, num_experts=0), True),
    ],
)
def test_a_router_without_a_gradient_is_not_trained(changes, trains):
    values = changed("model.moe.renormalize_gates", True)
    values["model"]["moe"] |= {"target_experts": 0.0, "num_partitions": 1, **changes}
    config = build(RunConfig, values)  # such a model can be read and used
    if trains:
        config.require_trainable()
    else:
        with pytest.raises(UserError, match="renormalize_gates = True: must be False to train"):
            config.require_trainable()


def test_pattern_owners():
    layers = parse_pattern("LLlGLgg", "unit", (True,) * 7)
    owners = ["0_L", "1_L", "1_L", "3_G", "4_L", "3_G", "3_G"]
    assert [spec.owner for spec in layers] == owners
    assert [spec.owns_kv for spec in layers] == [True, True, False, True, True, False, False]
    assert [spec.is_local for spec in layers] == [True, True, True, False, True, False, False]
    assert [spec.key for spec in layers][:3] == ["0_L", "1_L", "2_l"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("LLXG", r"unit = 'LLXG': must be made of L, l, G, g \(letter 2 is 'X'\)"),
        ("gG", "'g' at 0 has an owner 'G' before it"),
        ("Lg", "'g' at 1 has an owner 'G' before it in it$"),
        ("Gl", "'l' at 1 has an owner 'L'.*a local layer cannot borrow from a global one"),
        ("L G", "letter 1 is ' '"),
    ],
)
def test_pattern_errors(pattern, message):
    with pytest.raises(UserError, match=message):
        parse_pattern(pattern, "unit")


def test_layers_of_prefix_and_units():
    model = build(RunConfig, changed("model.prefix", "Gg")).model
    assert model.num_layers == len(model.layers) == 10
    assert [spec.routed for spec in model.layers] == [False] * 2 + [True] * 8
    with pytest.raises(UserError, match="model.unit"):
        # The unit is a scan body: it cannot borrow from the prefix.
        dataclasses.replace(model, unit="gL")


def test_which_layers_of_a_unit_have_experts():
    model = build(RunConfig, base.get_config()).model
    mixed = dataclasses.replace(model, unit="LLG", unit_mlp="EDE", num_units=2)
    assert [spec.routed for spec in mixed.layers] == [True, False, True] * 2
    with pytest.raises(UserError, match="unit_mlp = 'ED': must be empty, or 3 letters out of E, D"):
        dataclasses.replace(model, unit="LLG", unit_mlp="ED")
    dense = dataclasses.replace(model.moe, num_experts=0)
    with pytest.raises(UserError, match="out of D, one per layer"):
        dataclasses.replace(model, unit="LG", unit_mlp="ED", moe=dense)
    with pytest.raises(UserError, match="mlp_dim"):
        dataclasses.replace(model, unit="LG", unit_mlp="ED", mlp_dim=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "ntk"}, "rope_scaling.kind = 'ntk'"),
        ({"kind": "linear", "factor": 0.5}, "factor = 0.5: must be at least 1"),
        ({"kind": "llama3", "low_freq_factor": 5.0}, "high_freq_factor = 4.0: must be above"),
        ({"kind": "yarn", "beta_slow": 40.0}, "beta_fast = 32.0: must be above"),
        ({"kind": "yarn", "original_length": 0}, "original_length = 0"),
        ({"kind": "yarn", "attention_factor": 0.0}, "attention_factor = 0.0"),
    ],
)
def test_rope_scaling_is_checked(changes, message):
    scaling = build(RunConfig, base.get_config()).model.attention.rope_scaling
    with pytest.raises(UserError, match=message):
        dataclasses.replace(scaling, **changes)


def test_derived_numbers():
    moe = build(RunConfig, base.get_config()).model.moe
    assert [moe.slots(kind) for kind in ROUTINGS] == [4, 8, 16]
    assert moe.balance_weights["partition"] == 1e-3
    assert list(moe.balance_weights.values()).count(0.0) == 1


def test_suggest_without_anything_close():
    assert suggest("zzz", ["a", "b"]) == "one of a, b"


def fields_of(cls):
    for name, kind in typing.get_type_hints(cls).items():
        item = (typing.get_args(kind) or (kind,))[0]
        if dataclasses.is_dataclass(item):
            yield from fields_of(item)
        else:
            yield name


def test_every_field_is_read_by_some_code():
    """Checks of `__post_init__` are no use; a field that nothing else reads should go."""
    read = set()
    for path in (ROOT / "lightning_jax").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == "__post_init__":
                node.body = []
        read |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        read |= {str(node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    read |= {f"{name}_weight" for name in read}
    unread = [name for name in fields_of(RunConfig) if name not in read]
    assert not unread


def test_configs_are_immutable_and_of_the_documented_types():
    run = build(RunConfig, base.get_config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1
    assert isinstance(run.model, ModelConfig)
    assert isinstance(base.get_config(), ConfigDict)
    with pytest.raises(KeyError, match="unknown stage field"):
        base.stage(token=1)
