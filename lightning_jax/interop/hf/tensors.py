"""The tensors in a file of a model family, and the parameters of ours that each of them holds.

A file has one tensor per layer, and often per expert; ours are stacked over units and experts. The
table is made from the config, so a missing or an extra tensor is known before anything is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from lightning_jax import model as lm
from lightning_jax.config import ModelConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.interop.hf.config import LIGHTNING

SELECTION_BIAS = "router/bias_URE"


@dataclasses.dataclass(frozen=True)
class Part:
    """Where one file tensor (or half of an interleaved one) goes: `parameter[index]`."""

    path: str
    index: tuple[int, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, by name and shape, and the parts of parameters that it holds.

    Forms: "as_is" reshapes; "linear" is a torch Linear, [out, in], where ours is [in, out] with
    its axes split into heads; "linears" is a stack of them, [..., out, in], which may hold two
    parts one after the other in `out`; "interleaved" holds two parts, one in the even and one in
    the odd entries of its last axis.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    form: str = "as_is"

    def split(self, tensor: np.ndarray) -> list[np.ndarray]:
        """Returns the parts' values, one per entry of `parts`."""
        if self.form == "interleaved":
            return [tensor[..., start::2] for start in range(2)]
        if self.form == "linears":
            return np.split(tensor.swapaxes(-1, -2), len(self.parts), axis=-1)
        if self.form == "linear":
            tensor = tensor.T
        return [tensor.reshape(self.parts[0].shape)]

    def join(self, values: list[np.ndarray]) -> np.ndarray:
        """The inverse of `split`, contiguous."""
        if self.form == "interleaved":
            return np.stack(values, axis=-1).reshape(self.shape)
        if self.form == "linears":
            return np.ascontiguousarray(np.concatenate(values, axis=-1).swapaxes(-1, -2))
        if self.form == "linear":
            return np.ascontiguousarray(values[0].reshape(self.shape[::-1]).T)
        return np.ascontiguousarray(values[0].reshape(self.shape))


def _as_is(name: str, part: Part) -> FileTensor:
    return FileTensor(name, part.shape, (part,))


