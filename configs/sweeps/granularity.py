"""How finely the experts are cut, with equal parameters in all and in use.

python -m experiments.sweep --sweep=configs/sweeps/granularity.py --workdir=runs/granularity
python -m experiments.report --workdir=runs/granularity
"""

from configs import ablation


def get_sweep() -> dict:
    config = ablation.get_config()
    config.model.moe.update(train_routing="top_k", eval_routing="top_k", target_experts=0)
    config.model.moe.update(num_shared_experts=0, num_groups=1, num_partitions=1)
    config.model.moe.update(
        switch_weight=0.01, group_weight=0.0, partition_weight=0.0, bias_update_rate=0.0
    )
    arms = {
        f"{4 * count}x{144 // count}_top{count}": {
            "model.moe.num_experts": 4 * count,
            "model.moe.expert_dim": 144 // count,
            "model.moe.top_k": count,
            "model.moe.max_experts": count,
        }
        for count in (1, 2, 4, 8)
    }
    return dict(
        question="Are many small experts better than few large ones of the same size in all?",
        base=config,
        baseline="4x144_top1",
        arms=arms,
        factors={"granularity": [*arms["4x144_top1"]]},
        seeds=(0, 1, 2),
    )
