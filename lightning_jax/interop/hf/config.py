"""`config.json` of published model families to `ModelConfig` and back.

A setting that no field of ours can express is refused by name: loading the model anyway would give
other numbers. Writing is checked by reading back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import build, first_change, to_dict
from lightning_jax.config.kinds import OBJECT, TEXT, check, number, shorten
from lightning_jax.config.pattern import EXPERTS
from lightning_jax.interop.hf.families import FAMILIES, Family
from lightning_jax.interop.hf.keys import FULL, KEYS, SLIDING, Json
from lightning_jax.interop.hf.rope import PLAIN, read_rope, write_rope
from lightning_jax.interop.hf.stack import mlp_letters, stack, with_borrowers

LIGHTNING = "lightning"
MODEL_TYPES = (*FAMILIES, LIGHTNING)

_DEFAULTS: Json = {
    "attention_bias": False,
    "head_dim": None,
    "hidden_act": "silu",
    "layer_types": None,
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
}
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
# With any other values of these keys a layer would compute something else.
_ONLY = {"hidden_act": ("silu", "swish")}
# Fields of ours whose checks compare several keys, and theirs.
_THEIR_NAMES = {
    "model.attention.num_kv_heads": "num_key_value_heads",
    "model.attention.head_dim": "head_dim",
    "model.attention.rope_scaling.": "rope_parameters: ",
    "model.moe.top_k": "num_experts_per_tok",
}

# Fields of computation and training, which no published config has.
_COMPUTE: Json = {
    "compute_dtype": "float32",
    "scan": True,
    "remat": "none",
    "head_chunk": 2048,
}
_TRAINING: Json = {
    "train_routing": "top_k",
    "eval_routing": "top_k",
    "top_p": 1.0,
    "target_experts": 0.0,
    "controller_kp": 0.0,
    "controller_ki": 0.5,
    "bias_update_rate": 0.0,
    "num_groups": 1,
    "num_partitions": 1,
    "switch_weight": 0.0,
    "group_weight": 0.0,
    "partition_weight": 0.0,
    "true_group_weight": 0.0,
    "z_weight": 0.0,
    "entropy_weight": 0.0,
    "capacity_factor": 0.0,
    "implementation": "",
    "transport": "",
    "exchange_rows": 1.0,
}
_NO_MOE: Json = {
    "num_experts": 0,
    "expert_dim": 0,
    "num_shared_experts": 0,
    "router_score": "softmax",
    "top_k": 1,
    "max_experts": 1,
    "renormalize_gates": False,
    "routed_scale": 1.0,
    "router_bias": False,
    "expert_bias": False,
    "clamp": 0.0,
    "max_groups": 0,
}


def read_config(
    config: Json, kv_source: Sequence[int] | None = None, *, where: object = "config.json"
) -> ModelConfig:
    """Returns the model that a `config.json` describes.

    Args:
      config: its content.
      kv_source: for each layer the layer whose keys and values it reads, itself where it owns
        them; None: all own theirs.
      where: what errors call the file.

    Raises:
      UserError: an unknown model type, a missing key, a value of the wrong type or out of range,
        or a setting that ours cannot express.
    """
    if "stages" in config:
        raise UserError(f"{where}: a run of this project; `load_run` reads its folder")
    check(config, {"model_type": TEXT}, where, required=["model_type"])
    model_type = config["model_type"]
    if model_type == LIGHTNING:
        check(config, {"model": OBJECT}, where, required=["model"])
        with _in_file(where):
            return _lightning(config, kv_source)
    if model_type not in FAMILIES:
        known = suggest(model_type, MODEL_TYPES)
        raise UserError(f"{where}: model_type = {shorten(model_type)}: must be {known}")
    family = FAMILIES[model_type]
    check(config, KEYS, where, required=_REQUIRED)
    with _in_file(where):
        config = _filled(config, family)
        if family.dense_mlps:
            _require_keys(config, ("intermediate_size",))
        _refuse_others(config, model_type, family)
        return build(ModelConfig, _fields(config, family, kv_source), path="model.")


@contextlib.contextmanager
def _in_file(where: object) -> Iterator[None]:
    """Adds the file to the line of an error, and calls a field of ours by the file's key."""
    try:
        yield
    except UserError as error:
        line = str(error)
        for ours, theirs in _THEIR_NAMES.items():
            line = re.sub(f"^{re.escape(ours)}", theirs, line)
        raise UserError(f"{where}: {line}") from error


def _lightning(config: Json, kv_source: Sequence[int] | None) -> ModelConfig:
    if kv_source is not None:
        raise UserError("kv_source: a lightning config says itself who borrows from whom")
    model = build(ModelConfig, config["model"], path="model.")
    if not model.vocab_size:
        raise UserError("model.vocab_size = 0: must be the size of the file's embedding")
    return model


def read_top_p(config: Json, where: object) -> float:
    """Returns the router's p, which a `config.json` of the lightning layout holds."""
    check(config, {"top_p": number(0, 1, above=True)}, where, required=["top_p"])
    return config["top_p"]


def _filled(config: Json, family: Family) -> Json:
    """The config with the defaults of its type, and one name for each key."""
    config = dict(config)
    for alias, key in family.aliases.items():
        value = config.pop(alias, None)
        if value is not None and config.setdefault(key, value) != value:
            raise UserError(f"{alias} = {value}: must be {key} = {config[key]}, another name of it")
    return {**_DEFAULTS, **family.defaults, **config}


def _require_keys(config: Json, keys: Sequence[str]) -> None:
    for key in keys:
        if config.get(key) is None:
            raise UserError(f"lacks {key}, which a model of type {config['model_type']} needs")


