"""RoPE settings of a `config.json`, in its older and its newer spelling, to ours and back.

Older files have `rope_theta` and `rope_scaling` (with `type` or `rope_type`), newer ones
`rope_parameters`: one dictionary, or one for each layer type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_jax.config import AttentionConfig
from lightning_jax.config.errors import UserError, suggest
from lightning_jax.config.fields import require
from lightning_jax.config.kinds import check, shorten
from lightning_jax.interop.hf.keys import FULL, ROPE_KEYS, SLIDING, Json
from lightning_jax.ops.rope import yarn_attention_factor

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
_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}
_LENGTH = "original_max_position_embeddings"


def read_rope(config: Json, default: Json | None = None) -> Json:
    """Returns `rope_base_local`, `rope_base_global`, `rope_scaling` of an `AttentionConfig`.

    Args:
      config: a `config.json` whose values are of the kinds in `keys.KEYS`.
      default: the settings of a config that has none.

    Raises:
      UserError: an unknown kind of scaling, a value of the wrong type or out of range, a missing
        key, a key that would be ignored, rotation of a part of the head only, or layer types that
        are scaled differently.
    """
    # In the order in which the reference library looks for them.
    for where in ("rope_scaling", "rope_parameters"):
        given = config.get(where)
        if given:
            break
    if given is None:
        given = default or {}
    check(given, ROPE_KEYS, where, required=[])
    by_type = {name: given[name] for name in (SLIDING, FULL) if name in given}
    if by_type and len(by_type) < len(given):
        raise UserError(f"{where} = {shorten(given)}: must be of one kind, or by kind of layer")
    by_type = by_type or {FULL: given}
    scalings = {name: _scaling(entry, config, where) for name, entry in by_type.items()}
    bases = {name: _base(entry, config, where) for name, entry in by_type.items()}
    one, other = scalings.get(FULL, scalings.get(SLIDING)), scalings.get(SLIDING)
    if other not in (None, one):
        raise UserError(f"{where} = {shorten(given)}: {SLIDING} and {FULL} must be scaled alike")
    return {
        "rope_base_local": bases.get(SLIDING, bases.get(FULL)),
        "rope_base_global": bases.get(FULL, bases.get(SLIDING)),
        "rope_scaling": one,
    }


def _base(given: Json, config: Json, where: str) -> float:
    theta = given.get("rope_theta", config["rope_theta"])
    if theta is None:
        raise UserError(f"{where}: rope_theta = None: must be a number")
    return float(theta)


def _scaling(given: Json, config: Json, where: str) -> Json:
    check(given, ROPE_KEYS, where, required=[])
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _KINDS:
        raise UserError(f"{where}: rope_type = {shorten(kind)}: must be {suggest(kind, _KINDS)}")
    for rotated in (given.get("partial_rotary_factor"), config.get("partial_rotary_factor")):
        right = "1: whole heads are rotated"
        require(rotated in (None, 1), "partial_rotary_factor", rotated, right)
    known = _KEYS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor", _LENGTH}
    for key in given:
        if key not in known and given[key] is not None:
            right = suggest(key, sorted(known))
            raise UserError(f"{where} {kind!r} has an unknown key {key!r}: must be {right}")
    if kind == "default":
        return PLAIN
    check(given, {}, where, required=sorted(_KEYS[kind] & _REQUIRED))
    scaling = {**PLAIN, "kind": kind}
    if kind != "linear":
        scaling["original_length"] = _original_length(given, config, where)
    for name in _KEYS[kind] & {*_REQUIRED, "beta_fast", "beta_slow"}:
        if given.get(name) is not None:
            scaling[name] = float(given[name])
    if kind == "yarn":
        scaling["truncate"] = given.get("truncate", True)
        scaling["attention_factor"] = _attention_factor(given)
    return scaling


def _original_length(given: Json, config: Json, where: str) -> int:
    """Tokens of the training before the stretching, by default all that the model is made for."""
    for length in (config.get(_LENGTH), given.get(_LENGTH), config.get("max_position_embeddings")):
        if length is not None:
            return length
    raise UserError(f"{where}: lacks {_LENGTH}")


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
