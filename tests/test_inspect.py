"""A folder of Hugging Face and the folder of a run open as what reads text."""

import jax
import numpy as np
import pytest

import lightning_jax
from lightning_jax import model as lm
from lightning_jax.config.errors import UserError
from lightning_jax.interop import hf
from tests.data import hf_folders
from tests.infer.random_run import save_run
from tests.tiny import tiny_model, tiny_run

pytestmark = pytest.mark.usefixtures("one_device")
TEXT = "the cat sat on a mat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model with a tokenizer, as Hugging Face lays them out."""
    folder = tmp_path_factory.mktemp("hf")
    model = tiny_model(304, unit="G", num_units=2, moe__num_experts=0, attention__qk_norm="none")
    hf.save(folder, model, lm.init_params(model, jax.random.key(3)))
    hf_folders.byte_level(folder, ["<|end|>"])
    hf_folders.write_json(folder / "tokenizer_config.json", {"eos_token": "<|end|>"})
    return folder


def test_a_hugging_face_folder_opens_with_its_tokenizer(folder):
    found = lightning_jax.inspect.open(folder)
    model, params, router = hf.load(folder)
    ids = found.encode(TEXT)
    assert found.tokenizer.decode(ids) == TEXT and len(ids) < len(TEXT)
    output = lm.LightningLM(model).apply({"params": params}, np.array([ids]), router=router)
    np.testing.assert_allclose(found.logits(TEXT), output.logits()[0], atol=1e-5)
    maps = found.attention(TEXT, layers=[1])
    assert maps.probs_LNTS.shape == (1, 4, len(ids), len(ids))
    np.testing.assert_allclose(maps.probs_LNTS.sum(-1), 1, atol=1e-5)
    assert "".join(maps.pieces) == TEXT


def test_a_run_opens_as_a_run(tmp_path):
    step = save_run(tmp_path, tiny_run("unread", model__vocab_size=272))
    found = lightning_jax.inspect.open(tmp_path)
    assert isinstance(found, lightning_jax.Run) and found.step == step


def test_what_is_no_model_is_refused(folder, tmp_path):
    for path in (tmp_path, tmp_path / "none", __file__):
        with pytest.raises(UserError, match="path = .*: must be the folder of a run, or one of"):
            lightning_jax.inspect.open(path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="must have a tokenizer beside its weights"):
        lightning_jax.inspect.open(tmp_path)
