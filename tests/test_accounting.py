"""Costs from config alone: sums by hand and by brute force, and what the hybrid pattern saves."""

import dataclasses

import numpy as np
import pytest

from configs import base
from lightning_jax import accounting
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build


def model(*, attention=None, moe=None, **changes):
    config = build(RunConfig, base.get_config()).model
    return dataclasses.replace(
        config,
        vocab_size=changes.pop("vocab_size", 100),
        attention=dataclasses.replace(config.attention, **(attention or {})),
        moe=dataclasses.replace(config.moe, **(moe or {})),
        **changes,
    )


def test_parameters_by_hand():
    """D=128, N=4, K=2, H=32, E=16, F=96, one shared expert, 3 experts per token, MLP 384, V=100."""
    size = accounting.parameters(model(prefix="G", unit="LlGg", num_units=2))
    owners, borrowers = 1 + 2 * 2, 2 * 2
    expert = 3 * 128 * 96
    assert size.embedding == 100 * 128 and size.head == 0
    assert size.norms == 9 * 2 * 128 + 128
    assert size.attention == 9 * (2 * 128 * 4 * 32 + 32) + owners * (2 * 128 * 2 * 32 + 32)
    assert size.dense_mlp == 3 * 128 * 384
    assert size.router == 8 * 128 * 16
    assert size.shared_experts == 8 * expert
    assert size.experts == 8 * 16 * expert
    assert size.used_experts == 8 * 3 * expert
    assert size.total - size.active == 8 * 13 * expert
    assert borrowers + owners == 9


def test_options_add_their_parameters():
    plain = accounting.parameters(model())
    gates = accounting.parameters(model(attention={"output_gate": True, "sinks": True}))
    assert gates.total - plain.total == 8 * (128 * 4 + 4)
    untied = accounting.parameters(model(tie_embeddings=False))
    assert untied.total - plain.total == untied.head == 100 * 128
    bare = accounting.parameters(model(attention={"qk_norm": "none"}))
    assert plain.total - bare.total == 32 * (8 + 7)
    wide = accounting.parameters(model(attention={"qk_norm": "projection"}))
    assert wide.total - bare.total == 32 * (8 * 4 + 7 * 2)
    biased = accounting.parameters(model(attention={"qkv_bias": True, "out_bias": True}))
    assert biased.total - plain.total == 8 * (128 + 128) + 7 * 2 * 64
    experts = accounting.parameters(model(moe={"router_bias": True, "expert_bias": True}))
    assert experts.total - plain.total == 8 * 16 * (1 + 2 * 96 + 128)


def test_vectors_multiply_no_token():
    plain = accounting.decode_flops(model(), 64)
    options = {"qkv_bias": True, "out_bias": True, "sinks": True, "qk_norm": "projection"}
    vectors = {"router_bias": True, "expert_bias": True}
    assert accounting.decode_flops(model(attention=options, moe=vectors), 64) == plain


@pytest.mark.parametrize(
    ("changes", "training", "expected"),
    [
        ({}, True, 3.0),
        ({"target_experts": 0.0}, True, 8.0),
        ({"eval_routing": "top_k"}, False, 4.0),
        ({"train_routing": "dense", "target_experts": 0.0}, True, 16.0),
        ({"num_experts": 0}, True, 0.0),
    ],
)
def test_nominal_experts(changes, training, expected):
    assert accounting.nominal_experts(model(moe=changes).moe, training=training) == expected


def test_measured_experts_replace_the_nominal_number():
    config = model()
    step = accounting.flops_per_token(config, seq_len=64, experts_per_token=4.0)
    step -= accounting.flops_per_token(config, seq_len=64, experts_per_token=3.0)
    assert step == 3 * 2 * 8 * 3 * 128 * 96


