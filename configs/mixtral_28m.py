"""A Mixtral of 28 million parameters, the shape that `experiments.benchmark --suite=train` times.

Eight layers of sliding-window attention and eight experts, two per token, as `transformers` builds
them: no shared experts, no balance losses, plain AdamW. Its data serves only to run it:

    python -m experiments.train --config=configs/mixtral_28m.py --workdir=runs/mixtral
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    model = config.model
    model.vocab_size = 8192
    model.model_dim = 384
    model.unit = "L"
    model.num_units = 8
    model.head_chunk = 512  # on two cores 10% of the step faster than all 2048 tokens at once
    model.attention.num_heads = 8
    model.attention.num_kv_heads = 2
    model.attention.head_dim = 64
    model.attention.window = 512
    model.attention.qk_norm = "none"
    moe = model.moe
    moe.num_experts = 8
    moe.expert_dim = 288
    moe.num_shared_experts = 0
    moe.train_routing = moe.eval_routing = "top_k"
    moe.top_k = 2
    moe.max_experts = 2
    moe.renormalize_gates = True
    moe.target_experts = 0.0
    moe.bias_update_rate = 0.0
    for name in ("switch", "group", "partition", "z", "entropy"):
        setattr(moe, f"{name}_weight", 0.0)
    config.optimizer.z_loss_weight = 0.0
    config.stages = base.named(only=base.stage(tokens=100_000, batch_size=4, learning_rate=1e-3))
    return config
