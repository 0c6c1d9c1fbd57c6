"""Metadata and extras; `constraints.txt` has the exact versions that were tested."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
DATA = ["pyarrow", "sentencepiece"]
INTEROP = ["jinja2>=3.1.6", "safetensors"]
NOTEBOOKS = ["jupyterlab", "nbclient", "nbformat"]
DOCS = ["mkdocs-material"]
TYPES = ["pyright"]
# Of sweeps: a search of learning rates, and jobs of a scheduler.
SEARCH = ["optuna"]
SLURM = ["submitit"]


class BuildWithPrograms(build_py):
    """Puts programs and configs into a wheel, where `lightning_jax.runtime.shipped` finds them.

    An editable install finds them beside the package. The code of the benchmark suites stays there.
    """

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "lightning_jax", "shipped")
        shutil.rmtree(target, ignore_errors=True)
        for folder in ("configs", "experiments"):
            left_out = shutil.ignore_patterns("__pycache__", "benchmark.py")
            shutil.copytree(HERE / folder, target / folder, ignore=left_out)


setup(
    name="lightning_jax",
    version=re.search('__version__ = "(.*)"', (HERE / "lightning_jax/__init__.py").read_text())[1],
    description="Research framework for cheap language models: hybrid attention, KV sharing, MoE",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    # The address that badges and links of README and docs name; mkdocs.yml has it too.
    url="https://github.com/lightning-jax/lightning_jax",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["lightning_jax", "lightning_jax.*"]),
    package_data={"lightning_jax": ["py.typed"]},
    cmdclass={"build_py": BuildWithPrograms},
    entry_points={"console_scripts": ["lightning-jax = lightning_jax.runtime.console:main"]},
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
        "search": SEARCH,
        "slurm": SLURM,
        "lm-eval": ["lm_eval>=0.4.13", *INTEROP],
        # Writers beside TensorBoard.
        "wandb": ["wandb"],
        "trackio": ["trackio>=0.43"],
        # Other people's code to compare with, in tests and in benchmarks.
        "peers": ["torch==2.13.0", "transformers==5.23.0", *INTEROP],
        # Compiles for TPUs without one; the version that jax 0.10 belongs to.
        "tpu-aot": ["libtpu==0.0.42.*"],
        "notebooks": NOTEBOOKS,
        "docs": DOCS,
        "test": [
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            *TYPES,
            *DATA,
            *INTEROP,
            *NOTEBOOKS,
            *SEARCH,
            *SLURM,
        ],
        "dev": ["pre-commit", *DOCS],
    },
)
