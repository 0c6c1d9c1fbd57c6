"""Frozen, validated configuration of a model: attention, experts, layer pattern."""

from __future__ import annotations

import dataclasses

from lightning_jax.config.fields import require, require_choice
from lightning_jax.config.pattern import LayerSpec, parse_mlps, parse_pattern

COMPUTE_DTYPES = ("float32", "bfloat16")
ROUTINGS = ("top_k", "top_p", "dense")
ROUTER_SCORES = ("softmax", "sigmoid")
QK_NORMS = ("none", "head", "projection")
ROPE_SCALINGS = ("none", "linear", "llama3", "yarn")
# The names that a model can take of registries on higher floors, which a test compares with them.
# Every row of a batch has documents, which not all attention kernels honour.
ATTENTION_IMPLEMENTATIONS = ("reference", "xla_banded", "pallas_tpu", "pallas_gpu")
TRANSPORTS = ("all_to_all", "all_gather", "ragged_all_to_all")
EXPERTS_IMPLEMENTATIONS = ("onehot", "blocked", "ragged_dot", "pallas_tpu", "pallas_gpu")
# Beside none and full, the policies of `jax.checkpoint_policies` that take no arguments.
REMATS = (
    "none",
    "full",
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class RopeScalingConfig:
    """How RoPE's wavelengths are stretched beyond the length that a model was trained at.

    `kind` says which of the other fields are read; see `ops.rope` for the formulas.
    """

    kind: str
    factor: float
    original_length: int
    low_freq_factor: float
    high_freq_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float

    def __post_init__(self) -> None:
        at = "model.attention.rope_scaling."
        require_choice(at + "kind", self.kind, ROPE_SCALINGS)
        if self.kind == "none":
            return
        require(self.factor >= 1, at + "factor", self.factor, "at least 1")
        require(
            self.attention_factor > 0, at + "attention_factor", self.attention_factor, "above 0"
        )
        if self.kind != "linear":
            length = self.original_length
            require(length >= 1, at + "original_length", length, "at least 1 token")
        for name, low, high in (
            ("high_freq_factor", self.low_freq_factor, self.high_freq_factor),
            ("beta_fast", self.beta_slow, self.beta_fast),
        ):
            require(
                0 < low < high, at + name, high, f"above its lower bound, {low}, itself above 0"
            )


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention of every layer; `window` applies to local layers only."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    rope_base_local: float
    rope_base_global: float
    global_rope: bool
    rope_scaling: RopeScalingConfig
    qk_norm: str
    qkv_bias: bool
    out_bias: bool
    output_gate: bool
    sinks: bool
    implementation: str

    def __post_init__(self) -> None:
        at = "model.attention."
        require(self.num_heads >= 1, at + "num_heads", self.num_heads, "at least 1")
        require(
            self.num_kv_heads >= 1 and self.num_heads % self.num_kv_heads == 0,
            at + "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_heads = {self.num_heads}",
        )
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            at + "head_dim",
            self.head_dim,
            "a positive even number (RoPE rotates pairs)",
        )
        require(self.window >= 1, at + "window", self.window, "at least 1 (self is included)")
        for name in ("rope_base_local", "rope_base_global"):
            require(getattr(self, name) > 1, at + name, getattr(self, name), "above 1")
        require_choice(at + "qk_norm", self.qk_norm, QK_NORMS)
        if self.implementation:
            require_choice(at + "implementation", self.implementation, ATTENTION_IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Fine-grained experts of the layers in `unit`; `num_experts = 0` gives dense MLPs there."""

    num_experts: int
    expert_dim: int
    num_shared_experts: int
    train_routing: str
    eval_routing: str
    router_score: str
    top_k: int
    top_p: float
    max_experts: int
    renormalize_gates: bool
    routed_scale: float
    router_bias: bool
    expert_bias: bool
    clamp: float
    target_experts: float
    controller_kp: float
    controller_ki: float
    bias_update_rate: float
    num_groups: int
    num_partitions: int
    switch_weight: float
    group_weight: float
    partition_weight: float
    true_group_weight: float
    z_weight: float
    entropy_weight: float
    max_groups: int
    capacity_factor: float
    implementation: str
    transport: str
    exchange_rows: float

    def __post_init__(self) -> None:
        at = "model.moe."
        require(self.num_experts >= 0, at + "num_experts", self.num_experts, "0 (dense) or more")
        require_choice(at + "train_routing", self.train_routing, ROUTINGS)
        require_choice(at + "eval_routing", self.eval_routing, ROUTINGS)
        require_choice(at + "router_score", self.router_score, ROUTER_SCORES)
        if self.implementation:
            require_choice(at + "implementation", self.implementation, EXPERTS_IMPLEMENTATIONS)
        if self.transport:
            require_choice(at + "transport", self.transport, TRANSPORTS)
        require(self.clamp >= 0, at + "clamp", self.clamp, "0 (SwiGLU) or above")
        if not self.num_experts:
            return
        require(self.expert_dim >= 1, at + "expert_dim", self.expert_dim, "at least 1")
        require(
            self.num_shared_experts >= 0,
            at + "num_shared_experts",
            self.num_shared_experts,
            "0 or more",
        )
        for name in ("top_k", "max_experts"):
            require(
                1 <= getattr(self, name) <= self.num_experts,
                at + name,
                getattr(self, name),
                f"between 1 and num_experts = {self.num_experts}",
            )
        require(0 < self.top_p <= 1, at + "top_p", self.top_p, "in (0, 1]")
        require(
            self.target_experts == 0 or 1 <= self.target_experts <= self.max_experts,
            at + "target_experts",
            self.target_experts,
            f"0 (fixed top_p) or between 1 and max_experts = {self.max_experts}",
        )
        require(
            self.target_experts == 0 or self.train_routing == "top_p",
            at + "target_experts",
            self.target_experts,
            f'0 unless train_routing is "top_p" (it is "{self.train_routing}")',
        )
        self._check_groups(at)
        require(
            self.capacity_factor >= 0,
            at + "capacity_factor",
            self.capacity_factor,
            "0 (dropless) or above",
        )
        require(self.exchange_rows > 0, at + "exchange_rows", self.exchange_rows, "above 0")
        require(self.routed_scale > 0, at + "routed_scale", self.routed_scale, "above 0")
        weights = [f.name for f in dataclasses.fields(self) if f.name.endswith("_weight")]
        for name in (*weights, "controller_kp", "controller_ki", "bias_update_rate"):
            require(getattr(self, name) >= 0, at + name, getattr(self, name), "0 or more")

    def _check_groups(self, at: str) -> None:
        require(
            self.num_groups >= 1 and self.num_experts % self.num_groups == 0,
            at + "num_groups",
            self.num_groups,
            f"a divisor of num_experts = {self.num_experts}",
        )
        require(
            self.num_partitions >= 1
            and (self.num_experts // self.num_groups) % self.num_partitions == 0,
            at + "num_partitions",
            self.num_partitions,
            f"a divisor of the {self.num_experts // self.num_groups} experts of a group",
        )
        group, most = (
            self.num_experts // self.num_groups,
            max(map(self.slots, (self.train_routing, self.eval_routing))),
        )
        require(
            self.max_groups == 0 or -(-most // group) <= self.max_groups <= self.num_groups,
            at + "max_groups",
            self.max_groups,
            f"0 (no limit) or between {-(-most // group)}, for {most} choices out of groups of "
            f"{group} experts, and num_groups = {self.num_groups}",
        )

    def slots(self, routing: str) -> int:
        """Static number C of choices per token under a routing kind (the last axis of `_MC`)."""
        return {"top_k": self.top_k, "top_p": self.max_experts, "dense": self.num_experts}[routing]

    @property
    def balance_weights(self) -> dict[str, float]:
        """Weights of the auxiliary losses, named as in `ops.balance.balance_losses`."""
        names = ("switch", "group", "partition", "true_group", "z", "entropy")
        return {name: getattr(self, f"{name}_weight") for name in names}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder: embedding, `prefix` layers, `num_units` repeats of `unit`, final norm, head.

    Prefix layers have a dense MLP. With `moe.num_experts > 0` the layers of the unit are routed:
    all of them, or those that `unit_mlp` marks.
    """

    vocab_size: int
    model_dim: int
    prefix: str
    unit: str
    unit_mlp: str
    num_units: int
    mlp_dim: int
    norm_eps: float
    tie_embeddings: bool
    compute_dtype: str
    scan: bool
    remat: str
    head_chunk: int
    attention: AttentionConfig
    moe: MoeConfig

    def __post_init__(self) -> None:
        for name in ("model_dim", "num_units", "head_chunk"):
            value = getattr(self, name)
            require(value >= 1, "model." + name, value, "at least 1")
        require(
            self.vocab_size >= 0, "model.vocab_size", self.vocab_size, "0 (tokenizer's) or more"
        )
        require(bool(self.unit), "model.unit", self.unit, 'at least one letter, such as "LLLG"')
        require(0 < self.norm_eps <= 1, "model.norm_eps", self.norm_eps, "in (0, 1]")
        require_choice("model.compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        require_choice("model.remat", self.remat, REMATS)
        require(
            self.num_layers <= _MOST_LAYERS,
            "model.num_units",
            self.num_units,
            f"such that prefix and units have at most {_MOST_LAYERS} layers",
        )
        parse_pattern(self.prefix, "model.prefix")
        parse_pattern(self.unit, "model.unit")
        parse_mlps(self.unit_mlp, self.unit, experts=self.moe.num_experts > 0)
        require(
            self.mlp_dim >= 1 or not self._has_dense_mlp,
            "model.mlp_dim",
            self.mlp_dim,
            "at least 1 where a layer has a dense MLP (prefix, D in unit_mlp, num_experts = 0)",
        )

    @property
    def _has_dense_mlp(self) -> bool:
        return not all(spec.routed for spec in self.prefix_layers + self.unit_layers)

    @property
    def prefix_layers(self) -> tuple[LayerSpec, ...]:
        return parse_pattern(self.prefix, "model.prefix")

    @property
    def unit_layers(self) -> tuple[LayerSpec, ...]:
        routed = parse_mlps(self.unit_mlp, self.unit, experts=self.moe.num_experts > 0)
        return parse_pattern(self.unit, "model.unit", routed)

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """Every layer from the embedding to the head, units repeated."""
        return self.prefix_layers + self.unit_layers * self.num_units

    @property
    def num_layers(self) -> int:
        return len(self.prefix) + len(self.unit) * self.num_units
