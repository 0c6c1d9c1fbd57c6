"""The cost of a model, from its config alone: parameters, FLOPs, KV-cache bytes.

Letters as everywhere: D model width, N query heads, K key/value heads, H head size, E experts,
F expert or MLP hidden, V vocabulary, W window, T sequence length. One multiply-add is two FLOPs;
only matrix products count, and a backward pass is two forward passes. Rematerialisation does not
count: these are the FLOPs that the model needs, not those that a device spends, which only
`device_flops_per_token` counts.

Under top-p routing the number of experts per token depends on the input, so functions of it take
the measured mean `experts_per_token`; None stands for the nominal number (`nominal_experts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from lightning_jax.config import ModelConfig, MoeConfig
from lightning_jax.config.fields import require
from lightning_jax.config.pattern import LayerSpec

CONTEXTS = (1024, 8192, 65_536)
_TRAINING_PASSES = 3

Rows = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of the whole model; `used_experts` counts those of one token."""

    embedding: int
    head: int
    norms: int
    attention: int
    dense_mlp: int
    router: int
    shared_experts: int
    experts: int
    used_experts: float

    @property
    def total(self) -> int:
        """All stored parameters. A tied head is the embedding and counts once."""
        return self._outside_experts + self.experts

    @property
    def active(self) -> float:
        """Parameters that one token uses, the whole embedding included."""
        return self._outside_experts + self.used_experts

    @property
    def _outside_experts(self) -> int:
        mixers = self.attention + self.dense_mlp + self.router + self.shared_experts
        return self.embedding + self.head + self.norms + mixers


def nominal_experts(moe: MoeConfig, *, training: bool = True) -> float:
    """Returns the routed experts per token that the config asks for, in training or evaluation.

    Under top-p this is the controller's target, or the bound `max_experts` without a target.
    """
    routing = moe.train_routing if training else moe.eval_routing
    if not moe.num_experts:
        return 0.0
    if routing == "top_p":
        return float(moe.target_experts or moe.max_experts)
    return float(moe.slots(routing))


def parameters(config: ModelConfig, experts_per_token: float | None = None) -> Parameters:
    """Counts the parameters. The router's selection bias is state and is not among them.

    Raises:
      UserError: the vocabulary's size is 0, that is, left to the tokenizer.
    """
    _require_vocab(config)
    moe, D = config.moe, config.model_dim
    routed = sum(spec.routed for spec in config.layers)
    expert = 3 * D * moe.expert_dim
    routed_expert = expert + _expert_vectors(config)
    used = nominal_experts(moe) if experts_per_token is None else experts_per_token
    return Parameters(
        embedding=config.vocab_size * D,
        head=0 if config.tie_embeddings else config.vocab_size * D,
        norms=(2 * config.num_layers + 1) * D,
        attention=sum(_attention_parameters(config, spec) for spec in config.layers),
        dense_mlp=3 * D * config.mlp_dim * (config.num_layers - routed),
        router=routed * (D + moe.router_bias) * moe.num_experts,
        shared_experts=routed * moe.num_shared_experts * expert,
        experts=routed * moe.num_experts * routed_expert,
        used_experts=routed * used * routed_expert,
    )


def flops_per_token(
    config: ModelConfig,
    *,
    seq_len: int,
    experts_per_token: float | None = None,
    training: bool = True,
) -> float:
    """Returns FLOPs per token, mean over `seq_len` tokens; training includes the backward pass."""
    if experts_per_token is None:
        experts_per_token = nominal_experts(config.moe, training=training)
    forward = 2 * _matmul_parameters(config, experts_per_token)
    forward += attention_flops(config, seq_len) / seq_len
    return forward * (_TRAINING_PASSES if training else 1)


def device_flops_per_token(
    config: ModelConfig,
    *,
    seq_len: int,
    accumulate: int = 1,
    experts_per_token: float | None = None,
) -> float:
    """Returns FLOPs per trained token that devices spend: `flops_per_token` and what is repeated.

    Rematerialisation computes the forward pass of the units again: all of it, or, where a policy
    saves products, what is done by kernels, that is attention and routed experts. With gradient
    accumulation and balance losses one more forward pass counts the assignments first. An upper
    bound: of what is repeated, a compiler leaves out what nothing needs.

    Args:
      accumulate: micro-batches per step.
    """
    used = nominal_experts(config.moe) if experts_per_token is None else experts_per_token
    needed = flops_per_token(config, seq_len=seq_len, experts_per_token=used)
    units = dataclasses.replace(config, prefix="")
    kernels = attention_flops(units, seq_len) / seq_len
    kernels += 2 * parameters(units, used).used_experts
    head = 2 * config.vocab_size * config.model_dim
    forward = flops_per_token(units, seq_len=seq_len, experts_per_token=used, training=False)
    if config.remat in ("full", "nothing_saveable"):
        needed += forward - head
    elif config.remat not in ("none", "everything_saveable"):
        needed += kernels
    if accumulate > 1 and config.moe.num_experts and any(config.moe.balance_weights.values()):
        whole = flops_per_token(config, seq_len=seq_len, experts_per_token=used, training=False)
        needed += whole - head
    return needed


