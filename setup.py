"""Metadata and extras; `constraints.txt` has the exact versions that were tested."""

from setuptools import find_packages, setup

DATA = ["pyarrow", "sentencepiece"]
NOTEBOOKS = ["ipykernel", "nbclient", "nbformat"]

setup(
    name="lightning_jax",
    version="0.1.0",
    description="Research framework for cheap language models: hybrid attention, KV sharing, MoE",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lightning_jax", "lightning_jax.*"]),
    install_requires=[
        "absl-py",
        "flax",
        "grain",
        "jax>=0.10,<0.11",
        "matplotlib",
        "ml-collections",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "rich",
        "tensorboard",
        "tokenizers",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10,<0.11"],
        "tpu": ["jax[tpu]>=0.10,<0.11"],
        "data": DATA,
        "notebooks": NOTEBOOKS,
        "test": ["pytest", "pytest-xdist", "ruff", *DATA, *NOTEBOOKS],
    },
)
