"""Against `transformers` itself: families without stored outputs, and files that we write."""

import dataclasses

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.interop import hf
from lightning_jax.runtime.files import read_json
from tests.interop.hf import parity
from tests.tiny import tiny_model

torch = pytest.importorskip("torch", reason="torch is not installed (extra: peers)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tests.interop.hf import make_fixture  # noqa: E402

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=4,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def olmoe():
    config = transformers.OlmoeConfig(
        **SMALL, intermediate_size=24, num_experts=8, num_experts_per_tok=3, rms_norm_eps=1e-5
    )
    return transformers.OlmoeForCausalLM, config


def gpt_oss():
    config = transformers.GptOssConfig(
        **SMALL,
        intermediate_size=24,
        head_dim=8,
        num_local_experts=8,
        num_experts_per_tok=3,
        sliding_window=8,
        # Small enough that random weights reach it.
        swiglu_limit=0.7,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "beta_fast": 4.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    )
    return transformers.GptOssForCausalLM, config


def llama3():
    config = transformers.LlamaConfig(
        **SMALL,
        intermediate_size=48,
        attention_bias=True,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    return transformers.LlamaForCausalLM, config


SEEDS = {olmoe: 0, gpt_oss: 0, llama3: 0}


@pytest.fixture(scope="module", params=SEEDS, ids=lambda make: make.__name__)
def fixture(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    make_fixture.make(*request.param(), folder, SEEDS[request.param])
    return parity.Fixture.open(folder)


@pytest.mark.slow
def test_forward_and_routing(fixture):
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


OFF_BY_ONE_NOTCH = {
    "olmoe": [{"moe__renormalize_gates": True}, {"attention__qk_norm": "none"}],
    "gpt_oss": [
        {"attention__window": 9},
        {"moe__clamp": 0.8},
        {"attention__sinks": False},
        {"moe__renormalize_gates": False},
    ],
    "llama": [{"norm_eps": 1e-4}, {"attention__rope_base_global": 1100.0}],
}


@pytest.mark.slow
def test_the_check_has_teeth(fixture):
    model_type = read_json(fixture.folder / "config.json")["model_type"]
    for changes in OFF_BY_ONE_NOTCH[model_type]:
        error = np.abs(fixture.with_config(**changes).logits() - fixture.io["logits"]).max()
        assert error > 2 * parity.LOGITS, (changes, error)


NO_EXTRAS = dict(moe__num_shared_experts=0, moe__eval_routing="top_k", tie_embeddings=False)
WRITTEN = {
    "llama": dict(unit="G", num_units=3, moe__num_experts=0, attention__qk_norm="none"),
    "mixtral": dict(
        unit="L",
        num_units=2,
        attention__qk_norm="none",
        moe__renormalize_gates=True,
        **NO_EXTRAS,
    ),
    "qwen3_moe": dict(unit="GG", unit_mlp="DE", num_units=2, **NO_EXTRAS),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", WRITTEN)
def test_transformers_reads_what_we_write(model_type, tmp_path):
    config = tiny_model(96, **WRITTEN[model_type])
    # Fresh weights are too quiet for an error to show.
    params = jax.tree.map(lambda p: p * 1.5, lm.init_params(config, jax.random.key(0)))
    assert hf.save(tmp_path, config, params, model_type=model_type) == model_type
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens)).logits.numpy()
    got = lm.LightningLM(config).apply({"params": params}, tokens).logits()
    np.testing.assert_allclose(got, want, atol=3e-4)
    assert np.abs(want).max() > 0.1
    again = hf.load(tmp_path)
    assert dataclasses.replace(again.config, scan=config.scan).layers == config.layers