@pytest.mark.parametrize("length", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("window", [1, 63, 64, 65, None])
def test_pairs_are_those_of_a_dense_mask(length, window):
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    visible = (distance >= 0) & (distance < (window or length))
    assert accounting.attention_pairs(length, window) == visible.sum()


def test_flops_of_one_pair():
    assert accounting.pair_flops(4, 32) == 2 * 2 * 4 * 32
    assert accounting.pair_flops(4, 32, products=7) == 7 * 2 * 4 * 32


@pytest.mark.parametrize("context", [1, 5, 64, 65, 200])
def test_attention_flops_equal_the_sum_over_visible_pairs(context):
    config = model(unit="LlGg")
    pairs = sum(2 * min(query, 64) + 2 * query for query in range(1, context + 1))
    assert accounting.attention_flops(config, context) == 4 * 4 * 32 * pairs
    steps = sum(accounting.decode_flops(config, visible) for visible in range(1, context + 1))
    prefill = accounting.flops_per_token(config, seq_len=context, training=False) * context
    assert steps == pytest.approx(prefill, rel=1e-12)


def test_flops_of_a_dense_model_by_hand():
    config = model(unit="G", num_units=2, moe={"num_experts": 0}, attention={"sinks": True})
    matmul = 2 * (2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 384) + 100 * 128
    expected = 3 * (2 * matmul + 2 * 4 * 128 * (10 + 1) / 2)
    assert accounting.flops_per_token(config, seq_len=10) == pytest.approx(expected, rel=1e-12)


def test_the_articles_pattern_saves_82_81_percent_of_the_cache():
    """3 sliding layers to 1 full one that shares in pairs, window 1/16 of the context."""
    config = model(attention={"window": 4096})
    dense = accounting.predecessor(config)
    ours = accounting.kv_bytes_per_token(config, 65_536)
    saving = 1 - ours / accounting.kv_bytes_per_token(dense, 65_536)
    assert saving == 1 - (6 / 16 + 1) / 8
    assert f"{saving:.2%}" == "82.81%"
    assert accounting.kv_cache_bytes(config, 10) == 7 * 10 * 2 * 2 * 32 * 2


def test_predecessor_is_dense_global_and_as_wide_as_the_active_experts():
    config = model(prefix="L", unit="LG", num_units=2, attention={"global_rope": False})
    dense = accounting.predecessor(config)
    assert [spec.letter for spec in dense.layers] == ["G"] * 5
    assert not any(spec.routed for spec in dense.layers)
    assert dense.attention.global_rope
    assert dense.mlp_dim == round((4 * (3 + 1) * 96 + 384) / 5)
    mlp = accounting.parameters(dense).dense_mlp
    ours = accounting.parameters(config)
    active = ours.used_experts + ours.shared_experts + ours.dense_mlp
    assert mlp == pytest.approx(active, rel=0.01)
    assert accounting.predecessor(dense) == dense


def test_tables():
    rows = accounting.summary_rows(model(), 512)
    assert all(len(row) == 2 for row in rows)
    assert ["experts per token, of those held", "3 of 16"] in rows
    rows = accounting.comparison_rows(model(vocab_size=0), 2.5)
    assert [len(row) for row in rows] == [4] * 8
    assert rows[-1] == ["experts used, of those held", "2.50 of 16", "dense", "84.4%"]
    # 6 rings of 64 and one full layer, of K=2 heads of 32, at 1024 tokens; 2 bytes per value.
    assert rows[1][1:] == ["352", "2.05 K", "82.8%"]


def test_patterns_are_compared_with_the_first():
    # At four windows L keeps a quarter of what G keeps, and sees 14,368 of its 32,896 pairs.
    rows = accounting.cost_rows({unit: model(unit=unit) for unit in ("GG", "Gg", "LG")}, 256)
    assert [row[0] for row in rows] == ["", "GG", "Gg", "LG"]
    assert [row[2] for row in rows[1:]] == ["100.0%", "50.0%", "62.5%"]
    assert [row[4] for row in rows[1:]] == ["100.0%", "100.0%", "71.8%"]
    assert rows[1][1] == "131 K"  # 2 layers, 256 keys and values, K=2 heads of 32, 2 bytes


def test_memory_of_a_device():
    state = {"parameters": 3 << 20, "optimizer state": 6 << 20}
    assert accounting.memory_rows(state, 3 << 29) == [
        ["parameters", "3 MiB"],
        ["optimizer state", "6 MiB"],
        ["gradients", "3 MiB"],
        ["together", "12 MiB of 1.5 GiB; activations are not included"],
    ]
    assert accounting.memory_rows(state, None)[-1][1].startswith("12 MiB; ")
    assert accounting.binary(0) == "0 B" and accounting.binary(1536) == "1.5 KiB"


def test_an_unknown_vocabulary_is_refused_where_it_counts():
    with pytest.raises(UserError, match="model.vocab_size = 0: must be the tokenizer's size"):
        accounting.parameters(model(vocab_size=0))


def test_flops_that_devices_repeat():
    """One global layer and a local one, both routed, 3 experts each; a dense prefix layer."""
    config = model(prefix="G", unit="LG", attention={"window": 16})
    needed = accounting.flops_per_token(config, seq_len=64)
    assert accounting.device_flops_per_token(config, seq_len=64) == needed
    units = dataclasses.replace(config, prefix="")
    head = 2 * 100 * 128
    once = accounting.flops_per_token(units, seq_len=64, training=False) - head
    full = dataclasses.replace(config, remat="full")
    assert accounting.device_flops_per_token(full, seq_len=64) == needed + once
    # A policy that saves products repeats attention (16.. of 64 keys) and the routed experts.
    dots = dataclasses.replace(config, remat="dots_saveable")
    local, whole = 16 * 17 / 2 + 48 * 16, 64 * 65 / 2
    kernels = 4 * 4 * 32 * (local + whole) / 64 + 2 * 2 * 3 * (3 * 128 * 96)
    assert accounting.device_flops_per_token(dots, seq_len=64) == pytest.approx(needed + kernels)
    # Micro-batches count assignments in a forward pass of their own, the prefix included.
    counted = accounting.flops_per_token(config, seq_len=64, training=False) - head
    several = accounting.device_flops_per_token(config, seq_len=64, accumulate=2)
    assert several == needed + counted
    weights = ("switch", "group", "partition", "true_group", "z", "entropy")
    unbalanced = model(prefix="G", unit="LG", moe={f"{name}_weight": 0.0 for name in weights})
    assert accounting.device_flops_per_token(
        unbalanced, seq_len=64, accumulate=2
    ) == accounting.flops_per_token(unbalanced, seq_len=64)


def test_chunks_of_a_prefill_add_up():
    """One head for each chunk, whose last logits are made, instead of one for each token."""
    config, head = model(unit="LG"), 2 * 100 * 128
    whole = accounting.prefill_flops(config, 0, 64)
    parts = accounting.prefill_flops(config, 0, 40) + accounting.prefill_flops(config, 40, 64)
    assert parts == whole + head
    per_token = accounting.flops_per_token(config, seq_len=64, training=False)
    assert whole == pytest.approx(64 * per_token - 63 * head)
    one = accounting.prefill_flops(config, 63, 64)
    assert one == accounting.decode_flops(config, 64)
