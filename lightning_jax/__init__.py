"""lightning_jax: a research framework for language models that are cheap to train and serve.

    config, params, router = lightning_jax.load("folder")      # a Hugging Face folder
    run = lightning_jax.load_run("runs/a")                      # a trained run (see infer/run.py)
    run.logits(text), run.routing(text), run.generate(prompt)
    engine = lightning_jax.Engine(run.model, run.params, run.router, max_length=512)
    lightning_jax.run(config, "runs/b")                         # trains, or resumes, a RunConfig
    model = lightning_jax.inspect.open("runs/b")                # or a Hugging Face folder
    model.attention(text), model.router_probs(text), model.kv_bytes(text)

Each name is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # What the names are, for checkers of types and for editors.
    from lightning_jax import inspect
    from lightning_jax.infer.engine import Engine
    from lightning_jax.infer.run import Run, load_run
    from lightning_jax.interop.hf import load, save
    from lightning_jax.model import LightningLM
    from lightning_jax.train.loop import run

__version__ = "0.1.0"

_HOMES = {
    "Engine": "infer.engine",
    "LightningLM": "model",
    "Run": "infer.run",
    "inspect": "",
    "load": "interop.hf",
    "load_run": "infer.run",
    "run": "train.loop",
    "save": "interop.hf",
}
__all__ = ["Engine", "LightningLM", "Run", "inspect", "load", "load_run", "run", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not _HOMES[name]:  # a module
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