def _refuse_others(config: Json, model_type: str, family: Family) -> None:
    """Refuses settings with which a layer would compute something else."""
    if config.get("quantization_config"):
        method = shorten(config["quantization_config"].get("quant_method", "unknown"))
        raise UserError(f"quantization_config = {method}: save the weights dequantized first")
    for key, values in {**_ONLY, **family.only}.items():
        if config[key] not in values:
            right = f"only {values[0]!r} is supported ({model_type})"
            raise UserError(f"{key} = {shorten(config[key])}: {right}")
    kinds = {"L": SLIDING, "G": FULL}
    implied = [kinds[letter] for letter in family.kinds(config)]
    if config["layer_types"] not in (None, implied):
        types = shorten(config["layer_types"])
        raise UserError(
            f"layer_types = {types}: must be that of a {model_type} model, {implied[0]}"
        )


def _fields(config: Json, family: Family, kv_source: Sequence[int] | None) -> Json:
    letters = with_borrowers(family.kinds(config), kv_source)
    routed = [family.moe is not None and family.routed(config, i) for i in range(len(letters))]
    mlps = mlp_letters(routed)
    moe = {**_TRAINING, **_NO_MOE}
    if EXPERTS in mlps and family.moe is not None:
        _require_keys(config, (*family.moe_keys, "num_experts_per_tok"))
        top_k = config["num_experts_per_tok"]
        moe |= family.moe(config) | {"top_k": top_k, "max_experts": top_k}
    return {
        "vocab_size": config["vocab_size"],
        "model_dim": config["hidden_size"],
        **dataclasses.asdict(stack(letters, mlps)),
        "mlp_dim": config["intermediate_size"] if family.dense_mlps else 0,
        "norm_eps": float(config["rms_norm_eps"]),
        "tie_embeddings": config["tie_word_embeddings"],
        **_COMPUTE,
        "attention": _attention_fields(config, family, letters),
        "moe": moe,
    }


def _attention_fields(config: Json, family: Family, letters: str) -> Json:
    heads = config["num_attention_heads"]
    return {
        "num_heads": heads,
        "num_kv_heads": config["num_key_value_heads"] or heads,
        "head_dim": config["head_dim"] or config["hidden_size"] // heads,
        "window": config["sliding_window"] if "L" in letters.upper() else 1,
        **read_rope(config, family.rope),
        "global_rope": True,
        "qk_norm": family.qk_norm,
        "qkv_bias": config["attention_bias"],
        "out_bias": config["attention_bias"],
        "output_gate": False,
        "sinks": family.sinks,
        "implementation": "",
    }


def write_config(config: ModelConfig, model_type: str) -> Json:
    """Returns the `config.json` of a model in the layout of `model_type`.

    Raises:
      UserError: an unknown model type, or the first field that it has no place for.
    """
    if model_type == LIGHTNING:
        shape = {"architectures": ["LightningLM"], "vocab_size": config.vocab_size}
        return {"model_type": LIGHTNING, **shape, "model": to_dict(config)}
    if model_type not in FAMILIES:
        raise UserError(f"model_type = {model_type!r}: must be {suggest(model_type, MODEL_TYPES)}")
    written = _written(config, model_type, FAMILIES[model_type])
    other = f"save with model_type = {LIGHTNING!r}"
    try:
        read = read_config(written)
    except UserError as error:
        raise UserError(f"the {model_type} layout has no such model ({error}); {other}") from error
    changed = first_change(meaning(config), meaning(read))
    if changed:
        field, ours, theirs = changed
        raise UserError(
            f"model.{field} = {ours!r}: the {model_type} layout has no place for it (it would be "
            f"read as {theirs!r}); {other}"
        )
    return written


def _written(config: ModelConfig, model_type: str, family: Family) -> Json:
    attention, layers = config.attention, config.layers
    local = [spec.is_local for spec in layers]
    written: Json = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.model_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": len(layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": _MAX_LENGTH,
        "dtype": config.compute_dtype,
        "bos_token_id": None,
        "eos_token_id": None,
        **write_rope(attention, not all(local)),
    }
    if "attention_bias" in family.defaults:
        written["attention_bias"] = attention.qkv_bias
    if "sliding_window" in family.defaults:
        written["sliding_window"] = attention.window if any(local) else None
    if "layer_types" in family.defaults:
        written["layer_types"] = [SLIDING if flag else FULL for flag in local]
    if family.moe is not None:
        written["num_experts_per_tok"] = config.moe.top_k
    return {**written, **family.write(config)}


# No position has a learned embedding, so this bounds nothing here; other readers size caches by it.
_MAX_LENGTH = 131_072
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def meaning(config: ModelConfig) -> Json:
    """Returns the fields that decide a model's logits under evaluation, without those unread."""
    fields: dict[str, Any] = to_dict(config)
    layers, attention, moe = config.layers, fields["attention"], fields["moe"]
    for name in (*_COMPUTE, "prefix", "unit", "unit_mlp", "num_units"):
        del fields[name]
    del attention["implementation"]
    fields["layers"] = [spec.letter for spec in layers]
    fields["routed"] = [spec.routed for spec in layers]
    if all(fields["routed"]):
        del fields["mlp_dim"]
    if not any(spec.is_local for spec in layers):
        del attention["window"], attention["rope_base_local"]
    if all(spec.is_local for spec in layers):
        del attention["rope_base_global"], attention["global_rope"]
    if attention["rope_scaling"]["kind"] == "none":
        attention["rope_scaling"] = PLAIN
    routing = moe["eval_routing"]
    for name in (*_TRAINING, "max_experts"):
        del moe[name]
    if not any(fields["routed"]):
        fields["moe"] = {}
    elif routing != "top_k":
        moe["eval_routing"] = routing
    return fields
