"""Layers and models of `transformers` with the shapes of ours, ready to be timed."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.measure import Call, peer
from lightning_jax.config import ModelConfig


def to_torch(array: jax.Array) -> Any:
    """A torch tensor with the values and dtype of a jax array."""
    torch = peer("torch")
    return torch.from_numpy(np.array(array, np.float32)).to(getattr(torch, str(array.dtype)))


def torch_moe_calls(
    passes: str, arrays: tuple[jax.Array, ...], *, choices: int, batched: bool
) -> dict[str, Call]:
    """MoE blocks of transformers on our weights, one for each implementation of the experts.

    Args:
      passes: "forward" or "forward+backward"; gradients of x and of all weights.
      arrays: x_MD, router_DE, gate_EDF, up_EDF, down_EFD and the output's cotangent.
      choices: experts per token.
      batched: also time `batched_mm`, which gathers a copy of the weights for every choice of every
        token and so is for few tokens only.
    """
    x, router, gate, up, down, dout = (to_torch(a) for a in arrays)
    blocks = [("mixtral", "eager"), ("qwen3_moe", "grouped_mm")]
    if batched:
        blocks.append(("mixtral", "batched_mm"))
    calls = {}
    for family, kind in blocks:
        block = _moe_block(family, gate.shape, choices, kind).to(x.dtype)
        _load(block, router, gate, up, down)
        calls[f"{family}_{kind}"] = _block_call(block, x, dout, passes)
    return calls


def _moe_block(family: str, shape: tuple[int, int, int], choices: int, kind: str) -> Any:
    experts, model_dim, expert_dim = shape
    transformers = peer("transformers")
    module = peer(f"transformers.models.{family}.modeling_{family}")
    common = {"hidden_size": model_dim, "num_experts_per_tok": choices}
    if family == "mixtral":
        config = transformers.MixtralConfig(
            intermediate_size=expert_dim, num_local_experts=experts, **common
        )
        config._experts_implementation = kind
        return module.MixtralSparseMoeBlock(config)
    config = transformers.Qwen3MoeConfig(
        moe_intermediate_size=expert_dim, num_experts=experts, norm_topk_prob=True, **common
    )
    config._experts_implementation = kind
    return module.Qwen3MoeSparseMoeBlock(config)


def _load(block: Any, router: Any, gate: Any, up: Any, down: Any) -> None:
    """Writes our weights into a block, whose projections are stored [output, input]."""
    torch = peer("torch")
    with torch.no_grad():
        block.gate.weight.copy_(router.T)
        block.experts.gate_up_proj.copy_(torch.cat([gate, up], -1).transpose(1, 2))
        block.experts.down_proj.copy_(down.transpose(1, 2))


def _block_call(block: Any, x: Any, dout: Any, passes: str) -> Call:
    torch = peer("torch")
    x, dout = x[None], dout[None]
    if passes == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return block(x)

        return forward
    leaf = x.clone().requires_grad_(True)
    leaves = (leaf, *block.parameters())

    def both() -> Any:
        return torch.autograd.grad(block(leaf), leaves, dout)

    return both


def mixtral_train_call(model: ModelConfig, shape: tuple[int, int], dtype: str, kind: str) -> Call:
    """One step of transformers' Mixtral of our shape: forward, backward, fused AdamW.

    Args:
      model: local layers with top-k experts only.
      shape: rows and tokens per row.
      dtype: float32, or bfloat16 by autocast.
      kind: implementation of the experts.
    """
    torch, transformers = peer("torch"), peer("transformers")
    attention, moe = model.attention, model.moe
    config = transformers.MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.model_dim,
        intermediate_size=moe.expert_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=attention.num_heads,
        num_key_value_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        sliding_window=attention.window,
        num_local_experts=moe.num_experts,
        num_experts_per_tok=moe.top_k,
        tie_word_embeddings=model.tie_embeddings,
        experts_implementation=kind,
        attn_implementation="sdpa",
    )
    network = transformers.MixtralForCausalLM(config).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(0))

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = network(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return call
