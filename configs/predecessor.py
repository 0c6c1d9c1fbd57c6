"""The quickstart's dense full-attention predecessor, the reference of every saving.

Same depth, width, heads, data and stages; every layer attends globally with its own keys and
values, and a dense MLP is as wide as the experts (three routed, one shared) that a token uses.

    python -m experiments.train --config=configs/predecessor.py --workdir=runs/predecessor
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    moe = config.model.moe
    config.model.mlp_dim = int(moe.target_experts + moe.num_shared_experts) * moe.expert_dim
    config.model.num_units *= len(config.model.unit)
    config.model.unit = "G"
    moe.num_experts = 0
    moe.target_experts = 0.0
    return config
