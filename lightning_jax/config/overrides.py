"""Changes of single fields of a config that is still a nested mapping, by dotted names.

Flags (`--config.model.unit=G`) and the arms of sweeps make them. A field must exist, but for what
the user of a config names:

- `data.sources.NAME.path` adds a source, as does `data.sources.NAME`, which is short for it; None
  removes one. Every stage follows: where it has a mixture, a new source joins it with its weight,
  and one that is removed leaves it.
- `stages.STAGE.mixture.NAME` sets a weight in a stage's mixture; None removes it. A mixture that is
  empty, which means all sources by their own weight, is first written out. `stages.STAGE.mixture`
  itself can only become None: empty again.
"""

from __future__ import annotations

import ast
import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lightning_jax.config.errors import UserError, did_you_mean
from lightning_jax.config.fields import require
from lightning_jax.config.model import MoeConfig

_SOURCES = "data.sources."
_KEYS = re.compile(r"(data\.sources\.[^.]+|stages\.[^.]+\.mixture)(\..*)?")
_MIXTURE = re.compile(r"stages\.[^.]+\.mixture")
_NEW_SOURCE = {"path": "", "eval_path": "", "weight": 1.0}

# What other frameworks call our fields.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "max_lr": "learning_rate",
    "min_lr": "final_learning_rate",
    "warmup": "warmup_tokens",
    "warmup_steps": "warmup_tokens",
    "warmup_iters": "warmup_tokens",
    "steps": "tokens",
    "num_steps": "tokens",
    "max_steps": "tokens",
    "max_iters": "tokens",
    "epochs": "tokens",
    "block_size": "seq_len",
    "context_length": "seq_len",
    "sequence_length": "seq_len",
    "max_seq_len": "seq_len",
    "gradient_accumulation_steps": "accumulate",
    "d_model": "model_dim",
    "n_embd": "model_dim",
    "hidden_size": "model_dim",
    "n_head": "num_heads",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "sliding_window": "window",
    "intermediate_size": "mlp_dim",
    "num_experts_per_tok": "top_k",
    "dtype": "compute_dtype",
    "dataset": "sources",
    "grad_clip": "clip_norm",
}
_DEPTH = ("layers", "num_layers", "n_layer", "n_layers", "num_hidden_layers", "depth")


def may_add(field: str) -> bool:
    """Whether a change of a field may add or remove it, as `override` does it."""
    return _KEYS.fullmatch(field) is not None


