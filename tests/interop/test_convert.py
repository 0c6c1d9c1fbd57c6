"""Folders of Hugging Face become runs that evaluate and train on, and runs become such folders."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import imported
from lightning_jax import model as lm
from lightning_jax.checkpoint import Checkpointer, load_run
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, to_dict
from lightning_jax.interop import convert, hf
from lightning_jax.interop.upcycle_run import upcycle_run
from lightning_jax.runtime.files import write_json
from lightning_jax.train import loop
from lightning_jax.train.evaluation import EvalOptions, evaluate_run
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.plan import Plan
from tests.tiny import tiny_model, tiny_run, write_corpus

VOCAB = 272


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A corpus, a dense model in a Hugging Face folder, and its parameters."""
    folder = tmp_path_factory.mktemp("convert")
    corpus = write_corpus(folder / "text")
    model = tiny_model(VOCAB, unit="G", num_units=2, moe__num_experts=0, attention__qk_norm="none")
    params = lm.init_params(model, jax.random.key(3))
    assert hf.save(folder / "hf", model, params) == "llama"
    return folder, corpus, params


def run_config(home):
    """A tiny run of the folder's model."""
    folder, corpus, _ = home
    return dataclasses.replace(tiny_run(corpus), model=convert.describe(folder / "hf")[0])


@pytest.mark.slow
def test_from_hugging_face_to_training_and_back(home, tmp_path):
    folder, _, params = home
    config = run_config(home)
    summary = convert.from_hugging_face(folder / "hf", tmp_path / "run", config)
    assert summary["model_type"] == "llama" and summary["layers"] == "GG"
    run = load_run(tmp_path / "run")
    assert run.meta.step == 0
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    before = evaluate_run(str(tmp_path / "run"), EvalOptions(max_tokens=256))["domains"]["a"][
        "loss"
    ]

    back = convert.to_hugging_face(tmp_path / "run", tmp_path / "back")
    assert back["model_type"] == "llama" and back["step"] == 0
    assert back["weights"] == "params" and back["tokenizer"].startswith("tokenizer.json: bytes")
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"]
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "back").params, params)

    assert convert.describe(tmp_path / "run")[0] == config.model
    loop.run(config, tmp_path / "run")
    first = next(row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row)
    # A fresh model would start elsewhere: its loss is near log(vocabulary).
    assert abs(first["loss"] - before) < 0.5
    assert load_run(tmp_path / "run").meta.step == Plan.of(config).total_steps
    with pytest.raises(UserError, match="is not empty"):
        convert.from_hugging_face(folder / "hf", tmp_path / "run", config)


def test_another_model_does_not_begin_with_these_weights(home, tmp_path):
    folder, corpus, _ = home
    convert.from_hugging_face(folder / "hf", tmp_path, run_config(home))
    with pytest.raises(UserError, match="model.vocab_size = 272|model.unit = 'LG'"):
        loop.run(tiny_run(corpus), tmp_path)