def prefill_flops(
    config: ModelConfig, start: int, end: int, *, experts_per_token: float | None = None
) -> float:
    """Returns FLOPs of reading tokens `start..end` of one prompt, and of the logits of the last."""
    if experts_per_token is None:
        experts_per_token = nominal_experts(config.moe, training=False)
    head = config.vocab_size * config.model_dim
    body = _matmul_parameters(config, experts_per_token) - head
    attention = attention_flops(config, end) - attention_flops(config, start)
    return 2 * body * (end - start) + 2 * head + attention


def decode_flops(
    config: ModelConfig, context: int, *, experts_per_token: float | None = None
) -> float:
    """Returns FLOPs of one decoded token that sees `context` tokens, itself included."""
    if experts_per_token is None:
        experts_per_token = nominal_experts(config.moe, training=False)
    visible = sum(_visible(config, spec, context) for spec in config.layers)
    return 2 * _matmul_parameters(config, experts_per_token) + _score_flops(config) * visible


def attention_pairs(length: int, window: int | None = None) -> int:
    """Returns the number of visible query-key pairs of one head over a causal sequence.

    Args:
      length: tokens of the sequence.
      window: visible keys per query, self included; None for all.
    """
    window = length if window is None else min(window, length)
    # The first `window` queries see 1, 2, ..., window keys, the others `window` each.
    return window * (window + 1) // 2 + (length - window) * window


def pair_flops(num_heads: int, head_dim: int, *, products: int = 2) -> int:
    """Returns FLOPs of one query-key pair over all heads.

    Args:
      num_heads: query heads.
      head_dim: H; a product is one multiply-add for each of its entries.
      products: those of one pair: 2 going forward, the score and the weighted value. A backward
        pass that recomputes the scores has 5.
    """
    return 2 * products * num_heads * head_dim


def attention_flops(config: ModelConfig, context: int) -> int:
    """Returns FLOPs of scores and weighted values over a whole causal sequence (its prefill)."""
    windows = (_visible(config, spec, context) for spec in config.layers)
    return _score_flops(config) * sum(attention_pairs(context, window) for window in windows)


def kv_cache_bytes(config: ModelConfig, context: int, *, bytes_per_value: int = 2) -> int:
    """Returns the size of one sequence's cache after `context` tokens.

    A local owner keeps a ring of `min(window, context)`, a global owner everything, a borrower
    nothing.
    """
    attention = config.attention
    slots = sum(_visible(config, spec, context) for spec in config.layers if spec.owns_kv)
    return slots * 2 * attention.num_kv_heads * attention.head_dim * bytes_per_value


def kv_bytes_per_token(config: ModelConfig, context: int, *, bytes_per_value: int = 2) -> float:
    """Returns cache bytes per token of context, mean over a context of `context` tokens."""
    return kv_cache_bytes(config, context, bytes_per_value=bytes_per_value) / context


def predecessor(config: ModelConfig) -> ModelConfig:
    """Returns the dense full-attention model to compare with: same depth, width and heads.

    Every layer attends globally with its own keys and values. The MLP is as wide as the MLPs that
    one token uses, averaged over the layers: `nominal_experts` plus the shared experts in a routed
    layer, `mlp_dim` in a dense one, rounded. So both models multiply a token by MLPs of the same
    size, and only attention, the router and the number of experts held differ.
    """
    moe = config.moe
    routed = sum(spec.routed for spec in config.layers)
    used = (nominal_experts(moe) + moe.num_shared_experts) * moe.expert_dim
    width = (routed * used + (config.num_layers - routed) * config.mlp_dim) / config.num_layers
    return dataclasses.replace(
        config,
        prefix="",
        unit="G",
        unit_mlp="",
        num_units=config.num_layers,
        mlp_dim=round(width),
        # Global layers may go without positions only next to local ones that have them.
        attention=dataclasses.replace(config.attention, global_rope=True, implementation=""),
        moe=dataclasses.replace(moe, num_experts=0),
    )


def summary_rows(config: ModelConfig, seq_len: int) -> Rows:
    """Rows, header first, that describe one model: size, and cost at `seq_len`."""
    size = parameters(config)
    held, used = config.moe.num_experts, nominal_experts(config.moe)
    pattern = f"{config.prefix} + " * bool(config.prefix) + f"{config.num_units} x {config.unit}"
    return [
        ["", f"at {seq_len:,} tokens"],
        ["layers", f"{config.num_layers} ({pattern})"],
        ["layers that keep keys and values", str(sum(s.owns_kv for s in config.layers))],
        ["parameters", count_text(size.total)],
        ["parameters used per token", count_text(size.active)],
        ["experts per token, of those held", f"{used:g} of {held}" if held else "dense"],
        ["training FLOPs per token", count_text(flops_per_token(config, seq_len=seq_len))],
        ["FLOPs per decoded token", count_text(decode_flops(config, seq_len))],
        ["KV-cache bytes per token (16 bit)", count_text(kv_bytes_per_token(config, seq_len))],
    ]


