"""Every file in configs/ builds, and says what it is for and how to run it."""

import ast
import importlib.util
from pathlib import Path

import jax
import pytest

from lightning_jax import accounting
from lightning_jax import model as lm
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build, to_dict

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
# Take a folder of weights, tests/interop/test_convert.py, and a text, tests/test_own_text.py.
COMPLETE = [path for path in CONFIGS if path.stem not in ("imported", "own_text")]


def load(path):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
def test_builds(path):
    run = build(RunConfig, load(path))
    assert build(RunConfig, to_dict(run)) == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_with_the_command_that_runs_it(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"--config=configs/{path.name}" in text or "make " in text


def test_the_quickstart_is_the_model_that_its_docstring_describes():
    config = load(ROOT / "configs" / "quickstart.py")
    config.model.vocab_size = int(config.data.tokenizer.removeprefix("bpe:"))
    run = build(RunConfig, config)
    shapes = jax.tree.leaves(lm.abstract_params(run.model))
    assert sum(leaf.size for leaf in shapes) == accounting.parameters(run.model).total == 4_266_592
    assert run.model.unit == "LLLGLLLg" and run.model.moe.num_experts >= 16
    assert run.model.moe.train_routing == "top_p" and run.model.moe.target_experts
    assert [stage.name for stage in run.stages] == ["stable", "decay"]
    assert run.stages[-1].final_learning_rate == 0
    # The compressors get the text that the model is judged on.
    assert run.final_eval_tokens == 0
    # A byte-pair token has its space in front: after one, only digits follow.
    assert not run.sample_prompt.endswith(" ")
