"""lightning_jax: a research framework for language models that are cheap to train and serve."""

__version__ = "0.1.0"