def memory_rows(state: Mapping[str, int], limit: int | None) -> Rows:
    """Rows that say what a training step keeps on each device, whatever its activations take.

    Args:
      state: bytes on each device by what they are; `parameters` are among them, and there are as
        many gradients.
      limit: bytes that the device has; None if that is not known.
    """
    parts = {**state, "gradients": state["parameters"]}
    together = binary(sum(parts.values())) + (f" of {binary(limit)}" if limit else "")
    return [
        *([name, binary(size)] for name, size in parts.items()),
        ["together", f"{together}; activations are not included"],
    ]


def comparison_rows(config: ModelConfig, experts_per_token: float | None = None) -> Rows:
    """Rows, header first: this model, its `predecessor`, and the saving."""
    dense = predecessor(config)
    rows = [["", "this model", "predecessor", "saved"]]
    for name, cost in (
        ("KV-cache bytes per token", kv_bytes_per_token),
        ("attention FLOPs of prefill", attention_flops),
    ):
        for context in CONTEXTS:
            ours, theirs = cost(config, context), cost(dense, context)
            label = f"{name}, context {context // 1024}K"
            rows.append([label, count_text(ours), count_text(theirs), f"{1 - ours / theirs:.1%}"])
    if held := config.moe.num_experts:
        used = nominal_experts(config.moe) if experts_per_token is None else experts_per_token
        label = "experts used, of those held"
        rows.append([label, f"{used:.2f} of {held}", "dense", f"{1 - used / held:.1%}"])
    return rows


def cost_rows(models: Mapping[str, ModelConfig], context: int) -> Rows:
    """Rows, header first: cache and attention of each model at one context, next to the first's.

    Args:
      models: by the name in its row.
      context: tokens of one sequence.
    """
    rows = [
        [
            "",
            "KV-cache bytes (16 bit)",
            "of the first",
            "attention FLOPs of prefill",
            "of the first",
        ]
    ]
    first = next(iter(models.values()))
    for name, config in models.items():
        cells = [name]
        for cost in (kv_cache_bytes, attention_flops):
            value = cost(config, context)
            cells += [count_text(value), f"{value / cost(first, context):.1%}"]
        rows.append(cells)
    return rows


def _require_vocab(config: ModelConfig) -> None:
    right = "the tokenizer's size here, not 0 (which leaves it to the tokenizer)"
    require(config.vocab_size > 0, "model.vocab_size", config.vocab_size, right)


def _attention_parameters(config: ModelConfig, spec: LayerSpec) -> int:
    attention, D = config.attention, config.model_dim
    N, K, H = attention.num_heads, attention.num_kv_heads, attention.head_dim
    matrices = 2 * D * N * H + attention.output_gate * D * N
    if spec.owns_kv:
        matrices += 2 * D * K * H
    return matrices + _attention_vectors(config, spec)


def _attention_vectors(config: ModelConfig, spec: LayerSpec) -> int:
    """Parameters of a layer's attention that multiply no token: norm scales, biases, sinks."""
    attention = config.attention
    heads = [attention.num_heads] + [attention.num_kv_heads] * spec.owns_kv
    normed = {"none": 0, "head": len(heads), "projection": sum(heads)}[attention.qk_norm]
    # The values' bias is as large as the keys'.
    biased = attention.qkv_bias * (sum(heads) + attention.num_kv_heads * spec.owns_kv)
    count = (normed + biased) * attention.head_dim + attention.out_bias * config.model_dim
    return count + attention.sinks * attention.num_heads


def _expert_vectors(config: ModelConfig) -> int:
    """Biases of one routed expert."""
    return config.moe.expert_bias * (2 * config.moe.expert_dim + config.model_dim)


def _matmul_parameters(config: ModelConfig, experts_per_token: float) -> float:
    """Parameters that multiply a token: a lookup does not, a tied head does, vectors do not."""
    size, moe = parameters(config, experts_per_token), config.moe
    routed = sum(spec.routed for spec in config.layers)
    vectors = sum(_attention_vectors(config, spec) for spec in config.layers)
    vectors += routed * moe.router_bias * moe.num_experts
    vectors += routed * experts_per_token * _expert_vectors(config)
    return size.active - size.head - size.norms - vectors


def _visible(config: ModelConfig, spec: LayerSpec, context: int) -> int:
    return min(config.attention.window, context) if spec.is_local else context


def _score_flops(config: ModelConfig) -> int:
    return pair_flops(config.attention.num_heads, config.attention.head_dim)


def count_text(value: float) -> str:
    """Returns a number in three digits: 1234567 -> "1.23 M"."""
    return _scaled(value, 1000, ["", " K", " M", " G", " T", " P", " E"])


def binary(size: int) -> str:
    """Bytes: 1536 -> "1.5 KiB"."""
    return _scaled(size, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"])


def _scaled(value: float, base: int, units: list[str]) -> str:
    while abs(value) >= 999.5 and len(units) > 1:
        value /= base
        units = units[1:]
    return f"{value:.3g}{units[0]}"