def test_the_config_of_a_folder(home, tmp_path):
    folder, _, _ = home
    config = build(RunConfig, imported.get_config(str(folder / "hf")))
    assert config.model.unit == "G" and config.model.num_units == 2
    convert.from_hugging_face(folder / "hf", tmp_path, run_config(home))
    assert build(RunConfig, imported.get_config(str(tmp_path))).model == config.model
    with pytest.raises(UserError, match="imported.py:FOLDER"):
        imported.get_config()
    with pytest.raises(UserError, match="no such file"):
        imported.get_config(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_bfloat16_files_are_half_as_large(home, tmp_path):
    folder, _, _ = home
    convert.from_hugging_face(folder / "hf", tmp_path / "run", run_config(home))
    convert.to_hugging_face(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    sizes = [
        (path / "model.safetensors").stat().st_size for path in (folder / "hf", tmp_path / "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    own = convert.to_hugging_face(tmp_path / "run", tmp_path / "own", model_type="lightning")
    assert own["model_type"] == "lightning"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "half" / name).read_bytes()
    assert hf.load(tmp_path / "own").config.unit == "G"
    with pytest.raises(UserError, match="not the folder of a run"):
        convert.to_hugging_face(tmp_path / "half", tmp_path / "x")


@pytest.mark.slow
def test_upcycling_prints_the_loss_of_both(home, tmp_path):
    folder, corpus, _ = home
    config = tiny_run(
        corpus,
        model__unit="G",
        model__num_units=2,
        model__attention__qk_norm="none",
        model__moe__num_experts=6,
        model__moe__num_groups=1,
        model__moe__top_k=3,
        model__moe__max_experts=3,
        model__moe__num_shared_experts=0,
        model__moe__target_experts=0.0,
        model__moe__train_routing="top_k",
        model__moe__eval_routing="top_k",
        model__moe__renormalize_gates=True,
    )
    result = upcycle_run(folder / "hf", tmp_path / "up", config, max_tokens=512)
    assert result["exact"]
    assert set(result["loss"]) == {"a", "b"}
    for row in result["loss"].values():
        assert abs(row["jump"]) < 1e-4 and row["before"] > 3
    origin = json.loads((tmp_path / "up" / "run.json").read_text())["origin"]
    assert origin["pool"] == "mean"
    loop.run(config, tmp_path / "up")
    first = next(row for row in read_rows(tmp_path / "up" / "metrics.jsonl") if "loss" in row)
    assert abs(first["loss"] - result["loss"]["a"]["after"]) < 0.5


DENSE = dict(
    model__unit="G",
    model__num_units=2,
    model__attention__qk_norm="none",
    model__moe__num_experts=0,
    model__moe__target_experts=0.0,
    model__moe__train_routing="top_k",
    model__moe__eval_routing="top_k",
)
# The last stage of `tiny_run` has this base, its model another.
BASE = 50_000.0


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write_run(workdir, config, params, router=None, steps=None):
    """The folder of a run after `steps` steps (None: all of them), without the training."""
    meta = Plan.of(config).meta(Plan.of(config).total_steps if steps is None else steps)
    router = lm.init_router(config.model) if router is None else router
    with Checkpointer(workdir, keep=1) as checkpointer:
        items = {"params": params, "router": router}
        checkpointer.save(meta.step, items, None, to_dict(meta))
    write_json(workdir / "config.json", to_dict(config))


def bases(workdir, tmp_path):
    """The RoPE base of the model, by every way to read a run."""
    convert.to_hugging_face(workdir, tmp_path / "out")
    return {
        "load_run": load_run(workdir).model,
        "load_any": convert.load_any(workdir).config,
        "describe": convert.describe(workdir)[0],
        "imported": build(RunConfig, imported.get_config(str(workdir))).model,
        "hf": hf.load(tmp_path / "out").config,
        "hf through imported": build(RunConfig, imported.get_config(str(tmp_path / "out"))).model,
    }


# Case A7
def test_the_base_of_a_stage_is_that_of_the_weights_everywhere(home, tmp_path):
    _, corpus, params = home
    config = tiny_run(corpus, **DENSE)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=VOCAB))
    assert config.model.attention.rope_base_global != BASE
    write_run(tmp_path / "run", config, params)
    for way, model in bases(tmp_path / "run", tmp_path).items():
        assert model.attention.rope_base_global == BASE, way


def test_imported_weights_keep_their_base_in_a_first_stage_with_another(home, tmp_path):
    folder, corpus, params = home
    stages = tiny_run(corpus, **DENSE).stages
    config = dataclasses.replace(run_config(home), stages=(stages[1], stages[0]))
    own = config.model.attention.rope_base_global
    assert stages[1].rope_base_global == BASE != own
    convert.from_hugging_face(folder / "hf", tmp_path / "run", config)
    for way, model in bases(tmp_path / "run", tmp_path).items():
        assert model.attention.rope_base_global == own, way


@pytest.mark.slow
def test_every_way_to_load_gives_what_training_evaluated(home, tmp_path, caplog):
    _, corpus, _ = home
    config = tiny_run(corpus, **DENSE)
    results = loop.run(config, tmp_path / "run")
    again = evaluate_run(str(tmp_path / "run"), EvalOptions())["domains"]
    losses = {name: row["loss"] for name, row in results.items()}
    assert {name: row["loss"] for name, row in again.items()} == pytest.approx(losses, abs=1e-6)

    run = load_run(tmp_path / "run")
    tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
    options = {"router": run.router, "rope_base_global": BASE}
    apply = lm.LightningLM(run.config.model).apply
    want = apply({"params": run.params}, tokens, **options).logits()
    convert.to_hugging_face(tmp_path / "run", tmp_path / "out")
    for loaded in (
        (run.model, run.params, run.router),
        convert.load_any(tmp_path / "run"),
        hf.load(tmp_path / "out"),
        convert.load_any(tmp_path / "out"),
    ):
        model, params, router = loaded
        got = lm.LightningLM(model).apply({"params": params}, tokens, router=router).logits()
        np.testing.assert_allclose(got, want, atol=1e-5)

    up = upcycle_run(tmp_path / "run", tmp_path / "same", with_base(config, BASE), max_tokens=0)
    assert up["exact"] and not caplog.records
    assert {name: row["before"] for name, row in up["loss"].items()} == pytest.approx(
        losses, abs=1e-5
    )
    up = upcycle_run(tmp_path / "run", tmp_path / "other", config, max_tokens=0)
    assert not up["exact"] and "the source was trained with 50000" in caplog.text


def with_base(config, base):
    attention = dataclasses.replace(config.model.attention, rope_base_global=base)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))


# Case A7: the command that raises the base resumes the run whose base it has raised.
@pytest.mark.slow
def test_a_config_of_the_folder_resumes_what_it_trained(home, tmp_path):
    folder, corpus, _ = home

    def config():
        tiny = tiny_run(corpus, **DENSE)
        model = build(RunConfig, imported.get_config(str(tmp_path / "run"))).model
        stage = dataclasses.replace(tiny.stages[0], rope_base_global=BASE)
        return dataclasses.replace(tiny, model=model, stages=(stage,))

    convert.from_hugging_face(folder / "hf", tmp_path / "run", run_config(home))
    first = loop.run(config(), tmp_path / "run")
    assert load_run(tmp_path / "run").model.attention.rope_base_global == BASE
    assert loop.run(config(), tmp_path / "run")["a"]["loss"] == first["a"]["loss"]


