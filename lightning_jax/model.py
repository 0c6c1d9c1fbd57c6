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
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lightning_jax import sharding
from lightning_jax.config import AttentionConfig, ModelConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.pattern import GLOBAL, LOCAL, LayerSpec
from lightning_jax.layers import initial, units, vocabulary
from lightning_jax.layers.attention import KindContext
from lightning_jax.layers.block import Context, Unit
from lightning_jax.layers.common import KEPT, Declared, RMSNorm, fan_in, keep, param
from lightning_jax.ops import rope
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.ops.kv_cache import Chunk, Full, Ring
from lightning_jax.ops.projection import operand, precision


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Router:
    """Router state without gradients: selection bias of the R routed layers per unit, and p."""

    bias_URE: jax.Array
    top_p: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Caches of the owners by their keys: prefix layers (U = 1), and those of all units.

    `segments` maps each kind ("L", "G") to int32 segment_BS, the document of the token in each
    slot; 0 is an empty slot.
    """

    segments: dict[str, jax.Array]
    prefix: dict[str, Ring | Full]
    units: dict[str, Ring | Full]


class Output(NamedTuple):
    """`hidden_BTD` after the final norm; `head_DV`; statistics `[U, R, ...]`; the updated cache."""

    hidden_BTD: jax.Array
    head_DV: jax.Array
    stats: RoutingStats | None
    cache: Cache | None

    def logits(self) -> jax.Array:
        """Logits [B, T, V] in float32, split as the head is."""
        logits_BTV = jnp.einsum(
            "BTD,DV->BTV",
            self.hidden_BTD,
            self.head_DV,
            precision=precision(self.hidden_BTD.dtype),
            preferred_element_type=jnp.float32,
        )
        # A partitioner may gather the head instead, for the few tokens of a decode step too.
        return sharding.shard(logits_BTV, "batch", "sequence", "vocab")


class LightningLM(nn.Module):
    """A decoder-only language model of any layer pattern (see `config.ModelConfig`)."""

    config: ModelConfig
    train: bool = False

    if TYPE_CHECKING:
        # Flax's own annotation has the pair for `mutable=` too, which `infer.inspector` asks for.
        def apply(self, *args: Any, **kwargs: Any) -> Output: ...

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
        keep_choices: bool = False,
    ) -> Output:
        """Computes hidden states of every position.

        Args:
          tokens_BT: int32 token ids.
          positions_BT: position within the document, for RoPE; default: `start_B + 0..T-1`.
          segment_ids_BT: document of each token, 0 for padding; default: one document per row.
          router: selection bias and top-p; default: no bias, `config.moe.top_p`.
          rope_base_global: RoPE base of global layers; default: the config's.
          cache: from `init_cache`; the chunk is appended to it.
          start_B: with a cache, how many tokens of each row came before; default: 0.
          keep_choices: the statistics have the experts of each token too, as `stats.choices`
            [U, R, B, T, C].

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
        kinds = kind_contexts(config, start_B, positions_BT, segment_ids_BT, base, cache)
        context = Context(kinds, segment_ids_BT != 0, router.top_p, keep_choices)

        dtype = jnp.dtype(config.compute_dtype)
        table_VD = self._table("embed", "table_VD", (config.vocab_size, config.model_dim), dtype)
        x_BTD = vocabulary.lookup(table_VD, tokens_BT)
        prefix = Unit(config, config.prefix_layers, self.train, name="prefix")
        no_bias = jnp.zeros((0, config.moe.num_experts))
        caches = cache.prefix if cache else {}
        x_BTD, (prefix_caches, _) = prefix(x_BTD, no_bias, caches, context, jnp.int32(0))
        x_BTD, unit_caches, stats = self._units(x_BTD, router.bias_URE, context, cache)
        hidden_BTD = RMSNorm(config.norm_eps, name="final_norm")(x_BTD)
        if config.tie_embeddings:
            head_DV = table_VD.T
        else:
            shape = (config.model_dim, config.vocab_size)
            head_DV = self._table("head", "kernel_DV", shape, dtype)
        if cache is not None:
            chunks: dict[str, Any] = {kind: context.kinds[kind].chunk for kind in cache.segments}
            segments = {kind: chunk.after_BS for kind, chunk in chunks.items()}
            cache = Cache(segments, prefix_caches, unit_caches)
        return Output(hidden_BTD, head_DV, stats, cache)

    def _table(self, module: str, name: str, shape: tuple[int, int], dtype: Any) -> jax.Array:
        axes = ("vocab", "embed") if name == "table_VD" else ("embed", "vocab")
        return _Table(name, shape, axes, self.config.model_dim, dtype, name=module)()

    def _units(
        self, x_BTD: jax.Array, bias_URE: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, dict[str, Ring | Full], RoutingStats | None]:
        config = self.config
        if self.is_initializing():
            self.param("units", lambda key: units.declare(config, key, x_BTD, context))
        params_U = self.get_variable("params", "units")
        asked = self.is_mutable_collection(KEPT)
        if cache is None and not asked:
            x_BTD, stats = units.forward(
                config, params_U, bias_URE, x_BTD, context, train=self.train
            )
            return x_BTD, {}, stats
        axes_U, caches = logical_axes(config)["units"], cache.units if cache else {}
        x_BTD, caches, stats, kept = units.forward_with_caches(
            config, params_U, axes_U, bias_URE, x_BTD, context, caches, [KEPT] * asked
        )
        keep(self, "units", kept.get(KEPT))
        return x_BTD, caches, stats


