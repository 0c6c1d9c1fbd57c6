"""Self-attention of one layer: own or borrowed keys and values, with or without a cache."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import AttentionConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.layers.common import (
    KEPT,
    TOKENS,
    ZEROS,
    RMSNorm,
    fan_in,
    keep,
    output_scale,
    param,
    summed_in_float32,
)
from lightning_jax.ops.attention import attention_probabilities
from lightning_jax.ops.cached_attention import attend
from lightning_jax.ops.collectives import total
from lightning_jax.ops.kv_cache import KV, Chunk, Fresh, Full, Ring, Stored
from lightning_jax.ops.mask import Mask
from lightning_jax.ops.projection import project
from lightning_jax.ops.rope import apply_rope
from lightning_jax.ops.sequence_parallel import with_earlier_keys

View = Fresh | Stored

# Logical names of the leading axes of queries, fresh keys and values, and caches [U, B, S, K, H].
_QUERIES: Any = (*TOKENS, "heads")
_KEYS: Any = (*TOKENS, "kv_heads")
_CACHE: Any = ("layers", "batch", None, "kv_heads")
# Projections of the input, and what splits their results.
_INTO = {
    "query": ("BTD,DNH->BTNH", "heads"),
    "key": ("BTD,DKH->BTKH", "kv_heads"),
    "value": ("BTD,DKH->BTKH", "kv_heads"),
    "gate": ("BTD,DN->BTN", "heads"),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KindContext:
    """The values that all layers of one kind (local or global) share in one forward pass.

    `rope` is the (sin, cos) table of the query positions, None for NoPE; `segment_BT` the document
    of each token; `chunk` the tokens to append to the caches, None without caches.
    """

    rope: tuple[jax.Array, jax.Array] | None
    segment_BT: jax.Array
    chunk: Chunk | None
    window: int | None = dataclasses.field(metadata={"static": True})


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) whose K/V may belong to an earlier layer.

    Cross-layer attention (arXiv 2405.12981): an owner returns a view of the keys and values that it
    attended to, and a borrower attends to that view. So a borrower reads the same keys as its
    owner, with and without a cache, and has neither projections of its own nor a cache.
    """

    config: AttentionConfig
    spec: LayerSpec
    norm_eps: float
    num_layers: int

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        context: KindContext,
        view: View | None,
        cache: Ring | Full | None,
        unit: jax.Array,
    ) -> tuple[jax.Array, View, Ring | Full | None]:
        """Returns (output_BTD, view of the keys attended to, updated cache of an owner).

        Args:
          x_BTD: normed input.
          context: of the layer's kind.
          view: of the owner; read by borrowers only.
          cache: of an owner, for all units; None without caches.
          unit: int32, this layer's unit of the cache.
        """
        projected = self._project_in(x_BTD)
        query_BTNH = self._normed_and_rotated("query_norm", projected["query"], context)
        if self.spec.owns_kv:
            key_BTKH = self._normed_and_rotated("key_norm", projected["key"], context)
            view, cache = self._own_view(KV(key_BTKH, projected["value"]), context, cache, unit)
        if view is None:
            raise ValueError("a layer that borrows keys and values needs the view of their owner")
        out_BTNH = self._attend(query_BTNH, view)
        if self.config.output_gate:
            gate_BTN = nn.sigmoid(projected["gate"]).astype(x_BTD.dtype)
            out_BTNH = out_BTNH * gate_BTN[..., None]
        return self._project_out(out_BTNH, x_BTD.shape[-1]), view, cache

    def _project_in(self, x_BTD: jax.Array) -> dict[str, jax.Array]:
        """Returns queries, an owner's keys and values, and float32 logits of the heads' gates.

        All in one island, so that a device adds up what they send back to x before the one sum over
        devices.
        """
        weights = self._weights(x_BTD.shape[-1], x_BTD.dtype)

        def local(x_BTD: jax.Array, weights: dict[str, Any]) -> dict[str, jax.Array]:
            inputs = dict.fromkeys(weights, x_BTD)
            if "gate" in weights:
                inputs["gate"] = x_BTD.astype(jnp.float32)
            return {name: project(_INTO[name][0], inputs[name], *weights[name]) for name in weights}

        split = {name: _INTO[name][1] for name in weights}
        inputs = {name: ((None, axis), (axis,)) for name, axis in split.items()}
        outputs = {name: (*TOKENS, axis) for name, axis in split.items()}
        return sharding.island(local, inputs=(TOKENS, inputs), outputs=outputs)(x_BTD, weights)

    def _weights(self, dim: int, dtype: jnp.dtype) -> dict[str, tuple[jax.Array, jax.Array | None]]:
        """Weight and bias of each projection of the input."""
        config, init = self.config, fan_in(dim)
        heads = config.num_heads, config.head_dim
        kv_heads = config.num_kv_heads, config.head_dim
        axes, kv_axes = ("heads", "head"), ("kv_heads", "head")
        weight = param(self, "query_DNH", init, (dim, *heads), ("embed", *axes), dtype)
        weights = {"query": (weight, self._bias("query_bias_NH", heads, axes))}
        if self.spec.owns_kv:
            given = init, (dim, *kv_heads), ("embed", *kv_axes), dtype
            key_DKH, value_DKH = param(self, "key_DKH", *given), param(self, "value_DKH", *given)
            weights["key"] = key_DKH, self._bias("key_bias_KH", kv_heads, kv_axes)
            weights["value"] = value_DKH, self._bias("value_bias_KH", kv_heads, kv_axes)
        if config.output_gate:
            # Head-wise, 1/2 at the start (as in Step 3.5 Flash).
            shape, names = (dim, config.num_heads), ("embed", "heads")
            weights["gate"] = param(self, "gate_DN", ZEROS, shape, names), None
        return summed_in_float32(weights)

    def _project_out(self, out_BTNH: jax.Array, dim: int) -> jax.Array:
        heads, axes = out_BTNH.shape[2:], ("heads", "head", "embed")
        init = fan_in(heads[0] * heads[1], output_scale(self.num_layers))
        out_NHD = param(self, "out_NHD", init, (*heads, dim), axes, out_BTNH.dtype)
        bias_D = None
        if self.config.out_bias:
            bias_D = param(self, "out_bias_D", ZEROS, (dim,), ("embed",))
        head_axes = sharding.axes("heads")

        def local(out_BTNH, out_NHD, bias_D):
            if head_axes and bias_D is not None:
                bias_D = jnp.where(jax.lax.axis_index(head_axes) == 0, bias_D, 0)
            return total(project("BTNH,NHD->BTD", out_BTNH, out_NHD, bias_D), head_axes)

        names = _QUERIES, ("heads",), (None,)
        run = sharding.island(local, inputs=names, outputs=TOKENS)
        return run(out_BTNH, summed_in_float32(out_NHD), bias_D)

    def _own_view(
        self, fresh: KV, context: KindContext, cache: Ring | Full | None, unit: jax.Array
    ) -> tuple[View, Ring | Full | None]:
        if cache is None:
            return _fresh_view(fresh, context), None

        def update(cache, fresh, chunk, unit):
            return cache.update(fresh, unit, chunk, context.window)

        run = sharding.island(
            update,
            inputs=(_CACHE, _KEYS, ("batch",), ()),
            outputs=lambda result: (_CACHE, _names(result[1])),
        )
        cache, view = run(cache, fresh, context.chunk, unit)
        return view, cache

    def _bias(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> jax.Array | None:
        return param(self, name, ZEROS, shape, axes) if self.config.qkv_bias else None

    def _normed_and_rotated(self, name: str, x_BTNH: jax.Array, context: KindContext) -> jax.Array:
        if self.config.qk_norm == "head":
            x_BTNH = RMSNorm(self.norm_eps, axis="head", name=name)(x_BTNH)
        elif self.config.qk_norm == "projection":
            flat_BTX = x_BTNH.reshape(*x_BTNH.shape[:2], -1)
            flat_BTX = RMSNorm(self.norm_eps, axis="heads", name=name)(flat_BTX)
            x_BTNH = flat_BTX.reshape(x_BTNH.shape)
        return x_BTNH if context.rope is None else apply_rope(x_BTNH, *context.rope)

    def _attend(self, query_BTNH: jax.Array, view: View) -> jax.Array:
        sinks_N = None
        if self.config.sinks:
            shape = (self.config.num_heads,)
            sinks_N = param(self, "sinks_N", ZEROS, shape, ("heads",))
        if self.is_mutable_collection(KEPT) and isinstance(view, Fresh):
            self._keep_probabilities(query_BTNH, view, sinks_N)

        def run(query_BTNH, view, sinks_N):
            implementation = self.config.implementation or None
            return attend(query_BTNH, view, sinks_N=sinks_N, implementation=implementation)

        names = _QUERIES, _names(view), ("heads",)
        return sharding.island(run, inputs=names, outputs=_QUERIES)(query_BTNH, view, sinks_N)

    def _keep_probabilities(
        self, query_BTNH: jax.Array, view: Fresh, sinks_N: jax.Array | None
    ) -> None:
        """Hands out `probs_BNTS`; the positions of a row must not be split over devices."""

        def local(query_BTNH, view, sinks_N):
            return attention_probabilities(query_BTNH, view.kv.key_BSKH, view.mask, sinks_N=sinks_N)

        inputs = _QUERIES, _names(view), ("heads",)
        run = sharding.island(local, inputs=inputs, outputs=("batch", "heads"))
        keep(self, "probs_BNTS", run(query_BTNH, view, sinks_N))


def _fresh_view(kv: KV, context: KindContext) -> Fresh:
    """The view of a forward pass without caches.

    Where the positions of a row are split, each device's queries see its part of the keys and what
    earlier devices sent, which overlaps: the view's global arrays then hold S > T keys per shard,
    and only `_attend` can read them. The owner exchanges them for its borrowers, so that gradients
    are summed over layers before they travel back.
    """
    window, segment_BT = context.window, context.segment_BT
    segment_BS, offset = segment_BT, 0
    if axes := sharding.axes("sequence"):
        exchange = functools.partial(with_earlier_keys, window=window, axis=axes)
        names = _KEYS, TOKENS
        kv, segment_BS = sharding.island(exchange, inputs=names, outputs=names)(kv, segment_BT)
        earlier = segment_BS.shape[1] - segment_BT.shape[1]
        offset = earlier // sharding.ambient_shards("sequence")
    mask = Mask(
        query_segments_BT=segment_BT,
        key_segments_BS=segment_BS,
        window=window,
        query_offset=offset,
    )
    return Fresh(kv, mask)


def _names(view: View) -> View:
    """Logical names of the arrays of a view, as `sharding.island` takes them."""
    if isinstance(view, Fresh):
        return Fresh(_KEYS, jax.tree.map(lambda _: TOKENS, view.mask))
    unit: Any = ()
    chunk: Any = ("batch",)
    return Stored(_CACHE, unit, chunk, view.window)
