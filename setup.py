"""Metadata and extras; `constraints.txt` has the exact versions that were tested."""

from setuptools import find_packages, setup

DATA = ["pyarrow", "sentencepiece"]
INTEROP = ["jinja2>=3.1.6", "safetensors"]
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
        "interop": INTEROP,
        "lm-eval": ["lm_eval>=0.4.13", *INTEROP],
        # Other people's code to compare with, in tests and in benchmarks.
        "peers": ["torch==2.13.0", "transformers==5.23.0", *INTEROP],
        # Compiles for TPUs without one; the version that jax 0.10 belongs to.
        "tpu-aot": ["libtpu==0.0.42.*"],
        "notebooks": NOTEBOOKS,
        "test": ["pytest", "pytest-xdist", "ruff", *DATA, *INTEROP, *NOTEBOOKS],
    },
)
