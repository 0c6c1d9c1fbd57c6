"""A dense checkpoint as the start of a model with experts, windows and shared keys and values.

Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): every expert begins as the dense MLP. For
fine-grained experts the MLP's hidden units are cut into slices, and the experts fall into virtual
groups that hold one slice each, in several copies (He et al., "Upcycling Large Language Models into
Mixture of Experts", arXiv 2410.07524, section 3.2). Slices of one copy start with the same router
column, so top-k takes whole copies.

The result computes the same function as the dense model if nothing else changes (no window, no
borrowing, no new norm) and the chosen gates have a known sum: `is_exact` tells.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from lightning_jax import model as lm
from lightning_jax.config import ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import require_choice
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.interop.hf.config import meaning

POOLS = ("mean", "first")
# Leaves of a layer by the projection that they belong to; other leaves are copied as they are.
_KEY_VALUE = ("key_DKH", "value_DKH", "key_bias_KH", "value_bias_KH", "key_norm/scale")

Leaves = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Slices:
    """How a dense MLP of `width` hidden units is cut.

    The first `shared` slices of `size` go to the shared experts, the other `routed` ones to the
    routed experts, each in `copies` copies; expert e holds slice `e % routed` of copy
    `e // routed`.
    """

    size: int
    shared: int
    routed: int
    copies: int


def upcycle(
    source: ModelConfig, params: Any, target: ModelConfig, key: jax.Array, *, pool: str = "mean"
) -> tuple[Any, lm.Router]:
    """Returns float32 parameters and router of `target` made from dense `params` of `source`.

    Args:
      source: a model whose MLPs are all dense.
      params: its parameters.
      target: same width, heads, depth and vocabulary; any pattern and experts.
      key: draws the router's columns and the parameters that `source` lacks.
      pool: keys and values of an owner are the "mean" of those of the layers that will read them,
        or the owner's own ("first").

    Raises:
      UserError: shapes that do not fit, or something that `source` has and `target` cannot hold.
    """
    require_choice("pool", pool, POOLS)
    _check(source, target)
    fresh: dict[str, Any] = traverse_util.flatten_dict(lm.init_params(target, key), sep="/")
    theirs: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    written = {path: leaf for path, leaf in theirs.items() if not path.startswith(("units", "pre"))}
    if not target.tie_embeddings and source.tie_embeddings:
        written["head/kernel_DV"] = theirs["embed/table_VD"].T
    layers = [_layer_of(theirs, source, index) for index in range(source.num_layers)]
    for index, (path, at, spec) in enumerate(_places(target)):
        readers = _readers(target, index) if pool == "mean" else (index,)
        mine = {name: _at(fresh[f"{path}/{name}"], at) for name in _names(fresh, path)}
        mine |= _attention(layers, readers, mine)
        mine |= _mlp(layers[index], mine, spec, source, target)
        for name, value in mine.items():
            full = f"{path}/{name}"
            held = written.get(full, fresh[full])
            written[full] = value if at is None else held.at[at].set(value)
    written = {path: leaf.astype(jnp.float32) for path, leaf in written.items() if path in fresh}
    return traverse_util.unflatten_dict(written, sep="/"), lm.init_router(target)


def is_exact(source: ModelConfig, target: ModelConfig) -> bool:
    """Whether `upcycle` keeps the function: the same attention, and gates that sum to 1.

    With renormalised top-k gates over whole copies every copy is the whole MLP, so any mixture of
    them is the MLP itself.
    """
    theirs, ours = meaning(source), meaning(target)
    if any(ours[name] != theirs[name] for name in ("layers", "attention", "norm_eps")):
        return False
    routed = any(spec.routed for spec in target.layers)
    moe = target.moe
    if not routed:
        return True
    cut = slices(source.mlp_dim, target)
    kinds = {moe.train_routing, moe.eval_routing}
    whole = kinds == {"top_k"} and moe.top_k % cut.routed == 0
    return whole and moe.renormalize_gates and not moe.clamp and not moe.max_groups


def slices(width: int, target: ModelConfig) -> Slices:
    """Returns how a dense MLP of `width` hidden units is cut for `target`.

    Raises:
      UserError: `width` is no whole number of experts, or they are no whole number of copies.
    """
    moe = target.moe
    count, rest = divmod(width, moe.expert_dim)
    routed = count - moe.num_shared_experts
    if rest or routed < 1:
        raise UserError(
            f"model.moe.expert_dim = {moe.expert_dim}: must divide the dense MLP's {width} hidden "
            f"units, into more slices than num_shared_experts = {moe.num_shared_experts}"
        )
    if moe.num_experts % routed:
        raise UserError(
            f"model.moe.num_experts = {moe.num_experts}: must be a multiple of the {routed} slices "
            "of a copy of the dense MLP"
        )
    return Slices(moe.expert_dim, moe.num_shared_experts, routed, moe.num_experts // routed)


def _check(source: ModelConfig, target: ModelConfig) -> None:
    if any(spec.routed for spec in source.layers):
        raise UserError("the source has experts already: upcycling starts from dense MLPs")
    names = ("vocab_size", "model_dim", "num_layers")
    pairs = [(f"model.{name}", getattr(source, name), getattr(target, name)) for name in names]
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        values = (getattr(config.attention, name) for config in (source, target))
        pairs.append((f"model.attention.{name}", *values))
    for field, theirs, ours in pairs:
        if theirs != ours:
            raise UserError(f"{field} = {ours}: must be the source's, {theirs}")
    for field, theirs, ours in (
        ("attention.qkv_bias", source.attention.qkv_bias, target.attention.qkv_bias),
        ("attention.out_bias", source.attention.out_bias, target.attention.out_bias),
        ("attention.sinks", source.attention.sinks, target.attention.sinks),
        ("attention.output_gate", source.attention.output_gate, target.attention.output_gate),
    ):
        if theirs and not ours:
            raise UserError(f"model.{field} = {ours}: the source has it, and it would be lost")
    if source.attention.qk_norm not in ("none", target.attention.qk_norm):
        theirs = source.attention.qk_norm
        raise UserError(f"model.attention.qk_norm = {target.attention.qk_norm!r}: not {theirs!r}")
    if target.tie_embeddings and not source.tie_embeddings:
        raise UserError("model.tie_embeddings = True: the source's head is not its embedding")
    dense = [not spec.routed for spec in target.layers]
    if any(dense) and source.mlp_dim != target.mlp_dim:
        raise UserError(f"model.mlp_dim = {target.mlp_dim}: must be the source's, {source.mlp_dim}")
    if not all(dense):
        slices(source.mlp_dim, target)


def _places(config: ModelConfig) -> list[tuple[str, int | None, LayerSpec]]:
    """Path, unit (None in the prefix) and spec of every layer, from the first to the last."""
    places: list[tuple[str, int | None, LayerSpec]] = [
        (f"prefix/{spec.key}", None, spec) for spec in config.prefix_layers
    ]
    for unit in range(config.num_units):
        places += [(f"units/{spec.key}", unit, spec) for spec in config.unit_layers]
    return places


def _names(leaves: Leaves, path: str) -> list[str]:
    return [name.removeprefix(f"{path}/") for name in leaves if name.startswith(f"{path}/")]


def _at(leaf: jax.Array, unit: int | None) -> jax.Array:
    return leaf if unit is None else leaf[unit]


def _layer_of(leaves: Leaves, config: ModelConfig, index: int) -> Leaves:
    """Leaves of one layer by name; a borrower gets its owner's keys and values."""
    places = _places(config)
    path, unit, spec = places[index]
    found = {name: _at(leaves[f"{path}/{name}"], unit) for name in _names(leaves, path)}
    owner = f"{path.split('/')[0]}/{spec.owner}"
    for name in _names(leaves, owner):
        if name.removeprefix("attention/") in _KEY_VALUE:
            found[name] = _at(leaves[f"{owner}/{name}"], unit)
    return found


