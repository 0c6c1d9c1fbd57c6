"""RoPE settings of a `config.json`, in its older and its newer spelling, to ours and back.

Older files have `rope_theta` and `rope_scaling` (with `type` or `rope_type`), newer ones
`rope_parameters`: one dictionary, or one for each layer type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_jax.config import AttentionConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require, suggest
from lightning_jax.interop.hf.families import FULL, SLIDING
from lightning_jax.ops.rope import yarn_attention_factor

Json = dict[str, Any]

PLAIN: Json = {
    "kind": "none",
    "factor": 1.0,
    "original_length": 4096,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
    "attention_factor": 1.0,
}
_KINDS = ("default", "linear", "llama3", "yarn")
# Keys that each kind may have besides `rope_type` and `rope_theta`; another would be ignored.
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "beta_fast",
        "beta_slow",
        "truncate",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
    },
}
_LENGTH = "original_max_position_embeddings"


def read_rope(config: Json, default_theta: float) -> Json:
    """Returns `rope_base_local`, `rope_base_global`, `rope_scaling` of an `AttentionConfig`.

    Raises:
      UserError: an unknown kind of scaling, a key of it that would be ignored, rotation of a part
        of the head only, or layer types that are scaled differently.
    """
    theta = float(config.get("rope_theta") or default_theta)
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    by_type = {SLIDING: given, FULL: given}
    if set(given) & set(by_type):
        by_type = {name: given.get(name) or {} for name in by_type}
    scalings = {name: _scaling(entry, config) for name, entry in by_type.items()}
    if scalings[SLIDING] != scalings[FULL]:
        raise UserError(f"rope_parameters = {given!r}: {SLIDING} and {FULL} must be scaled alike")
    bases = {name: float(entry.get("rope_theta", theta)) for name, entry in by_type.items()}
    return {
        "rope_base_local": bases[SLIDING],
        "rope_base_global": bases[FULL],
        "rope_scaling": scalings[FULL],
    }


def _scaling(given: Json, config: Json) -> Json:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _KINDS:
        raise UserError(f"rope_type = {kind!r}: must be {suggest(str(kind), _KINDS)}")
    rotated = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    require(rotated == 1.0, "partial_rotary_factor", rotated, "1: whole heads are rotated")
    known = _KEYS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor", _LENGTH}
    for key in given:
        if key not in known and given[key] is not None:
            right = suggest(key, sorted(known))
            raise UserError(f"rope scaling {kind!r} has an unknown key {key!r}: must be {right}")
    if kind == "default":
        return PLAIN
    scaling = {**PLAIN, "kind": kind, "factor": float(given["factor"])}
    length = given.get(_LENGTH) or config.get(_LENGTH) or config.get("max_position_embeddings")
    if kind != "linear":
        scaling["original_length"] = int(length)
    for name in _KEYS[kind] & {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}:
        if given.get(name) is not None:
            scaling[name] = float(given[name])
    if kind == "yarn":
        scaling["truncate"] = bool(given.get("truncate", True))
        scaling["attention_factor"] = _attention_factor(given)
    return scaling


def _attention_factor(given: Mapping[str, Any]) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    factor = float(given["factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        weights = given["mscale"], given["mscale_all_dim"]
        one, other = (yarn_attention_factor(factor, weight) for weight in weights)
        return one / other
    return yarn_attention_factor(factor)


def write_rope(attention: AttentionConfig, uses_global: bool) -> Json:
    """Returns the RoPE keys of a `config.json`, in the newer spelling."""
    scaling = attention.rope_scaling
    theta = attention.rope_base_global if uses_global else attention.rope_base_local
    parameters: Json = {"rope_theta": theta, "rope_type": "default"}
    if scaling.kind != "none":
        fields = dataclasses.asdict(scaling)
        parameters["rope_type"] = scaling.kind
        parameters |= {name: fields[name] for name in _KEYS[scaling.kind] if name in fields}
        if scaling.kind != "linear":
            parameters[_LENGTH] = scaling.original_length
    return {"rope_parameters": parameters}
