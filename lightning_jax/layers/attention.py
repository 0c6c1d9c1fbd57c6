"""Self-attention of one layer: own or borrowed keys and values, with or without a cache."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import AttentionConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.layers.common import ZEROS, RMSNorm, fan_in, output_scale, param, project
from lightning_jax.ops.cached_attention import attend
from lightning_jax.ops.kv_cache import KV, Chunk, Fresh, Full, Ring, Stored
from lightning_jax.ops.mask import Mask
from lightning_jax.ops.rope import apply_rope
from lightning_jax.ops.sequence_parallel import with_earlier_keys

View = Fresh | Stored

# Logical names of the leading axes of queries, fresh keys and values, and caches [U, B, S, K, H].
_TOKENS = ("batch", "sequence")
_QUERIES, _KEYS = (*_TOKENS, "heads"), (*_TOKENS, "kv_heads")
_CACHE = ("layers", "batch", None, "kv_heads")


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
        config, dim, dtype = self.config, x_BTD.shape[-1], x_BTD.dtype
        heads = (config.num_heads, config.head_dim)
        query_DNH = param(
            self, "query_DNH", fan_in(dim), (dim, *heads), ("embed", "heads", "head"), dtype
        )
        bias_NH = self._bias("query_bias_NH", heads, ("heads", "head"))
        query_BTNH = project("BTD,DNH->BTNH", x_BTD, query_DNH, bias_NH)
        query_BTNH = self._normed_and_rotated("query_norm", query_BTNH, context)
        if self.spec.owns_kv:
            view, cache = self._own_view(
                self._keys_and_values(x_BTD, context), context, cache, unit
            )
        out_BTNH = self._attend(query_BTNH, view)
        if config.output_gate:
            out_BTNH = out_BTNH * self._head_gate(x_BTD)[..., None]
        out_NHD = param(
            self,
            "out_NHD",
            fan_in(heads[0] * heads[1], output_scale(self.num_layers)),
            (*heads, dim),
            ("heads", "head", "embed"),
            dtype,
        )
        bias_D = param(self, "out_bias_D", ZEROS, (dim,), ("embed",)) if config.out_bias else None
        return project("BTNH,NHD->BTD", out_BTNH, out_NHD, bias_D), view, cache

    def _keys_and_values(self, x_BTD: jax.Array, context: KindContext) -> KV:
        config, dim = self.config, x_BTD.shape[-1]
        shape, axes = (dim, config.num_kv_heads, config.head_dim), ("embed", "kv_heads", "head")
        init = fan_in(dim)
        key_DKH = param(self, "key_DKH", init, shape, axes, x_BTD.dtype)
        value_DKH = param(self, "value_DKH", init, shape, axes, x_BTD.dtype)
        key_bias_KH = self._bias("key_bias_KH", shape[1:], axes[1:])
        value_bias_KH = self._bias("value_bias_KH", shape[1:], axes[1:])
        key_BTKH = project("BTD,DKH->BTKH", x_BTD, key_DKH, key_bias_KH)
        key_BTKH = self._normed_and_rotated("key_norm", key_BTKH, context)
        return KV(key_BTKH, project("BTD,DKH->BTKH", x_BTD, value_DKH, value_bias_KH))

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

        def run(query_BTNH, view, sinks_N):
            implementation = self.config.implementation or None
            return attend(query_BTNH, view, sinks_N=sinks_N, implementation=implementation)

        names = _QUERIES, _names(view), ("heads",)
        return sharding.island(run, inputs=names, outputs=_QUERIES)(query_BTNH, view, sinks_N)

    def _head_gate(self, x_BTD: jax.Array) -> jax.Array:
        """Head-wise output gate, 1/2 at the start (as in Step 3.5 Flash)."""
        shape = (x_BTD.shape[-1], self.config.num_heads)
        gate_DN = param(self, "gate_DN", ZEROS, shape, ("embed", "heads"))
        logits_BTN = project("BTD,DN->BTN", x_BTD.astype(jnp.float32), gate_DN)
        return nn.sigmoid(logits_BTN).astype(x_BTD.dtype)


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
        names = _KEYS, _TOKENS
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
        return Fresh(_KEYS, jax.tree.map(lambda _: _TOKENS, view.mask))
    return Stored(_CACHE, (), ("batch",), view.window)
