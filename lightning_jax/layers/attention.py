"""Self-attention of one layer: own or borrowed keys and values, with or without a cache."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import AttentionConfig
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.layers.common import ZEROS, RMSNorm, fan_in, output_scale, param, project
from lightning_jax.ops import kv_cache
from lightning_jax.ops.attention import dot_product_attention
from lightning_jax.ops.kv_cache import KV
from lightning_jax.ops.mask import Mask
from lightning_jax.ops.rope import apply_rope


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KindContext:
    """What all layers of one kind (local or global) share in one forward pass.

    `rope` is the (sin, cos) table of the query positions, None for NoPE. `slot_BT` says where the
    new tokens go in the cache, None without one. `write_first`: attend to the written cache;
    otherwise to the old slots followed by the new tokens, which a chunk longer than one token
    needs in a ring (it would overwrite keys that its own first queries still see).
    """

    mask: Mask
    rope: tuple[jax.Array, jax.Array] | None
    slot_BT: jax.Array | None
    write_first: bool = dataclasses.field(metadata={"static": True})


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) whose K/V may belong to an earlier layer.

    Cross-layer attention (arXiv 2405.12981): an owner returns the keys and values that it attended
    to, a borrower takes them as they are. They are values of the forward pass, so they are the same
    with and without a cache, and a borrower has neither projections nor cache.
    """

    config: AttentionConfig
    spec: LayerSpec
    norm_eps: float
    num_layers: int

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: KindContext, shared: KV | None, cache: KV | None
    ) -> tuple[jax.Array, KV, KV | None]:
        """Returns (output_BTD, keys and values attended to, updated cache of an owner)."""
        config, dim, dtype = self.config, x_BTD.shape[-1], x_BTD.dtype
        heads = (config.num_heads, config.head_dim)
        query_DNH = param(
            self, "query_DNH", fan_in(dim), (dim, *heads), ("embed", "heads", "head"), dtype
        )
        bias_NH = self._bias("query_bias_NH", heads, ("heads", "head"))
        query_BTNH = project("BTD,DNH->BTNH", x_BTD, query_DNH, bias_NH)
        query_BTNH = self._normed_and_rotated("query_norm", query_BTNH, context)
        if self.spec.owns_kv:
            shared, cache = self._own_kv(x_BTD, context, cache)
        out_BTNH = self._attend(query_BTNH, shared, context.mask)
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
        return project("BTNH,NHD->BTD", out_BTNH, out_NHD, bias_D), shared, cache

    def _own_kv(
        self, x_BTD: jax.Array, context: KindContext, cache: KV | None
    ) -> tuple[KV, KV | None]:
        config, dim = self.config, x_BTD.shape[-1]
        shape, axes = (dim, config.num_kv_heads, config.head_dim), ("embed", "kv_heads", "head")
        init = fan_in(dim)
        key_DKH = param(self, "key_DKH", init, shape, axes, x_BTD.dtype)
        value_DKH = param(self, "value_DKH", init, shape, axes, x_BTD.dtype)
        key_bias_KH = self._bias("key_bias_KH", shape[1:], axes[1:])
        value_bias_KH = self._bias("value_bias_KH", shape[1:], axes[1:])
        key_BTKH = project("BTD,DKH->BTKH", x_BTD, key_DKH, key_bias_KH)
        key_BTKH = self._normed_and_rotated("key_norm", key_BTKH, context)
        fresh = KV(key_BTKH, project("BTD,DKH->BTKH", x_BTD, value_DKH, value_bias_KH))
        if cache is None:
            return fresh, None
        written = kv_cache.write(cache, fresh, context.slot_BT)
        return (written if context.write_first else kv_cache.append(cache, fresh)), written

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

    def _attend(self, query_BTNH: jax.Array, kv: KV, mask: Mask) -> jax.Array:
        sinks_N = None
        if self.config.sinks:
            shape = (self.config.num_heads,)
            sinks_N = param(self, "sinks_N", ZEROS, shape, ("heads",))

        def attend(query_BTNH, kv, mask, sinks_N):
            return dot_product_attention(
                query_BTNH,
                kv.key_BSKH,
                kv.value_BSKH,
                mask,
                sinks_N=sinks_N,
                implementation=self.config.implementation or None,
            )

        rows = ("batch",)
        run = sharding.island(attend, inputs=(rows, rows, rows, ("heads",)), outputs=rows)
        return run(query_BTNH, kv, mask, sinks_N)

    def _head_gate(self, x_BTD: jax.Array) -> jax.Array:
        """Head-wise output gate, 1/2 at the start (as in Step 3.5 Flash)."""
        shape = (x_BTD.shape[-1], self.config.num_heads)
        gate_DN = param(self, "gate_DN", ZEROS, shape, ("embed", "heads"))
        logits_BTN = jnp.einsum("BTD,DN->BTN", x_BTD.astype(jnp.float32), gate_DN)
        return nn.sigmoid(logits_BTN).astype(x_BTD.dtype)
