"""The differences between the published model families that can be read and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError

SLIDING, FULL = "sliding_attention", "full_attention"

Json = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """The meaning of a model type beyond the keys that all families share.

    `kinds` gives the letter of every layer, `moe` the fields of `MoeConfig` that the config sets,
    `routed` whether a layer has experts, `write` the keys that only this type has.

    Functions that read take the config with the type's defaults filled in.
    `only` maps keys to the one value with which a layer computes the same as ours.
    """

    defaults: Json
    kinds: Callable[[Json], str]
    moe: Callable[[Json], Json] | None = None
    routed: Callable[[Json, int], bool] = lambda config, index: True
    qk_norm: str = "none"
    sinks: bool = False
    dense_mlps: bool = True
    only: Json = dataclasses.field(default_factory=dict)
    write: Callable[[ModelConfig], Json] = lambda config: {}


def _all_full(config: Json) -> str:
    return "G" * config["num_hidden_layers"]


def _all_sliding(config: Json) -> str:
    return ("L" if config["sliding_window"] else "G") * config["num_hidden_layers"]


def _by_layer_types(config: Json) -> str:
    types = config["layer_types"]
    letters = {SLIDING: "L", FULL: "G"}
    count = config["num_hidden_layers"]
    if not isinstance(types, list) or len(types) != count or set(types) - set(letters):
        raise UserError(
            f"layer_types = {types!r}: must be {count} entries, {SLIDING} or {FULL}, one per layer"
        )
    return "".join(letters[name] for name in types)


def _dots1_kinds(config: Json) -> str:
    if config["layer_types"] is not None:
        return _by_layer_types(config)
    count, full = config["num_hidden_layers"], config["max_window_layers"]
    return "".join("L" if config["sliding_window"] and i >= full else "G" for i in range(count))


def _gpt_oss_kinds(config: Json) -> str:
    if config["layer_types"] is not None:
        return _by_layer_types(config)
    return "".join("LG"[i % 2] for i in range(config["num_hidden_layers"]))


def _qwen3_kinds(config: Json) -> str:
    return _all_sliding(config) if config["use_sliding_window"] else _all_full(config)


def _softmax_moe(count: str, hidden: str, renormalize: str | None) -> Callable[[Json], Json]:
    def read(config: Json) -> Json:
        return {
            "num_experts": _experts(config, count),
            "expert_dim": config[hidden],
            "renormalize_gates": True if renormalize is None else config[renormalize],
        }

    return read


def _experts(config: Json, key: str) -> int:
    # Newer files say num_local_experts in every family.
    return config[key] if key in config else config["num_local_experts"]


def _dots1_moe(config: Json) -> Json:
    return {
        "num_experts": _experts(config, "n_routed_experts"),
        "expert_dim": config["moe_intermediate_size"],
        "num_shared_experts": config["n_shared_experts"] or 0,
        "router_score": "sigmoid",
        "renormalize_gates": config["norm_topk_prob"],
        "routed_scale": float(config["routed_scaling_factor"]),
    }


def _gpt_oss_moe(config: Json) -> Json:
    return {
        "num_experts": _experts(config, "num_experts"),
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
        only={"mlp_bias": False},
    ),
    "mistral": Family(defaults={"sliding_window": 4096}, kinds=_all_sliding),
    "mixtral": Family(
        defaults={"sliding_window": None, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        kinds=_all_sliding,
        moe=_softmax_moe("num_local_experts", "intermediate_size", None),
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
            "sliding_window": 4096,
            "use_sliding_window": False,
        },
        kinds=_qwen3_kinds,
        moe=_softmax_moe("num_experts", "moe_intermediate_size", "norm_topk_prob"),
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
        dense_mlps=False,
        qk_norm="projection",
        only={"clip_qkv": None},
        write=lambda config: {
            "num_experts": config.moe.num_experts,
            "intermediate_size": config.moe.expert_dim,
            "norm_topk_prob": config.moe.renormalize_gates,
        },
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
            "routed_scaling_factor": 1.0,
            "sliding_window": 4096,
        },
        kinds=_dots1_kinds,
        moe=_dots1_moe,
        routed=lambda config, index: index >= config["first_k_dense_replace"],
        qk_norm="head",
        only={"n_group": 1},
        write=_write_dots1,
    ),
    "gpt_oss": Family(
        defaults={
            "attention_bias": True,
            "layer_types": None,
            "sliding_window": 128,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
        },
        kinds=_gpt_oss_kinds,
        moe=_gpt_oss_moe,
        dense_mlps=False,
        sinks=True,
        only={"swiglu_alpha": 1.702},
        write=lambda config: {
            "num_local_experts": config.moe.num_experts,
            "intermediate_size": config.moe.expert_dim,
            "swiglu_limit": config.moe.clamp,
        },
    ),
}
