"""A complete small Lightning model on the standard library's own text, in minutes on two cores.

Three sliding-window layers to one full-attention layer, full layers sharing keys and values in
pairs, 16 fine-grained experts under top-p routing, a stable stage and a decay stage with more
documentation in its mixture.

    make quickstart
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.data.tokenizer = "bpe:1024"
    config.model.head_chunk = 256
    config.stages = base.named(
        stable=base.stage(tokens=300_000, warmup_tokens=32_000, learning_rate=4e-3),
        decay=base.stage(
            tokens=80_000,
            mixture=base.named(code=0.7, docs=0.3),
            learning_rate=4e-3,
            decay="sqrt",
            decay_tokens=80_000,
        ),
    )
    config.eval_every = 0
    config.final_eval_tokens = 0  # the text that gzip and xz get: all that is held out
    config.checkpoint_every = 100
    return config
