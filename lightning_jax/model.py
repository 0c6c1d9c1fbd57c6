"""LightningLM: embedding, prefix layers, a scan over units, final norm, head.

Parameters are a nested dict that shows the pattern; the units' are stacked on a leading axis:

    embed/table_VD   prefix/0_G/attention/query_DNH   units/0_L/moe/gate_EDF ([U, E, D, F])
    final_norm/scale   head/kernel_DV (untied)

Nothing is mutable: caches and the router's state go in as arguments, caches and routing statistics
come out as results.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lightning_jax import sharding
from lightning_jax.config import AttentionConfig, ModelConfig
from lightning_jax.config.pattern import GLOBAL, LOCAL, LayerSpec
from lightning_jax.layers.attention import KindContext
from lightning_jax.layers.block import Context, Unit
from lightning_jax.layers.common import Declared, RMSNorm, fan_in, param, standard_normal
from lightning_jax.ops import kv_cache, rope
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.ops.kv_cache import KV, Slots
from lightning_jax.ops.mask import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Router:
    """Router state that no gradient touches: selection bias of R routed layers a unit, and p."""

    bias_URE: jax.Array
    top_p: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Slots by kind ("L", "G") and K/V of the owners: prefix layers, and units stacked on U."""

    slots: dict[str, Slots]
    prefix: dict[str, KV]
    units: dict[str, KV]


class Output(NamedTuple):
    """`hidden_BTD` after the final norm; `head_DV`; statistics `[U, R, ...]`; the updated cache."""

    hidden_BTD: jax.Array
    head_DV: jax.Array
    stats: RoutingStats | None
    cache: Cache | None

    def logits(self) -> jax.Array:
        """Logits [B, T, V] in float32."""
        return jnp.einsum(
            "BTD,DV->BTV", self.hidden_BTD, self.head_DV, preferred_element_type=jnp.float32
        )


