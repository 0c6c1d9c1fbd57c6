"""What keeps experts evenly used, and what it costs: five balance losses and a selection bias.

python -m experiments.sweep --sweep=configs/sweeps/balance.py --workdir=runs/balance --jobs=2
python -m experiments.report --workdir=runs/balance
"""

from configs import ablation


def get_sweep() -> dict:
    config = ablation.get_config()
    config.model.moe.update(num_experts=16, expert_dim=48, num_shared_experts=1)
    config.model.moe.update(train_routing="top_k", eval_routing="top_k", top_k=3, target_experts=0)
    config.model.moe.update(num_groups=4, num_partitions=2, bias_update_rate=0.0)
    config.model.moe.update(
        switch_weight=0.0, group_weight=0.0, partition_weight=0.0, true_group_weight=0.0
    )
    return dict(
        question="Does balancing experts cost anything, and which way of it costs least?",
        base=config,
        baseline="none",
        arms={
            "none": {},
            "switch": {"model.moe.switch_weight": 0.01},
            "ep_group": {"model.moe.group_weight": 0.01},
            "partitioned": {"model.moe.partition_weight": 0.01},
            "true_group": {"model.moe.true_group_weight": 0.01},
            "aux_free_bias": {"model.moe.bias_update_rate": 0.003},
        },
        seeds=(0, 1, 2),
    )
