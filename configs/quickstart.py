"""A complete small Lightning model on the standard library's own text, in minutes on two cores.

Three sliding-window layers to one full-attention layer, full layers sharing keys and values in
pairs, 16 fine-grained experts under top-p routing, a stable stage and a decay stage with more
documentation in its mixture.

    make quickstart

Of code that it has not seen it needs 1.79 bits per byte, where `xz -9e` needs 1.86 and `gzip -9`
2.11. From `git clone` to the end, setting up included, that took 3.8 minutes on two cores
(benchmarks/results/first_minutes.json, by `python -m benchmarks.first_minutes`).
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.tokenizer = "bpe:4096"
    config.model.head_chunk = 256
    config.model.attention.output_gate = True
    # Muon's work grows with the square of it, and is the same for every batch, however small.
    config.model.moe.expert_dim = 64
    config.optimizer.name = "muon"
    # Few tokens: small batches, for many steps, and a high rate that falls for almost half of them.
    shape = dict(batch_size=4, learning_rate=0.02)
    config.stages = base.named(
        stable=base.stage(tokens=600_000, warmup_tokens=32_000, **shape),
        decay=base.stage(
            tokens=500_000,
            mixture=base.named(code=0.85, docs=0.15),
            decay="sqrt",
            decay_tokens=500_000,
            **shape,
        ),
    )
    config.eval_every = 0
    config.final_eval_tokens = 0  # the text that gzip and xz get: all that is held out
    config.checkpoint_every = 100
    config.log_every = 5
    config.sample_prompt = "def __init__(self, file):"  # a byte pair has its space in front
    config.sample_tokens = 160
    return config