# Case A8, A6: what the lightning layout holds beside the parameters.
@pytest.mark.slow
def test_a_round_trip_keeps_every_bit_and_the_router(home, tmp_path):
    _, corpus, _ = home
    config = tiny_run(corpus)
    model = dataclasses.replace(config.model, vocab_size=VOCAB)
    config = dataclasses.replace(config, model=model)
    params, fresh = lm.init_params(model, jax.random.key(1)), lm.init_router(model)
    bias = jax.random.normal(jax.random.key(2), fresh.bias_URE.shape)
    router = lm.Router(bias, jax.numpy.float32(0.3137))
    write_run(tmp_path / "run", config, params, router)
    summary = convert.to_hugging_face(tmp_path / "run", tmp_path / "out")
    assert summary["model_type"] == "lightning"
    config = dataclasses.replace(config, model=convert.describe(tmp_path / "out")[0])
    convert.from_hugging_face(tmp_path / "out", tmp_path / "back", config)
    back = load_run(tmp_path / "back")
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    jax.tree.map(np.testing.assert_array_equal, back.router, router)
    assert back.model.attention.rope_base_global == BASE
    origin = json.loads((tmp_path / "back" / "run.json").read_text())["origin"]
    assert origin == {"path": str(tmp_path / "out"), "model_type": "lightning"}


def broken(params):
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(np.nan), params)


# Case A13: a refused command leaves no trace, and the next try works.
@pytest.mark.parametrize("exists", [False, True])
def test_a_refused_conversion_from_hugging_face_leaves_no_trace(exists, home, tmp_path):
    folder, _, _ = home
    config, target = run_config(home), tmp_path / "runs" / "run"
    if exists:
        target.mkdir(parents=True)
    before = tree(tmp_path)
    small = dataclasses.replace(config.data, tokenizer="bpe:100000")
    for source, run, message in (
        (folder / "nothing", config, "no such file"),
        (folder / "hf", dataclasses.replace(config, data=small), "bpe|vocab_size"),
    ):
        with pytest.raises(UserError, match=message):
            convert.from_hugging_face(source, target, run)
        assert tree(tmp_path) == before
    with pytest.raises(UserError, match="kv_source"):
        convert.from_hugging_face(folder / "hf", target, config, kv_source=(1, 0))
    assert tree(tmp_path) == before
    convert.from_hugging_face(folder / "hf", target, config)
    assert load_run(target).meta.step == 0 and len(list(target.parent.iterdir())) == 1


def test_a_refused_export_leaves_no_trace(home, tmp_path):
    _, corpus, params = home
    config = tiny_run(corpus, **DENSE)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=VOCAB))
    write_run(tmp_path / "bad", config, broken(params))
    write_run(tmp_path / "run", config, params)
    before = tree(tmp_path)
    for workdir, options, message in (
        ("nothing", {}, "no such file"),
        ("run", {"step": 3}, "step 3 is not among"),
        ("run", {"model_type": "lama"}, 'did you mean "llama"'),
        (
            "run",
            {"model_type": "gpt_oss"},
            "the gpt_oss layout has no such model .*num_local_experts",
        ),
        ("bad", {}, "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            convert.to_hugging_face(tmp_path / workdir, tmp_path / "a" / "out", **options)
        assert tree(tmp_path) == before
    with pytest.raises(UserError, match="path = .*is not empty"):
        convert.to_hugging_face(tmp_path / "run", tmp_path / "bad")
    assert tree(tmp_path) == before
    convert.to_hugging_face(tmp_path / "run", tmp_path / "a" / "out")
    hf.load(tmp_path / "a" / "out")


# Cases A13, D1
def test_a_refused_upcycling_leaves_no_trace(home, tmp_path):
    folder, corpus, params = home
    config = tiny_run(corpus, **DENSE)
    resolved = dataclasses.replace(config.model, vocab_size=VOCAB)
    write_run(tmp_path / "bad", dataclasses.replace(config, model=resolved), broken(params))
    before = tree(tmp_path)
    wide = dataclasses.replace(config, model=dataclasses.replace(config.model, model_dim=64))
    nowhere = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, sources=(dataclasses.replace(config.data.sources[0], path="no/*.jsonl"),)
        ),
        stages=tuple(dataclasses.replace(stage, mixture=(("a", 1.0),)) for stage in config.stages),
    )
    for source, run, message in (
        (tmp_path / "bad", config, "not finite"),
        (folder / "hf", wide, "model.model_dim = 64"),
        (folder / "hf", nowhere, "no/"),
        (folder, config, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            upcycle_run(source, tmp_path / "up", run)
        assert tree(tmp_path) == before