def _linear(name: str, part: Part, inputs: int) -> FileTensor:
    shape = (math.prod(part.shape) // inputs, inputs)
    return FileTensor(f"{name}.weight", shape, (part,), "linear")


def _linears(name: str, *parts: Part) -> FileTensor:
    *batch, inputs, outputs = parts[0].shape
    return FileTensor(name, (*batch, len(parts) * outputs, inputs), parts, "linears")


def _interleaved(name: str, one: Part, other: Part) -> FileTensor:
    return FileTensor(name, (*one.shape[:-1], 2 * one.shape[-1]), (one, other), "interleaved")


@dataclasses.dataclass(frozen=True)
class _MoeNames:
    """Names of a family's routers and experts, below `model.layers.<i>.`.

    `interleaved`: all experts are in one tensor, with gate and up in turn. Files of other families
    have a tensor for each expert, or all in one, gate before up.
    """

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False
    selection_bias: bool = False


_MOE_NAMES = {
    "mixtral": _MoeNames(
        router="block_sparse_moe.gate",
        experts="block_sparse_moe.experts",
        gate_up_down=("w1", "w3", "w2"),
    ),
    "dots1": _MoeNames(selection_bias=True),
    "gpt_oss": _MoeNames(router="mlp.router", interleaved=True),
    LIGHTNING: _MoeNames(selection_bias=True, interleaved=True),
}


def file_tensors(
    config: ModelConfig, model_type: str, found: Collection[str] = ()
) -> list[FileTensor]:
    """Returns the tensors of a file of this family, in the order of the layers.

    Together they hold every parameter, and the router's selection bias where the family has one.
    `found` are the names in a file that is there: they decide where a family has two layouts.
    """
    shapes = parameter_shapes(config)
    tensors = [
        _as_is("model.embed_tokens.weight", _whole("embed/table_VD", shapes)),
        *_layers(config, model_type, shapes, found),
        _as_is("model.norm.weight", _whole("final_norm/scale", shapes)),
    ]
    if not config.tie_embeddings:
        tensors.append(_linear("lm_head", _whole("head/kernel_DV", shapes), config.model_dim))
    held = {part.path for tensor in tensors for part in tensor.parts}
    missing = set(shapes) - held - {SELECTION_BIAS}
    assert not missing, f"no tensor holds {sorted(missing)}"
    return tensors


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters by path, and of the router's selection bias."""
    leaves: dict[str, Any] = traverse_util.flatten_dict(lm.abstract_params(config), sep="/")
    bias = jax.eval_shape(lambda: lm.init_router(config)).bias_URE
    return {path: leaf.shape for path, leaf in leaves.items()} | {SELECTION_BIAS: bias.shape}


def known_name(name: str, model_type: str) -> str:
    """Returns the name in our tables of a tensor that the reference library reads as well.

    Base models have no "model." before their tensors, and newer Mixtral files say "mlp".
    """
    if model_type == LIGHTNING:
        return name
    if not name.startswith(("model.", "lm_head.")):
        name = f"model.{name}"
    return name.replace(".mlp.", ".block_sparse_moe.") if model_type == "mixtral" else name


def has_selection_bias(model_type: str) -> bool:
    """Whether files of this family can hold the router's selection bias."""
    return _MOE_NAMES.get(model_type, _MoeNames()).selection_bias


def _whole(path: str, shapes: dict[str, tuple[int, ...]]) -> Part:
    return Part(path, (), shapes[path])


def _layers(
    config: ModelConfig,
    model_type: str,
    shapes: dict[str, tuple[int, ...]],
    found: Collection[str],
) -> Iterator[FileTensor]:
    for index, spec in enumerate(config.prefix_layers):
        layer = _Layer(config, spec, f"model.layers.{index}.", f"prefix/{spec.key}", (), shapes)
        yield from layer.tensors(model_type, 0, found)
    index = len(config.prefix_layers)
    for unit in range(config.num_units):
        routed = 0
        for spec in config.unit_layers:
            path = f"units/{spec.key}"
            layer = _Layer(config, spec, f"model.layers.{index}.", path, (unit,), shapes)
            yield from layer.tensors(model_type, routed, found)
            index, routed = index + 1, routed + spec.routed


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer: `name` begins its tensors' names, `path` its parameters', `at` is its unit."""

    config: ModelConfig
    spec: LayerSpec
    name: str
    path: str
    at: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]

    def tensors(
        self, model_type: str, routed_before: int, found: Collection[str]
    ) -> Iterator[FileTensor]:
        """All tensors of the layer; `routed_before` counts the unit's routed layers before it."""
        yield self._same("input_layernorm.weight", "attention_norm/scale")
        yield from self._attention()
        yield self._same("post_attention_layernorm.weight", "mlp_norm/scale")
        if not self.spec.routed:
            yield from self._gated_mlp("mlp", "mlp")
            return
        names = _MOE_NAMES.get(model_type, _MoeNames())
        yield from self._router(names, routed_before)
        if self.config.moe.num_shared_experts:
            yield from self._gated_mlp("mlp.shared_experts", "moe/shared")
        if names.interleaved:
            yield from self._interleaved_experts(names)
        elif f"{self.name}{names.experts}.gate_up_proj" in found:
            yield from self._stacked_experts(names)
        else:
            yield from self._experts(names)

    def _attention(self) -> Iterator[FileTensor]:
        attention, width = self.config.attention, self.config.model_dim
        owned = (("k", "key"), ("v", "value")) if self.spec.owns_kv else ()
        for short, long in (("q", "query"), *owned):
            heads = "DNH" if short == "q" else "DKH"
            yield self._linear(f"self_attn.{short}_proj", f"attention/{long}_{heads}", width)
            if attention.qkv_bias:
                bias = f"attention/{long}_bias_{heads[1:]}"
                yield self._flat(f"self_attn.{short}_proj.bias", bias)
            if attention.qk_norm != "none" and short != "v":
                yield self._same(f"self_attn.{short}_norm.weight", f"attention/{long}_norm/scale")
        rows = attention.num_heads * attention.head_dim
        yield self._linear("self_attn.o_proj", "attention/out_NHD", rows)
        if attention.out_bias:
            yield self._same("self_attn.o_proj.bias", "attention/out_bias_D")
        if attention.sinks:
            yield self._same("self_attn.sinks", "attention/sinks_N")
        if attention.output_gate:
            yield self._linear("self_attn.head_gate", "attention/gate_DN", width)

    def _gated_mlp(self, name: str, path: str) -> Iterator[FileTensor]:
        width = self.config.model_dim
        hidden = self.shapes[f"{self.path}/{path}/down_FD"][-2]
        yield self._linear(f"{name}.gate_proj", f"{path}/gate_DF", width)
        yield self._linear(f"{name}.up_proj", f"{path}/up_DF", width)
        yield self._linear(f"{name}.down_proj", f"{path}/down_FD", hidden)

    def _router(self, names: _MoeNames, routed_before: int) -> Iterator[FileTensor]:
        yield self._linear(names.router, "moe/router_DE", self.config.model_dim)
        if self.config.moe.router_bias:
            yield self._same(f"{names.router}.bias", "moe/router_bias_E")
        if names.selection_bias:
            index = (*self.at, routed_before)
            part = Part(SELECTION_BIAS, index, (self.config.moe.num_experts,))
            yield _as_is(f"{self.name}{names.router}.e_score_correction_bias", part)

    def _experts(self, names: _MoeNames) -> Iterator[FileTensor]:
        moe, width = self.config.moe, self.config.model_dim
        ours = ("gate_EDF", "up_EDF", "down_EFD")
        for expert in range(moe.num_experts):
            for theirs, leaf in zip(names.gate_up_down, ours, strict=True):
                name = f"{names.experts}.{expert}.{theirs}"
                inputs = moe.expert_dim if leaf == "down_EFD" else width
                yield self._linear(name, f"moe/{leaf}", inputs, (expert,))

    def _stacked_experts(self, names: _MoeNames) -> Iterator[FileTensor]:
        base = f"{self.name}{names.experts}"
        gate, up = self._part("moe/gate_EDF"), self._part("moe/up_EDF")
        yield _linears(f"{base}.gate_up_proj", gate, up)
        yield _linears(f"{base}.down_proj", self._part("moe/down_EFD"))

    def _interleaved_experts(self, names: _MoeNames) -> Iterator[FileTensor]:
        base = f"{self.name}{names.experts}"
        gate, up = self._part("moe/gate_EDF"), self._part("moe/up_EDF")
        yield _interleaved(f"{base}.gate_up_proj", gate, up)
        yield self._same(f"{names.experts}.down_proj", "moe/down_EFD")
        if self.config.moe.expert_bias:
            gate, up = self._part("moe/gate_bias_EF"), self._part("moe/up_bias_EF")
            yield _interleaved(f"{base}.gate_up_proj_bias", gate, up)
            yield self._same(f"{names.experts}.down_proj_bias", "moe/down_bias_ED")

    def _part(self, path: str, index: tuple[int, ...] = ()) -> Part:
        path, index = f"{self.path}/{path}", self.at + index
        return Part(path, index, self.shapes[path][len(index) :])

    def _same(self, name: str, path: str) -> FileTensor:
        return _as_is(self.name + name, self._part(path))

    def _flat(self, name: str, path: str) -> FileTensor:
        """A bias, whose heads are not split in the file."""
        part = self._part(path)
        return FileTensor(self.name + name, (math.prod(part.shape),), (part,))

    def _linear(self, name: str, path: str, inputs: int, index: tuple[int, ...] = ()) -> FileTensor:
        return _linear(self.name + name, self._part(path, index), inputs)
