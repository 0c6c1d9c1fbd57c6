"""Models that nobody here wrote give the same numbers: families of `transformers`, and their teeth.

The stored outputs lie outside of this repository; without them these tests skip.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.interop.hf import parity

FOLDER = Path(__file__).resolve().parents[3].parent / "shared" / "parity"
FAMILIES = {
    "llama_yi": None,
    "mistral_swa": None,
    "mixtral_swa": None,
    "qwen3_moe": None,
    "dots1": None,
    "x_mistral_cla2": (0, 0, 2, 2, 4, 4),
}
pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="no folder of stored transformers outputs beside the repository"
)


QUICK = "mistral_swa"


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=() if f == QUICK else pytest.mark.slow) for f in FAMILIES],
)
def fixture(request):
    return parity.Fixture.open(FOLDER / request.param, FAMILIES[request.param])


def test_hidden_states_logits_and_routing(fixture):
    parity.check_forward(fixture)


@pytest.mark.slow
def test_packed_documents(fixture):
    parity.check_packed(fixture)


@pytest.mark.slow
def test_greedy_decode_with_the_cache(fixture):
    parity.check_decode(fixture)


@pytest.mark.slow
def test_loss_and_gradients(fixture):
    parity.check_loss_and_gradients(fixture)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral_swa", {"attention__window": 15}),
        ("mistral_swa", {"attention__window": 17}),
        ("llama_yi", {"norm_eps": 1e-5}),
        ("llama_yi", {"attention__rope_base_global": 4e6}),
        ("mixtral_swa", {"attention__rope_base_local": 1.1e6}),
        ("mixtral_swa", {"moe__renormalize_gates": False}),
        ("qwen3_moe", {"moe__renormalize_gates": False}),
        ("dots1", {"moe__routed_scale": 2.4}),
        ("dots1", {"moe__router_score": "softmax"}),
    ],
)
def test_the_check_has_teeth(family, changes):
    """One notch off in one setting and the logits leave their tolerance."""
    fixture = parity.Fixture.open(FOLDER / family).with_config(**changes)
    error = np.abs(fixture.logits() - fixture.io["logits"]).max()
    assert error > 2 * parity.LOGITS, error


@pytest.mark.slow
def test_the_selection_bias_matters():
    fixture = parity.Fixture.open(FOLDER / "dots1")
    router = fixture.imported.router
    assert np.abs(np.asarray(router.bias_URE)).max() > 0
    fixture.imported = fixture.imported._replace(
        router=type(router)(router.bias_URE * 0, router.top_p)
    )
    assert np.abs(fixture.logits() - fixture.io["logits"]).max() > 2 * parity.LOGITS


@pytest.mark.slow
def test_whose_keys_a_layer_reads_matters(tmp_path):
    """Layer 1 projects keys and values by layer 0's weights instead of reading layer 0's."""
    source = FOLDER / "x_mistral_cla2"
    tensors = load_file(source / "model.safetensors")
    for name in ("k_proj", "v_proj"):
        copied = tensors[f"model.layers.0.self_attn.{name}.weight"]
        tensors[f"model.layers.1.self_attn.{name}.weight"] = copied
    save_file(tensors, tmp_path / "model.safetensors")
    for name in ("config.json", "io.npz"):
        shutil.copyfile(source / name, tmp_path / name)
    fixture = parity.Fixture.open(tmp_path, (0, 1, 2, 2, 4, 4))
    assert np.abs(fixture.logits() - fixture.io["logits"]).max() > 2 * parity.LOGITS
