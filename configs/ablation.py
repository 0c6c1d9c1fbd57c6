"""The base of the shipped sweeps: eight narrow layers whose runs differ little from seed to seed.

What keeps the noise of a run down: every batch has text of as many documents as rows (one long
module fills a fifth of a run otherwise), the rate falls for half of the tokens, the weights that
are evaluated are an average over the last steps, and all held-out text is evaluated.

    python -m experiments.train --config=configs/ablation.py --workdir=runs/ablation
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.tokenizer = "bpe:1024"
    config.data.streams = 4
    config.model.model_dim = 64
    config.model.mlp_dim = 192
    config.model.head_chunk = 512
    config.model.attention.head_dim = 16
    config.model.attention.window = 32
    config.model.moe.num_experts = 0
    config.optimizer.name = "muon"
    config.optimizer.ema_decay = 0.99
    shape = dict(batch_size=4, seq_len=256, learning_rate=0.01)
    config.stages = base.named(
        stable=base.stage(tokens=150_000, warmup_tokens=15_000, **shape),
        decay=base.stage(tokens=150_000, decay="sqrt", decay_tokens=150_000, **shape),
    )
    config.eval_every = 0
    config.final_eval_tokens = 0
    config.checkpoint_every = 1_000
    config.log_every = 5
    config.sample_tokens = 0
    return config