def parse(text: str) -> Any:
    """Returns the value of a Python literal; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def plain(value: Any) -> Any:
    """Returns mappings of any kind as dicts, in their order; tuples as lists, as JSON has them."""
    if hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def override(
    values: Mapping[str, Any], changes: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """Returns a copy of nested `values` with dotted fields changed, those of sources first.

    Args:
      values: of a config, as plain dicts.
      changes: by dotted field, the new value; see the module docstring.
      prefix: of the fields that errors suggest.

    Raises:
      UserError: an unknown field, with all fields that it may mean.
    """
    result = copy.deepcopy(dict(values))
    of_sources = [field for field in changes if field.startswith(_SOURCES)]
    _change_sources(result, {field: changes[field] for field in of_sources}, prefix)
    written_out: set[str] = set()
    for field in changes:
        if field in of_sources:
            continue
        if may_add(field):
            _change_mixture(result, field, changes[field], prefix, written_out)
        else:
            require_field(result, field, prefix)
            _set(result, field, changes[field])
    return result


def require_field(values: Mapping[str, Any], field: str, prefix: str = "") -> None:
    """Raises the UserError of an unknown dotted field, with what was meant, unless it exists."""
    at: Any = values
    path = ""
    for part in field.split("."):
        if not hasattr(at, "items"):
            raise UserError(f"unknown config field {field}: {path[:-1]} has no fields")
        if part not in at:
            hint = _meant(values, field, prefix) or "configs/base.py has every field"
            raise UserError(f"unknown config field {field}: {hint}")
        at, path = at[part], f"{path}{part}."


def fields(values: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """Yields the dotted names of all fields, sections included."""
    for key, value in values.items():
        yield path + key
        if hasattr(value, "items"):
            yield from fields(value, f"{path}{key}.")


def misleading(moe: MoeConfig, changed: Iterable[str], *, prefix: str = "") -> str | None:
    """Returns what changes do not do that they seem to do, in one line; None if they do it.

    `model.moe.top_p` is not the p of a run whose controller moves it. Whoever changes the
    controller's target besides knows that.
    """
    names = {"model.moe.top_p", "model.moe.target_experts"} & set(changed)
    if names != {"model.moe.top_p"} or not moe.num_experts or not moe.target_experts:
        return None
    return (
        f"{prefix}model.moe.top_p={moe.top_p:g} is only where the controller starts, which holds "
        f"{moe.target_experts:g} experts per token; a fixed top_p needs "
        f"{prefix}model.moe.target_experts=0 too"
    )


def _change_sources(result: dict[str, Any], changes: Mapping[str, Any], prefix: str) -> None:
    if not changes:
        return
    require_field(result, "data.sources")
    sources = result["data"]["sources"]
    before = _weights(sources)
    for field, value in changes.items():
        name, _, inside = field.removeprefix(_SOURCES).partition(".")
        if inside:
            source = sources.setdefault(name, dict(_NEW_SOURCE))
            if inside not in source:
                require_field(result, field, prefix)
            source[inside] = value
        elif value is not None:
            value = value if hasattr(value, "items") else {"path": value}
            sources[name] = {**sources.get(name, _NEW_SOURCE), **value}
        elif sources.pop(name, None) is None:
            raise UserError(f"{field} = None: there is no such source{did_you_mean(name, before)}")
    for name in [name for name in sources if name not in before]:
        # Also a wrong name for an old one.
        if sources[name]["path"] == "":
            raise UserError(
                f"{_SOURCES}{name}: there is no such source{did_you_mean(name, before)}; a new one "
                f"needs {prefix}{_SOURCES}{name}.path"
            )
    after = _weights(sources)
    for name, stage in result["stages"].items():
        if stage and stage["mixture"]:
            _follow(f"stages.{name}.mixture", stage["mixture"], before, after)


def _weights(sources: Mapping[str, Any]) -> dict[str, float]:
    given = {name: source["weight"] for name, source in sources.items() if source is not None}
    return {name: _number(f"{_SOURCES}{name}.weight", weight) for name, weight in given.items()}


def _number(field: str, value: Any) -> float:
    require(type(value) in (int, float), field, value, "of type float")
    return value


def _follow(
    field: str, mixture: dict[str, Any], before: dict[str, float], after: dict[str, float]
) -> None:
    """Takes new sources into a mixture, and those that are gone out of it.

    A new one gets the share that it has in a stage without a mixture.
    """
    total = sum(_number(f"{field}.{name}", weight) for name, weight in mixture.items())
    factor = total / sum(before.values()) if sum(before.values()) else 1.0
    for name in [name for name in before if name not in after]:
        mixture.pop(name, None)
    for name in [name for name in after if name not in before]:
        mixture.setdefault(name, after[name] * factor)


def _change_mixture(
    result: dict[str, Any], field: str, value: Any, prefix: str, written_out: set[str]
) -> None:
    _, stage, _, *names = field.split(".", 3)
    require_field(result, f"stages.{stage}.mixture", prefix)
    if not names:
        require(value is None, field, value, f"None, or a weight by source: {prefix}{field}.NAME=1")
        result["stages"][stage]["mixture"] = {}
        return
    mixture, sources = result["stages"][stage]["mixture"], result["data"]["sources"]
    if not mixture and stage not in written_out:
        mixture.update(_weights(sources))
    written_out.add(stage)
    if value is not None:
        mixture[names[0]] = value
    elif mixture.pop(names[0], None) is None:
        hint = did_you_mean(names[0], mixture)
        raise UserError(f"{field} = None: the mixture has no such source{hint}")


def _set(values: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for part in parents:
        values = values[part]
    values[last] = copy.deepcopy(value)


def _meant(values: Mapping[str, Any], field: str, prefix: str) -> str:
    """`did you mean a.b.c or a.d.c?`, of every field that ends like this one; "" without any."""
    *parents, last = field.split(".")
    if last in _DEPTH:
        return (
            f"the depth is the letters of {prefix}model.unit times {prefix}model.num_units "
            f"(after {prefix}model.prefix)"
        )
    known = [*fields(values)]
    if "mixture" in parents:
        found = [f"{path}.{last}" for path in known if _MIXTURE.fullmatch(path)]
    else:
        names = (field, last, _OTHER_NAMES.get(last, last))
        found = next(filter(None, (_ending(known, name) for name in names)), [])
    if not found:
        inside = ".".join(parents)
        near = [path for path in known if path.rpartition(".")[0] == inside] if inside else known
        lasts = {path.rpartition(".")[2] for path in near}
        close = difflib.get_close_matches(last, lasts, n=1)
        found = _ending(near, close[0]) if close else []
    return f"did you mean {' or '.join(prefix + path for path in found)}?" if found else ""


def _ending(known: Sequence[str], name: str) -> list[str]:
    """The fields of that name or, if there are none, the sections."""
    found = [path for path in known if path == name or path.endswith(f".{name}")]
    inner = [path for path in found if not any(other.startswith(f"{path}.") for other in known)]
    return inner or found
