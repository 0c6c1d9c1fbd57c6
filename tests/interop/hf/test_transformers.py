"""Against `transformers` itself: families without stored outputs, and files that we write."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.interop import hf
from lightning_jax.interop.hf.config import read_config
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


def logits(folder, tokens):
    config, params, router = hf.load(folder)
    return np.asarray(
        lm.LightningLM(config).apply({"params": params}, tokens, router=router).logits()
    )


def random_model(model_class, config):
    config._experts_implementation = "eager"
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    make_fixture._draw(model, 0)
    return model


def reads(folder, model_class, tokens):
    theirs = model_class.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        return theirs(torch.tensor(tokens)).logits.numpy()


ROUTED = {
    "Mixtral": dict(intermediate_size=24, num_local_experts=4, sliding_window=8),
    "Qwen3Moe": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        num_experts=4,
        mlp_only_layers=[0],
        head_dim=8,
        norm_topk_prob=True,
    ),
    "Olmoe": dict(intermediate_size=24, num_experts=4),
    "Dots1": dict(
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    ),
    "GptOss": dict(intermediate_size=24, num_local_experts=4, head_dim=8, sliding_window=8),
}


# Case E1
@pytest.mark.slow
@pytest.mark.parametrize("name", ROUTED)
def test_both_layouts_of_experts_that_transformers_writes(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**SMALL, num_experts_per_tok=2, **ROUTED[name])
    model_class = getattr(transformers, f"{name}ForCausalLM")
    model = random_model(model_class, config)
    tokens = np.random.default_rng(0).integers(3, 96, (2, 40))
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    for original in (True, False):
        folder = tmp_path / str(original)
        model.save_pretrained(folder, save_original_format=original)
        np.testing.assert_allclose(logits(folder, tokens), want, atol=3e-4)
    # What they read back of the stacked layout is the same model, so the file is theirs.
    np.testing.assert_allclose(reads(folder, model_class, tokens), want, atol=1e-5)


# Cases E1, E2: a file with the head alone, and one of the model below the head.
@pytest.mark.slow
@pytest.mark.parametrize("what", ["lone head", "base model"])
def test_tied_files_that_transformers_reads(what, tmp_path):
    from safetensors.torch import load_file, save_file

    model = random_model(*llama3())
    model.tie_weights()
    tokens = np.random.default_rng(0).integers(3, 96, (2, 40))
    with torch.no_grad():
        want = model(torch.tensor(tokens)).logits.numpy()
    (model if what == "lone head" else model.model).save_pretrained(tmp_path)
    if what == "lone head":
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_allclose(
        reads(tmp_path, transformers.LlamaForCausalLM, tokens), want, atol=1e-5
    )
    np.testing.assert_allclose(logits(tmp_path, tokens), want, atol=3e-4)


LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
ROPES = [
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_scaling": None},
    {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_theta": 700.0}},
    {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": LLAMA3},
    {"rope_scaling": {"rope_type": "linear", "type": "llama3", "factor": 2}},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    {"rope_scaling": YARN, "rope_theta": 500.0},
    {"rope_scaling": YARN | {"beta_fast": 8, "beta_slow": 2, "truncate": False}},
    {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}},
    {"rope_scaling": YARN | {"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    {"rope_scaling": dict(rope_type="yarn", factor=4.0)},
]


# Case E3: the same angles as the reference library reads from the same file.
@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: json.dumps(rope)[:60])
def test_spellings_of_rope_mean_what_transformers_reads(rope, tmp_path):
    described = {
        "model_type": "llama",
        **{key: value for key, value in SMALL.items() if not key.endswith("_id")},
        "hidden_size": 64,
        "intermediate_size": 8,
        **rope,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    positions = np.arange(200)[None]
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1, 1, 1), torch.tensor(positions))
    attention = read_config(json.loads((tmp_path / "config.json").read_text())).attention
    ours = lm._rope_table(attention, positions, attention.rope_base_global)
    for got, want in zip(ours, (sin, cos), strict=True):
        want = want.numpy()[..., : got.shape[-1]]
        np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=2e-5)
