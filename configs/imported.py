"""The model of a folder (a run's, or Hugging Face's) under this project's data and stages.

Training continues from the weights of a run's folder (which `experiments.convert` makes). The model
of a run is that of its newest checkpoint, with the RoPE base that the weights were trained with.

    python -m experiments.convert --from=hf --path=FOLDER --workdir=runs/imported
    python -m experiments.train --config=configs/imported.py:runs/imported --workdir=runs/imported
"""

from ml_collections import ConfigDict

from configs import base
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.interop.convert import describe


def get_config(path: str = "") -> ConfigDict:
    if not path:
        raise UserError("configs/imported.py needs a folder: --config=configs/imported.py:FOLDER")
    config = base.get_config()
    model, tokenizer = describe(path)
    config.model = ConfigDict(to_dict(model))
    if tokenizer is not None:
        config.data.tokenizer = tokenizer
    config.stages = base.named(only=base.stage(learning_rate=3e-4, warmup_tokens=50_000))
    return config