def kept_by_layer(config: ModelConfig, kept: Any) -> list[Any]:
    """Returns what each layer handed out, first layer first.

    Each entry has `["attention"]["probs_BNTS"]` and, of a layer with experts,
    `["moe"]["probs_BTE"]`; see `ops.attention.attention_probabilities` and `ops.routing.Scores`.

    Args:
      kept: collection `KEPT` of a forward pass, without a cache and not for training, that was
        called with `mutable=[KEPT]`.
    """
    prefix = [kept["prefix"][spec.key] for spec in config.prefix_layers]
    units = (
        jax.tree.map(operator.itemgetter(unit), kept["units"]) for unit in range(config.num_units)
    )
    return prefix + [unit[spec.key] for unit in units for spec in config.unit_layers]


def kind_contexts(
    config: ModelConfig,
    start_B: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    rope_base_global: float | jax.Array,
    cache: Cache | None,
) -> dict[str, KindContext]:
    """Returns the shared context of each kind of layer; see `LightningLM` for the arguments."""
    attention = config.attention
    settings = {
        LOCAL: (attention.window, attention.rope_base_local, True),
        GLOBAL: (None, rope_base_global, attention.global_rope),
    }
    kinds = {}
    for kind in sorted({spec.letter.upper() for spec in config.layers}):
        window, base, rotate = settings[kind]
        table = _rope_table(attention, positions_BT, base) if rotate else None
        chunk = None
        if cache is not None:
            chunk = Chunk.append(start_B, segment_ids_BT, cache.segments[kind])
        kinds[kind] = KindContext(table, segment_ids_BT, chunk, window)
    return kinds


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
    dtype: Any

    @nn.compact
    def __call__(self) -> jax.Array:
        return param(self, self.parameter, fan_in(self.dim), self.shape, self.axes, self.dtype)


@functools.lru_cache(maxsize=8)
def _boxed(config: ModelConfig) -> Any:
    """Abstract parameters with their logical names and distributions still attached."""
    shape = sharding.ambient_shards("batch"), 2 * sharding.ambient_shards("sequence")
    tokens_BT = jax.ShapeDtypeStruct(shape, jnp.int32)
    model = LightningLM(config)
    # The key is made inside: an eager operation would run on a mesh of devices that are not here.
    return jax.eval_shape(lambda t: model.init(jax.random.key(0), t), tokens_BT)["params"]


def abstract_params(config: ModelConfig) -> Any:
    """Returns shapes and dtypes of the parameters, without computing anything."""
    return nn.meta.unbox(_boxed(config))


def logical_axes(config: ModelConfig) -> Any:
    """Returns the tree of tuples of logical axis names, one name per axis of each parameter."""
    specs = nn.get_partition_spec(_boxed(config))
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.P))


