"""Every value of every key of a published config.json gives a sane model or one line."""

import json
import math
import random
import time

import pytest

from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, to_dict
from lightning_jax.interop import hf
from lightning_jax.interop.hf.config import read_config, write_config
from lightning_jax.interop.hf.families import FAMILIES
from lightning_jax.interop.hf.keys import KEYS, MOST_LAYERS, ROPE_KEYS
from tests.tiny import tiny_model

SHARED = {
    "architectures": ["ForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "dtype": "float32",
    "torch_dtype": "float32",
    "attention_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "text_config": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
}
ROPES = {
    "llama": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "mistral": {"type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "gpt_oss": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "attention_factor": None,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
    },
    "dots1": {"sliding_attention": {"rope_theta": 1e3}, "full_attention": {"rope_theta": 1e4}},
}
OWN = {
    "llama": {"mlp_bias": False},
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "use_sliding_window": True,
    },
    "olmoe": {
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "dots1": {
        "first_k_dense_replace": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "max_window_layers": 1,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_experts_per_tok": 2,
        "routed_scaling_factor": 2.5,
        "sliding_window": 8,
        "topk_group": 1,
    },
    "gpt_oss": {
        "layer_types": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "sliding_window": 8,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
    },
}


def valid(family):
    rope = {"rope_parameters": ROPES.get(family)}
    return json.loads(json.dumps({"model_type": family, **SHARED, **OWN[family], **rope}))


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


UGLY = [
    *(None, True, False, -1, 0, 1, 3, 2**31 - 1, 2**31, 2**63, 10**400, -(10**400)),
    *(0.5, -0.0, 1e308, 5e-324, math.nan, math.inf, -math.inf, 2.0),
    *("", "12", "x" * 10_000, "\ud800", "full_attention"),
    *([], [[]], [None], ["full_attention"], [0, -1], deep(500), [{}] * 3),
    *({}, {"a": 1}, {"rope_type": "yarn"}, {"full_attention": None}, {"": {}}),
]
LEFT_OUT = object()


def places(config, path=()):
    """Paths of all keys, also of objects inside."""
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def changed(config, path, value):
    config = json.loads(json.dumps(config))
    node = config
    for key in path[:-1]:
        node = node[key]
    if value is LEFT_OUT:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return config


def numbers(values):
    for value in values.values():
        if isinstance(value, dict):
            yield from numbers(value)
        elif isinstance(value, int | float):
            yield value


def read(config):
    """The model, or the line that refuses it; anything else is a fault."""
    start = time.perf_counter()
    try:
        model = read_config(config, where="folder/config.json")
    except UserError as error:
        line = str(error)
        assert line.startswith("folder/config.json: ") and len(line) < 1000 and "\n" not in line
        return line
    finally:
        assert time.perf_counter() - start < 2
    assert all(math.isfinite(value) for value in numbers(to_dict(model)))
    assert build(ModelConfig, to_dict(model)) == model and model.num_layers <= MOST_LAYERS
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configs_of_these_tests_are_read(family):
    assert isinstance(read(valid(family)), ModelConfig)


# Cases E3, E4
@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_key_is_a_model_or_a_line(family):
    config = valid(family)
    lines = 0
    for path in places(config):
        for value in [*UGLY, LEFT_OUT]:
            got = read(changed(config, path, value))
            lines += isinstance(got, str)
            # Types are refused by the key that has them, wherever it lies.
            if isinstance(got, str) and isinstance(value, str | list) and path[-1] in KEYS:
                assert path[-1] in got
    assert lines > 300


@pytest.mark.parametrize("family", FAMILIES)
def test_several_bad_values_at_once(family):
    generator = random.Random(0)
    config = valid(family)
    for _ in range(300):
        broken = config
        for path in generator.sample([*places(config)], 3):
            value = generator.choice([*UGLY, LEFT_OUT])
            if all(isinstance(part, str) for part in path) and _has(broken, path):
                broken = changed(broken, path, value)
        read(broken)


def _has(config, path):
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


def test_every_key_that_is_read_is_described():
    used = {key for family in FAMILIES for key in valid(family)} - {"model_type"}
    assert set(KEYS) - used == {"original_max_position_embeddings"} and used <= set(KEYS)
    inside = {key for rope in ROPES.values() for key in rope}
    assert inside <= set(ROPE_KEYS)


# Case E3
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps = None: must be a finite number"),
        ({"num_hidden_layers": "12"}, "num_hidden_layers = '12': must be a whole number"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers = 2147483648: must be a whole"),
        ({"rope_parameters": "x"}, "rope_parameters = 'x': must be an object"),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "yarn", "factor": None}},
            "rope_scaling: factor = None: must be a finite number in",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: lacks factor"),
        ({"rope_parameters": {"rope_type": []}}, r"rope_type = \[\]: must be a string"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta = None: must be a number"),
        ({"quantization_config": "fp8"}, "quantization_config = 'fp8': must be an object"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = 'unknown': save"),
        ({"architectures": "Llama"}, "architectures = 'Llama': must be a list"),
        ({"text_config": {}}, r"text_config = \{\}: must be left out"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: must be a divisor"),
        ({"head_dim": 7}, "head_dim = 7: must be a positive even number"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types = .*a llama model"),
        ({"model_type": None}, "model_type = None: must be a string"),
        ({"model_type": ["llama"]}, "model_type = .*must be a string"),
        ({"stages": {}}, "a run of this project"),
    ],
)
def test_the_line_names_file_and_key(changes, message):
    with pytest.raises(UserError, match=f"^a/config.json: .*{message}"):
        read_config(valid("llama") | changes, where="a/config.json")


def test_the_line_of_other_families():
    for family, changes, message in (
        ("dots1", {"layer_types": ["full_attention"]}, "must be 2 entries"),
        ("dots1", {"sliding_window": None}, "sliding_window = None: must be a number"),
        ("dots1", {"num_experts_per_tok": 5}, "num_experts_per_tok = 5: must be between 1 and"),
        ("dots1", {"moe_intermediate_size": None}, "moe_intermediate_size = None"),
        ("gpt_oss", {"num_experts": 8}, "num_experts = 8: must be num_local_experts = 4"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            read_config(valid(family) | changes)


# Case E1: names and nulls of older and newer files.
def test_other_spellings_are_read():
    for family, changes, drop in (
        ("mixtral", {"num_experts": 4}, "num_local_experts"),
        ("qwen3_moe", {"num_local_experts": 4}, "num_experts"),
        ("olmoe", {"num_local_experts": 4}, "num_experts"),
        ("dots1", {"num_local_experts": 4}, "n_routed_experts"),
        ("gpt_oss", {"num_experts": 4}, "num_local_experts"),
        ("gpt_oss", {"num_experts": 4}, None),
        ("llama", {"hidden_act": "swish", "head_dim": None}, "rope_scaling"),
        ("llama", {"layer_types": ["full_attention"] * 2}, None),
    ):
        config = valid(family)
        config.pop(drop, None)
        assert read_config(config | changes) == read_config(valid(family))
    whole = read_config(valid("llama") | {"num_key_value_heads": None})
    assert whole.attention.num_kv_heads == 4
    assert read_config(valid("mistral") | {"sliding_window": None}).unit == "G"


def test_what_a_file_leaves_out_is_what_its_family_means():
    config = valid("gpt_oss")
    for key in ("rope_parameters", "rope_scaling", "rope_theta", "head_dim", "rms_norm_eps"):
        del config[key]
    model = read_config(config)
    assert model.attention.rope_scaling.kind == "yarn" and model.norm_eps == 1e-5
    assert (model.attention.head_dim, model.attention.rope_base_global) == (64, 150_000.0)
    plain = read_config(config | {"rope_parameters": {"rope_theta": 1e4}})
    assert plain.attention.rope_scaling.kind == "none"


def test_bases_by_kind_of_layer():
    attention = read_config(valid("dots1")).attention
    assert (attention.rope_base_local, attention.rope_base_global) == (1e3, 1e4)
    both = {"full_attention": {"rope_type": "linear", "factor": 2.0}}
    attention = read_config(valid("dots1") | {"rope_parameters": both}).attention
    assert attention.rope_scaling.kind == "linear"
    both["sliding_attention"] = {"rope_type": "default"}
    with pytest.raises(UserError, match="must be scaled alike"):
        read_config(valid("dots1") | {"rope_parameters": both})
    with pytest.raises(UserError, match="of one kind, or by kind of layer"):
        read_config(valid("dots1") | {"rope_parameters": both | {"rope_theta": 1e4}})


# Case E4: our own layout, and the bytes of the file.
def test_any_value_of_our_own_layout_is_a_model_or_a_line():
    config = write_config(tiny_model(64), "lightning") | {"top_p": 0.5}
    assert isinstance(read(config), ModelConfig)
    for path in places(config):
        for value in (None, -1, 2**31, 10**400, math.nan, math.inf, "", [], {}, LEFT_OUT):
            read(changed(config, path, value))


CONTENTS = {
    "empty": b"",
    "cut": b'{"model_type": "lla',
    "list": b"[1, 2]",
    "number": b"12",
    "null": b"null",
    "not UTF-8": b'{"model_type": "\xff"}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "deep": b'{"a": ' * 1000 + b"1" + b"}" * 1000,
    "deeper": b"[" * 100_000,
    "NaN": b'{"model_type": "llama", "vocab_size": NaN}',
    "infinite": b'{"model_type": "llama", "rms_norm_eps": 1e999}',
    "long number": b'{"model_type": "llama", "vocab_size": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_files_that_hold_no_object(name, content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(valid("llama")))
    (tmp_path / name).write_bytes(CONTENTS[content])
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as caught:
        hf.load(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_top_p_of_our_own_layout(tmp_path):
    config = write_config(tiny_model(64), "lightning")
    for top_p in (None, 0, 1.5, "1", LEFT_OUT):
        described = config if top_p is LEFT_OUT else config | {"top_p": top_p}
        (tmp_path / "config.json").write_text(json.dumps(described))
        with pytest.raises(UserError, match="config.json: .*top_p"):
            hf.load(tmp_path)


@pytest.mark.slow
def test_most_layers_are_read_quickly():
    start = time.perf_counter()
    config = valid("gpt_oss") | {"num_hidden_layers": MOST_LAYERS}
    assert read_config(config).num_layers == MOST_LAYERS
    types = ["full_attention", *["sliding_attention"] * (MOST_LAYERS - 1)]
    assert read_config(config | {"layer_types": types}).num_layers == MOST_LAYERS
    generator = random.Random(0)
    types = [generator.choice(["full_attention", "sliding_attention"]) for _ in types]
    assert read_config(config | {"layer_types": types}).num_layers == MOST_LAYERS
    assert time.perf_counter() - start < 10
