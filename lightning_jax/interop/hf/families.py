"""The differences between the published model families that can be read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require
from lightning_jax.config.kinds import shorten
from lightning_jax.interop.hf.keys import FULL, SLIDING, Json


@dataclasses.dataclass(frozen=True)
class Family:
    """The meaning of a model type beyond the keys that all families share.

    `kinds` gives the letter of every layer, `moe` the fields of `MoeConfig` that the config sets
    by its keys `moe_keys`, `routed` whether a layer has experts, `write` the keys that only this
    type has.

    Functions that read take the config with the type's defaults filled in and its values checked
    (`keys.KEYS`). `aliases` maps other names of a key to that key. `rope` is the scaling of a
    config that says nothing about it. `only` maps keys to the values with which a layer computes
    the same as ours.
    """

    defaults: Json
    kinds: Callable[[Json], str]
    moe: Callable[[Json], Json] | None = None
    moe_keys: tuple[str, ...] = ()
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    rope: Json | None = None
    routed: Callable[[Json, int], bool] = lambda config, index: True
    qk_norm: str = "none"
    sinks: bool = False
    dense_mlps: bool = True
    only: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    write: Callable[[ModelConfig], Json] = lambda config: {}


def _all_full(config: Json) -> str:
    return "G" * config["num_hidden_layers"]


def _all_sliding(config: Json) -> str:
    return ("L" if config["sliding_window"] is not None else "G") * config["num_hidden_layers"]


def _by_layer_types(config: Json) -> str:
    types, count = config["layer_types"], config["num_hidden_layers"]
    if len(types) != count:
        raise UserError(f"layer_types = {shorten(types)}: must be {count} entries, one per layer")
    if SLIDING in types and config["sliding_window"] is None:
        raise UserError(f"sliding_window = None: must be a number, for layer_types has {SLIDING}")
    return "".join({SLIDING: "L", FULL: "G"}[name] for name in types)


def _dots1_kinds(config: Json) -> str:
    if config["layer_types"] is not None:
        return _by_layer_types(config)
    count, full = config["num_hidden_layers"], config["max_window_layers"]
    if config["sliding_window"] is None:
        return "G" * count
    if full is None:
        raise UserError("max_window_layers = None: must be a number where sliding_window is one")
    return "".join("L" if i >= full else "G" for i in range(count))


def _gpt_oss_kinds(config: Json) -> str:
    if config["layer_types"] is not None:
        return _by_layer_types(config)
    count = config["num_hidden_layers"]
    return _by_layer_types(
        {**config, "layer_types": [(SLIDING, FULL)[i % 2] for i in range(count)]}
    )


def _qwen3_kinds(config: Json) -> str:
    return _all_sliding(config) if config["use_sliding_window"] else _all_full(config)


def _softmax_moe(count: str, hidden: str, renormalize: str | None) -> Callable[[Json], Json]:
    def read(config: Json) -> Json:
        return {
            "num_experts": config[count],
            "expert_dim": config[hidden],
            "renormalize_gates": True if renormalize is None else bool(config[renormalize]),
        }

    return read


def _dots1_moe(config: Json) -> Json:
    return {
        "num_experts": config["n_routed_experts"],
        "expert_dim": config["moe_intermediate_size"],
        "num_shared_experts": config["n_shared_experts"] or 0,
        "router_score": "sigmoid",
        "renormalize_gates": bool(config["norm_topk_prob"]),
        "routed_scale": float(config["routed_scaling_factor"]),
    }


def _gpt_oss_moe(config: Json) -> Json:
    return {
        "num_experts": config["num_local_experts"],
        "expert_dim": config["intermediate_size"],
        "renormalize_gates": True,
        "router_bias": True,
        "expert_bias": True,
        "clamp": float(config["swiglu_limit"]),
    }


def _qwen3_routed(config: Json, index: int) -> bool:
    sparse = (index + 1) % config["decoder_sparse_step"] == 0
    return sparse and index not in (config["mlp_only_layers"] or ())


def _write_qwen3_moe(config: ModelConfig) -> Json:
    moe = config.moe
    return {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_dim,
        "norm_topk_prob": moe.renormalize_gates,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, spec in enumerate(config.layers) if not spec.routed],
        "use_sliding_window": any(spec.is_local for spec in config.layers),
    }


def _write_olmoe(config: ModelConfig) -> Json:
    heads, moe = config.attention.num_heads, config.moe
    # The norms of queries and keys have this size for every other reader, whatever head_dim says.
    right = f"model_dim / num_heads = {config.model_dim / heads:g} in the olmoe layout"
    size = config.attention.head_dim
    require(size * heads == config.model_dim, "model.attention.head_dim", size, right)
    return {
        "num_experts": moe.num_experts,
        "intermediate_size": moe.expert_dim,
        "norm_topk_prob": moe.renormalize_gates,
    }


def _write_dots1(config: ModelConfig) -> Json:
    moe = config.moe
    routed = [spec.routed for spec in config.layers]
    return {
        "n_routed_experts": moe.num_experts,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": moe.num_shared_experts,
        "norm_topk_prob": moe.renormalize_gates,
        "routed_scaling_factor": moe.routed_scale,
        "first_k_dense_replace": routed.index(True) if True in routed else len(routed),
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={"attention_bias": False, "mlp_bias": False},
        kinds=_all_full,
        only={"mlp_bias": (False,)},
    ),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096}, kinds=_all_sliding
    ),
    "mixtral": Family(
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
        },
        kinds=_all_sliding,
        moe=_softmax_moe("num_local_experts", "intermediate_size", None),
        moe_keys=("num_local_experts", "intermediate_size"),
        aliases={"num_experts": "num_local_experts"},
        dense_mlps=False,
        write=lambda config: {
            "num_local_experts": config.moe.num_experts,
            "intermediate_size": config.moe.expert_dim,
        },
    ),
    "qwen3_moe": Family(
        defaults={
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "use_sliding_window": False,
        },
        kinds=_qwen3_kinds,
        moe=_softmax_moe("num_experts", "moe_intermediate_size", "norm_topk_prob"),
        moe_keys=("num_experts", "moe_intermediate_size"),
        aliases={"num_local_experts": "num_experts"},
        routed=_qwen3_routed,
        qk_norm="head",
        write=_write_qwen3_moe,
    ),
    "olmoe": Family(
        defaults={
            "attention_bias": False,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,
        },
        kinds=_all_full,
        moe=_softmax_moe("num_experts", "intermediate_size", "norm_topk_prob"),
        moe_keys=("num_experts", "intermediate_size"),
        aliases={"num_local_experts": "num_experts"},
        dense_mlps=False,
        qk_norm="projection",
        only={"clip_qkv": (None,)},
        write=_write_olmoe,
    ),
    "dots1": Family(
        defaults={
            "attention_bias": False,
            "first_k_dense_replace": 0,
            "layer_types": None,
            "max_window_layers": 62,
            "n_group": 1,
            "n_shared_experts": None,
            "norm_topk_prob": False,
            "num_key_value_heads": 32,
            "routed_scaling_factor": 1.0,
            "sliding_window": 4096,
        },
        kinds=_dots1_kinds,
        moe=_dots1_moe,
        moe_keys=("n_routed_experts", "moe_intermediate_size"),
        aliases={"num_local_experts": "n_routed_experts"},
        routed=lambda config, index: index >= config["first_k_dense_replace"],
        qk_norm="head",
        only={"n_group": (1,)},
        write=_write_dots1,
    ),
    "gpt_oss": Family(
        defaults={
            "attention_bias": True,
            "head_dim": 64,
            "layer_types": None,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
        },
        kinds=_gpt_oss_kinds,
        moe=_gpt_oss_moe,
        moe_keys=("num_local_experts", "intermediate_size"),
        aliases={"num_experts": "num_local_experts"},
        rope={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        dense_mlps=False,
        sinks=True,
        only={"swiglu_alpha": (1.702,)},
        write=lambda config: {
            "num_local_experts": config.moe.num_experts,
            "intermediate_size": config.moe.expert_dim,
            "swiglu_limit": config.moe.clamp,
        },
    ),
}
