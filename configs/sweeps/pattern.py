"""Which pattern of local and full attention layers loses least for the cache it saves?

Four models of 8 layers that differ in the pattern alone: full attention everywhere, full attention
with keys and values shared by neighbours (CLA), three sliding-window layers to one full, and the
same with the full layers sharing in pairs (Yi-Lightning). Dense MLPs, so that routing adds no noise
of its own. 12 runs of about a minute on two cores.

    python -m experiments.sweep --sweep=configs/sweeps/pattern.py --workdir=runs/pattern
    python -m experiments.report --workdir=runs/pattern
"""

from configs import base


def get_sweep() -> dict:
    config = base.get_config()
    config.model.model_dim = 64
    config.model.mlp_dim = 192
    config.model.attention.window = 32
    config.model.moe.num_experts = 0
    config.stages = base.named(
        stable=base.stage(tokens=160_000, warmup_tokens=16_000, seq_len=256),
        decay=base.stage(tokens=40_000, seq_len=256, decay="sqrt", decay_tokens=40_000),
    )
    config.data.eval_fraction = 0.01
    config.eval_every = 0
    config.log_every = 2
    return dict(
        question="Which layer pattern loses least for the KV cache it saves, at equal depth?",
        base=config,
        baseline="G",
        arms={
            "G": {"model.unit": "G", "model.num_units": 8},
            "Gg": {"model.unit": "Gg", "model.num_units": 4},
            "LLLG": {"model.unit": "LLLG", "model.num_units": 2},
            "LLLGLLLg": {"model.unit": "LLLGLLLg", "model.num_units": 1},
        },
        seeds=(0, 1, 2),
    )