class LightningLM(nn.Module):
    """A decoder-only language model of any layer pattern (see `config.ModelConfig`)."""

    config: ModelConfig
    train: bool = False

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        *,
        router: Router | None = None,
        rope_base_global: float | jax.Array | None = None,
        cache: Cache | None = None,
        start_B: jax.Array | None = None,
    ) -> Output:
        """Computes hidden states of every position.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: position within the document, for RoPE; default: `start_B + 0..T-1`.
          segment_ids_BT: document of each token, 0 for padding; default: one document a row.
          router: selection bias and top-p; default: no bias, `config.moe.top_p`.
          rope_base_global: RoPE base of global layers; default: the config's.
          cache: from `init_cache`; the chunk is appended to it.
          start_B: with a cache, how many tokens of each row came before; default: 0.

        Returns:
          An `Output`.
        """
        config = self.config
        batch, time = tokens_BT.shape
        start_B = jnp.zeros(batch, jnp.int32) if start_B is None else start_B
        index_BT = start_B[:, None] + jnp.arange(time, dtype=jnp.int32)[None, :]
        positions_BT = index_BT if positions_BT is None else positions_BT
        segment_ids_BT = jnp.ones_like(tokens_BT) if segment_ids_BT is None else segment_ids_BT
        router = init_router(config) if router is None else router
        base = config.attention.rope_base_global if rope_base_global is None else rope_base_global
        kinds, slots = self._kinds(index_BT, positions_BT, segment_ids_BT, base, cache)
        context = Context(kinds, segment_ids_BT != 0, router.top_p)

        table_VD = self._embedding("embed", "table_VD", (config.vocab_size, config.model_dim))
        dtype = jnp.dtype(config.compute_dtype)
        x_BTD = sharding.shard(table_VD.astype(dtype)[tokens_BT], "batch", "sequence", None)
        prefix_cache, unit_cache = (cache.prefix, cache.units) if cache else ({}, {})
        prefix = Unit(config, config.prefix_layers, self.train, name="prefix")
        no_bias = jnp.zeros((0, config.moe.num_experts))
        x_BTD, (prefix_cache, _) = prefix(x_BTD, no_bias, prefix_cache, context)
        units = _scan_over_units(config)(config, config.unit_layers, self.train, name="units")
        x_BTD, (unit_cache, stats) = units(x_BTD, router.bias_URE, unit_cache, context)
        hidden_BTD = RMSNorm(config.norm_eps, name="final_norm")(x_BTD)
        if config.tie_embeddings:
            head_DV = table_VD.T
        else:
            shape = (config.model_dim, config.vocab_size)
            head_DV = self._embedding("head", "kernel_DV", shape)
        cache = Cache(slots, prefix_cache, unit_cache) if cache else None
        return Output(hidden_BTD, head_DV.astype(dtype), stats, cache)

    def _embedding(self, module: str, name: str, shape: tuple[int, int]) -> jax.Array:
        axes = ("vocab", "embed") if name == "table_VD" else ("embed", "vocab")
        return _Table(name, shape, axes, self.config.model_dim, name=module)()

    def _kinds(
        self,
        index_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        rope_base_global: float | jax.Array,
        cache: Cache | None,
    ) -> tuple[dict[str, KindContext], dict[str, Slots]]:
        """Masks, rotary tables and cache slots, made once for all layers of a kind."""
        attention = self.config.attention
        settings = {
            LOCAL: (attention.window, attention.rope_base_local, True),
            GLOBAL: (None, rope_base_global, attention.global_rope),
        }
        kinds, slots = {}, {}
        for kind in sorted({spec.letter.upper() for spec in self.config.layers}):
            window, base, rotate = settings[kind]
            table = _rope_table(attention, positions_BT, base) if rotate else None
            if cache is None:
                mask = Mask(
                    query_segments_BT=segment_ids_BT,
                    key_segments_BS=segment_ids_BT,
                    window=window,
                )
                kinds[kind] = KindContext(mask, table, None, False)
                continue
            old, new = cache.slots[kind], Slots(index_BT, segment_ids_BT)
            slot_BT = kv_cache.slot_index(index_BT, segment_ids_BT, old.position_BS.shape[1])
            slots[kind] = kv_cache.write(old, new, slot_BT)
            write_first = kind == GLOBAL or index_BT.shape[1] == 1
            seen = slots[kind] if write_first else kv_cache.append(old, new)
            mask = Mask(
                query_positions_BT=index_BT,
                key_positions_BS=seen.position_BS,
                query_segments_BT=segment_ids_BT,
                key_segments_BS=seen.segment_BS,
                window=window,
            )
            kinds[kind] = KindContext(mask, table, slot_BT, write_first)
        return kinds, slots


