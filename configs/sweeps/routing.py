"""How many experts a token takes: as many for all (top-k), or as many as it needs (top-p).

A token's experts, the shared one included, have the dense MLP's hidden features in all arms but
`top_2`.

    python -m experiments.sweep --sweep=configs/sweeps/routing.py --workdir=runs/routing --jobs=2
    python -m experiments.report --workdir=runs/routing
"""

from configs import ablation


def get_sweep() -> dict:
    config = ablation.get_config()
    config.model.moe.update(num_experts=16, expert_dim=48, num_shared_experts=1, max_experts=8)
    config.model.moe.update(train_routing="top_k", eval_routing="top_k", top_k=3, target_experts=0)
    top_p = {"model.moe.train_routing": "top_p", "model.moe.eval_routing": "top_p"}
    return dict(
        question="Does a token that chooses how many experts it takes lose less than top-k?",
        base=config,
        baseline="top_3",
        arms={
            "top_3": {},
            "top_2": {"model.moe.top_k": 2},
            "dense": {"model.moe.num_experts": 0},
            "top_p_fixed": {**top_p, "model.moe.top_p": 0.4},
            "top_p_controlled": {**top_p, "model.moe.target_experts": 3.0},
        },
        factors={"top-p": ["model.moe.*_routing", "model.moe.top_p", "model.moe.target_experts"]},
        inference={
            "top_2": {"routing": "top_k", "top_k": 2},
            "top_3": {"routing": "top_k", "top_k": 3},
            "top_p_0.3": {"routing": "top_p", "top_p": 0.3},
            "top_p_0.5": {"routing": "top_p", "top_p": 0.5},
        },
        seeds=(0, 1, 2, 3),
    )