def init_params(config: ModelConfig, key: jax.Array) -> Any:
    """Returns freshly initialised float32 parameters (jit it with the shardings wanted).

    Models that differ in one place begin equal everywhere else, see `layers.initial`.
    """
    return initial.draw(config, _boxed(config), key)


def inference_params(config: ModelConfig, params: Any) -> Any:
    """Returns parameters in the dtypes in which they are used, so that no forward pass casts them.

    On a CPU without bfloat16 products, bfloat16 parameters are rounded and then held in float32,
    which such a CPU multiplies fastest.
    """
    boxed = _boxed(config)
    return jax.tree.map(
        lambda box, value: operand(value, jnp.dtype(box.in_use)),
        boxed,
        params,
        is_leaf=lambda leaf: isinstance(leaf, Declared),
    )


def require_finite(params: Any, where: object) -> None:
    """Raises a UserError that names the first array of a tree which holds NaN or an infinity.

    Args:
      params: tree of arrays of jax or numpy.
      where: the file, folder or use of them, named in the error.
    """
    pairs = jax.tree_util.tree_leaves_with_path(params)
    leaves = [leaf for _, leaf in pairs]
    if all(_on_host(leaf) for leaf in leaves):
        finite: list[Any] = [
            np.isfinite(np.asarray(leaf)).all() for leaf in leaves
        ]  # compiles nothing
    else:
        finite = jax.device_get(_are_finite(leaves))
    if not all(finite):
        path, _ = pairs[finite.index(False)]
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        raise UserError(f"{where}: {name} has values that are not finite")


def _on_host(leaf: Any) -> bool:
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable and {d.platform for d in leaf.devices()} == {"cpu"}


@jax.jit
def _are_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def init_router(config: ModelConfig) -> Router:
    """Returns the router's state at the start: no bias, the config's top-p."""
    routed = sum(spec.routed for spec in config.unit_layers)
    shape = (config.num_units, routed, config.moe.num_experts)
    return Router(jnp.zeros(shape, jnp.float32), jnp.float32(config.moe.top_p))


def init_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Returns an empty cache for `length` tokens per row.

    A local owner has a ring of `min(window, length)` slots, a global owner `length`; borrowers have
    nothing. Jit it with `cache_shardings` under a mesh.

    Raises:
      UserError: the ambient mesh splits the positions of a row.
    """
    if (shards := sharding.ambient_shards("sequence")) > 1:
        raise UserError(
            f"mesh.sequence = {shards}: caches are not split over positions; "
            "use 1 for prefill and decode"
        )
    attention = config.attention
    kinds = {LOCAL: (Ring, min(attention.window, length)), GLOBAL: (Full, length)}
    dtype = jnp.dtype(config.compute_dtype)

    heads = attention.num_kv_heads, attention.head_dim

    def owners(layers: tuple[LayerSpec, ...], units: int) -> dict[str, Ring | Full]:
        found = {}
        for spec in layers:
            kind, size = kinds[spec.letter.upper()]
            if spec.owns_kv:
                found[spec.key] = kind.init(units, batch, size, *heads, dtype)
        return found

    used = sorted({spec.letter.upper() for spec in config.layers})
    segments = {kind: jnp.zeros((batch, kinds[kind][1]), jnp.int32) for kind in used}
    return Cache(
        segments, owners(config.prefix_layers, 1), owners(config.unit_layers, config.num_units)
    )


def abstract_cache(config: ModelConfig, batch: int, length: int) -> Cache:
    """Returns shapes and dtypes of `init_cache`, without computing anything."""
    return jax.eval_shape(lambda: init_cache(config, batch, length))


def cache_shardings(config: ModelConfig, batch: int, length: int, mesh: Mesh) -> Cache:
    """Returns the placement of `init_cache` on a mesh: rows are split as the batch is."""
    names = {2: ("batch",), 5: ("layers", "batch", None, "kv_heads", "head")}
    rules = sharding.Rules.of(mesh)
    return jax.tree.map(
        lambda a: NamedSharding(mesh, rules.spec(*names[a.ndim])),
        abstract_cache(config, batch, length),
    )
