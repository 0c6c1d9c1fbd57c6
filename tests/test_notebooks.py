"""Every notebook runs from top to bottom, is kept with its pictures, and reads like prose."""

import ast
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="needs the notebooks extra")

from IPython.core.inputtransformer2 import TransformerManager

from benchmarks import notebooks

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = "https://github.com/lightning-jax/lightning_jax"
# A picture costs its readers' patience, and every version of it stays in the repository.
MOST_BYTES = 400_000
LONGEST_DEFINITION = 10

# The smallest model with everything that a notebook shows; compiled once for all of them.
MODEL = {
    "model.model_dim": 32,
    "model.unit": "LGg",
    "model.moe.num_experts": 8,
    "model.moe.expert_dim": 16,
    "model.moe.max_experts": 4,
    "model.moe.target_experts": 2.0,
    "data.tokenizer": "bytes",
    "stages.stable.tokens": 4096,
    "stages.stable.warmup_tokens": 1024,
    "stages.decay.tokens": 1024,
    "stages.decay.decay_tokens": 1024,
    "final_eval_tokens": 1024,
}
# What of it a model without experts has.
SMALL = {field: value for field, value in MODEL.items() if field.split(".")[0] != "model"} | {
    "model.model_dim": 32
}
# A model that OLMoE's layout has room for.
OLMOE = {
    "model.unit": "GG",
    "model.attention.qk_norm": "projection",
    "model.attention.head_dim": 8,
    "model.moe.num_shared_experts": 0,
    "model.moe.train_routing": "top_k",
    "model.moe.eval_routing": "top_k",
    "model.moe.target_experts": 0.0,
    "model.moe.bias_update_rate": 0.0,
}
TUNING = {
    "stages.only.tokens": 4096,
    "stages.only.warmup_tokens": 1024,
    "stages.only.seq_len": 256,
    "final_eval_tokens": 1024,
}
# What a test puts in place of a notebook's parameters.
TINY = {
    "01_tour": {"changes": MODEL},
    "02_attention_and_kv": {"lengths": [256, 512], "rounds": 1},
    "03_top_p_routing": {"changes": MODEL, "top_ps": [0.2], "num_texts": 2, "short": 2048},
    "04_your_text": {"changes": MODEL | {"eval_every": 2}},
    "05_read_an_ablation": {"changes": SMALL, "seeds": [0, 1]},
    "06_hugging_face": {"stand_in": MODEL | OLMOE, "tuning": TUNING},
}
NAMES = notebooks.names()


def sources(name, kind):
    return [cell.source for cell in notebooks.read(name).cells if cell.cell_type == kind]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook):
    return [output for output in outputs(notebook) if notebooks.PNG in output.get("data", {})]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, monkeypatch):
    # The kernel is a process of its own: one device, as its reader has, and compiled like tests.
    one_device = re.sub(r"--xla_force_host\S*", "", os.environ["XLA_FLAGS"])
    monkeypatch.setenv("XLA_FLAGS", one_device)
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    kept = notebooks.read(name)
    assert len(pictures(notebooks.execute(kept, TINY[name]))) == len(pictures(kept))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_with_what_it_shows(name):
    notebook = notebooks.read(name)
    assert len(pictures(notebook)) >= 3, f"python -m benchmarks.notebooks --names={name}"
    text = (notebooks.FOLDER / f"{name}.ipynb").read_text()
    assert len(text) < MOST_BYTES
    # Nothing of the machine it ran on, and no noise.
    assert not re.findall(r"/(?:home|root|tmp|usr|work|Users|content)/", text)
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds <= {"display_data", "execute_result", "stream"}
    assert not any(map(notebooks.is_noise, outputs(notebook)))
    assert not re.findall(r"[A-Z]\w*Warning\b", text)
    assert not any(
        cell.get("execution_count") or "execution" in cell.metadata for cell in notebook.cells
    )


@pytest.mark.parametrize("name", NAMES)
def test_it_reads_like_prose(name):
    for source in sources(name, "code"):
        tree = ast.parse(TransformerManager().transform_cell(source))
        nodes = (ast.FunctionDef, ast.ClassDef)
        defined = [node for node in ast.walk(tree) if isinstance(node, nodes)]
        lines = sum(node.end_lineno - node.lineno + 1 for node in defined)
        assert lines <= LONGEST_DEFINITION, f"belongs in the library:\n{source}"


@pytest.mark.parametrize("name", NAMES)
def test_its_first_cells_bring_a_reader_from_colab(name):
    first, *rest = sources(name, "markdown")
    place = f"{REPOSITORY.removeprefix('https://')}/blob/main/notebooks/{name}.ipynb"
    badge = "https://colab.research.google.com/assets/colab-badge.svg"
    opens = f"https://colab.research.google.com/{place.replace('github.com', 'github')}"
    assert first.startswith("# ") and f"[![Open in Colab]({badge})]({opens})" in first
    # All notebooks get the project in the same way.
    setup = sources(name, "code")[0]
    assert setup == sources(NAMES[0], "code")[0]
    assert REPOSITORY in setup
    url = re.search(r'\burl="([^"]*)"', (ROOT / "setup.py").read_text())
    assert url is None or url[1] == REPOSITORY


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name):
    text = "\n".join(sources(name, "markdown"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            assert (notebooks.FOLDER / target.partition("#")[0]).exists(), target
    folders = "configs|docs|experiments|lightning_jax|notebooks"
    for path in re.findall(rf"`((?:{folders})/[^`*]*)`", text):
        assert (ROOT / path).exists(), path