def _rope_table(
    attention: AttentionConfig, positions_BT: jax.Array, base: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sines and cosines of the positions, with wavelengths as `attention.rope_scaling` says."""
    scaling = attention.rope_scaling
    frequency_R = rope.frequencies(attention.head_dim, base)
    if scaling.kind == "linear":
        frequency_R = frequency_R / scaling.factor
    elif scaling.kind == "llama3":
        frequency_R = rope.stretch_llama3(
            frequency_R,
            factor=scaling.factor,
            original_length=scaling.original_length,
            low_freq_factor=scaling.low_freq_factor,
            high_freq_factor=scaling.high_freq_factor,
        )
    elif scaling.kind == "yarn":
        frequency_R = rope.stretch_yarn(
            frequency_R,
            base,
            factor=scaling.factor,
            original_length=scaling.original_length,
            beta_fast=scaling.beta_fast,
            beta_slow=scaling.beta_slow,
            truncate=scaling.truncate,
        )
    sin_BTR, cos_BTR = rope.rope_table(positions_BT, frequency_R)
    if scaling.kind == "yarn":
        return sin_BTR * scaling.attention_factor, cos_BTR * scaling.attention_factor
    return sin_BTR, cos_BTR


class _Table(nn.Module):
    """A table of embeddings, by rows (`table_VD`) or by columns (`kernel_DV`)."""

    parameter: str
    shape: tuple[int, int]
    axes: tuple[str, str]
    dim: int

    @nn.compact
    def __call__(self) -> jax.Array:
        return param(self, self.parameter, fan_in(self.dim), self.shape, self.axes)


def _scan_over_units(config: ModelConfig) -> Any:
    """The unit, rematerialised by policy, scanned over its repeats (or unrolled)."""
    body: Any = Unit
    if config.remat != "none":
        policy = None if config.remat == "full" else getattr(jax.checkpoint_policies, config.remat)
        body = nn.remat(Unit, policy=policy, prevent_cse=not config.scan)
    return nn.scan(
        body,
        # Intermediates are for `apply(..., capture_intermediates=...)`, a reader's tool.
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=config.num_units,
        unroll=1 if config.scan else config.num_units,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


@functools.lru_cache(maxsize=8)
def _boxed(config: ModelConfig) -> Any:
    """Abstract parameters with their logical names and distributions still attached."""
    tokens_BT = jax.ShapeDtypeStruct((sharding.ambient_batch_shards(), 2), jnp.int32)
    model = LightningLM(config)
    # The key is made inside: an eager operation would run on a mesh of devices that are not here.
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t), tokens_BT)["params"]


def abstract_params(config: ModelConfig) -> Any:
    """Returns shapes and dtypes of the parameters, without computing anything."""
    return nn.meta.unbox(_boxed(config))


def logical_axes(config: ModelConfig) -> Any:
    """Returns the tree of tuples of logical axis names, one name an axis of each parameter."""
    specs = nn.get_partition_spec(_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.P))


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Returns freshly initialised float32 parameters (jit it with the shardings wanted).

    Parameters of one shape are drawn together: a generator a parameter would take XLA longer to
    compile than the train step.
    """
    leaves, tree = jax.tree.flatten(_boxed(config), is_leaf=lambda a: isinstance(a, Declared))
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, leaf in enumerate(leaves):
        if leaf.init.std:
            groups.setdefault(leaf.value.shape, []).append(index)
    values = [jnp.full(leaf.value.shape, leaf.init.mean, jnp.float32) for leaf in leaves]
    for number, (shape, members) in enumerate(groups.items()):
        drawn = standard_normal(jax.random.fold_in(key, number), (len(members), *shape))
        # Without the barrier XLA fuses (recompiles and recomputes) the generator into every slice.
        drawn = jax.lax.optimization_barrier(drawn)
        for row, index in enumerate(members):
            values[index] += leaves[index].init.std * drawn[row]
    return jax.tree.unflatten(tree, values)


def init_router(config: ModelConfig) -> Router:
    """Returns the router's state at the start: no bias, the config's top-p."""
    routed = sum(spec.routed for spec in config.unit_layers)
    shape = (config.num_units, routed, config.moe.num_experts)
    return Router(jnp.zeros(shape, jnp.float32), jnp.float32(config.moe.top_p))


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Returns an empty cache for `length` tokens a row.

    A local owner has a ring of `min(window, length)` slots, a global owner `length`; borrowers have
    nothing.
    """
    attention = config.attention
    sizes = {LOCAL: min(attention.window, length), GLOBAL: length}
    dtype = jnp.dtype(config.compute_dtype)

    def owners(layers: tuple[LayerSpec, ...]) -> dict[str, KV]:
        return {
            spec.key: kv_cache.init_kv(
                batch,
                sizes[spec.letter.upper()],
                attention.num_kv_heads,
                attention.head_dim,
                dtype,
            )
            for spec in layers
            if spec.owns_kv
        }

    units = jax.tree.map(
        lambda a: jnp.zeros((config.num_units, *a.shape), a.dtype), owners(config.unit_layers)
    )
    kinds = {spec.letter.upper() for spec in config.layers}
    slots = {kind: kv_cache.init_slots(batch, sizes[kind]) for kind in sorted(kinds)}
    return Cache(slots, owners(config.prefix_layers), units)