def _readers(config: ModelConfig, index: int) -> Sequence[int]:
    """The layers that read the keys and values of layer `index`, itself among them."""
    places = _places(config)
    path, unit, spec = places[index]
    group = [
        i
        for i, (other, at, reader) in enumerate(places)
        if at == unit and other.split("/")[0] == path.split("/")[0] and reader.owner == spec.key
    ]
    return group or (index,)


def _attention(layers: list[Leaves], readers: Sequence[int], mine: Leaves) -> Leaves:
    """Attention and norms; `readers` are the layers whose keys and values are averaged."""
    own, changed = layers[readers[0]], {}
    for name in mine:
        short = name.removeprefix("attention/")
        if short in _KEY_VALUE and name in own:
            changed[name] = jnp.mean(jnp.stack([layers[i][name] for i in readers]), axis=0)
        elif name in own and not name.startswith("mlp/"):
            changed[name] = own[name]
    return changed


def _mlp(
    layer: Leaves, mine: Leaves, spec: LayerSpec, source: ModelConfig, target: ModelConfig
) -> Leaves:
    if not spec.routed:
        return {name: layer[name] for name in mine if name.startswith("mlp/")}
    cut = slices(source.mlp_dim, target)
    first = cut.shared * cut.size
    gate_DF, up_DF, down_FD = (layer[f"mlp/{name}"] for name in ("gate_DF", "up_DF", "down_FD"))
    changed = {
        "moe/gate_EDF": _experts(gate_DF[:, first:], cut),
        "moe/up_EDF": _experts(up_DF[:, first:], cut),
        "moe/down_EFD": _experts(down_FD[first:].T, cut).swapaxes(1, 2) * _scale(cut, target),
        "moe/router_DE": jnp.repeat(mine["moe/router_DE"][:, :: cut.routed], cut.routed, axis=1),
    }
    if cut.shared:
        changed |= {
            "moe/shared/gate_DF": gate_DF[:, :first],
            "moe/shared/up_DF": up_DF[:, :first],
            "moe/shared/down_FD": down_FD[:first],
        }
    return changed


def _experts(matrix_DF: jax.Array, cut: Slices) -> jax.Array:
    """Cuts the hidden axis into slices and repeats them, copy by copy."""
    width = matrix_DF.shape[0]
    slice_EDF = matrix_DF.reshape(width, cut.routed, cut.size).swapaxes(0, 1)
    return jnp.tile(slice_EDF, (cut.copies, 1, 1))


def _scale(cut: Slices, target: ModelConfig) -> float:
    """Factor of the down projections that undoes the gates.

    Renormalised gates over whole copies sum to 1, of which every slice gets 1 / slices. Raw gates
    of a fresh router are near 1 / experts (a softmax) or 1 / 2 (a sigmoid) for each of the chosen.
    """
    moe = target.moe
    if moe.renormalize_gates:
        gate = 1 / cut.routed
    else:
        chosen = moe.num_experts if moe.eval_routing == "dense" else moe.top_k
        if moe.eval_routing == "top_p":
            chosen = moe.target_experts or moe.top_k
        one = 1 / moe.num_experts if moe.router_score == "softmax" else 0.5
        gate = one * chosen / cut.routed
    return 1 / (gate * moe.routed_scale)
