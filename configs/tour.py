"""The smallest complete Lightning model: seconds to compile, under a minute to train on two cores.

python -m experiments.train --config=configs/tour.py --workdir=runs/tour
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.model.model_dim = 64
    config.model.unit = "LLLG"
    config.model.attention.head_dim = 16
    config.model.attention.window = 32
    config.model.moe.expert_dim = 48
    shape = dict(batch_size=4, seq_len=256, learning_rate=6e-3)
    config.stages = base.named(
        stable=base.stage(tokens=60_000, warmup_tokens=6_000, **shape),
        decay=base.stage(
            tokens=20_000,
            mixture=base.named(code=0.5, docs=0.5),
            decay="sqrt",
            decay_tokens=20_000,
            **shape,
        ),
    )
    config.log_every = 2
    config.eval_every = 0
    config.eval_tokens = 8_192
    config.checkpoint_every = 100
    return config
