"""Exact matches are counted answer by answer, as greedy decoding of each text alone gives them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build
from lightning_jax.data import recall
from lightning_jax.data.recall_cells import make_cells
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer
from lightning_jax.runtime.files import read_json
from lightning_jax.train import evaluation, loop, recall_evaluation
from lightning_jax.train.evaluation import EvalOptions, Evaluator
from lightning_jax.train.metrics import read_rows
from lightning_jax.train.start import write_start
from tests.tiny import mesh_of, tiny_config, tiny_run

ONE = sharding.make_mesh(evaluation.ONE_DEVICE, jax.devices()[:1])
BYTES = ByteTokenizer()
MQAR = recall.Documents(recall.Task.parse("path", "recall:mqar,symbols=8"))
PASSKEY = recall.Documents(recall.Task.parse("path", "recall:passkey,digits=2"))


def measured(documents, greedy_step, **options):
    options = dict(dict(window=20, batch_tokens=1000, max_tokens=3000), **options)
    return recall_evaluation.evaluate_recall(greedy_step, documents, BYTES, ONE, **options)


def test_a_model_that_is_always_right_or_wrong():
    right = measured(MQAR, lambda batch: np.ones_like(batch.tokens, bool))
    assert right["task"] == "recall:mqar,longest=1000,symbols=8" and right["window"] == 20
    assert right["exact"] == 1.0
    for cell in right["cells"]:
        assert cell["exact"] == cell["token_accuracy"] == 1.0 and cell["chance"] == 0.25
        assert cell["examples"] % cell["pairs"] == 0 and cell["length"] == 20 * cell["windows"]
        # All of n answers: (n + 1) / (n + 2) in the mean, which is not certain.
        n = cell["examples"]
        expected = np.sqrt((n + 1) / (n + 2) ** 2 / (n + 3))
        assert cell["deviation"] == pytest.approx(expected)
    wrong = measured(MQAR, lambda batch: np.zeros_like(batch.tokens, bool))
    assert wrong["exact"] == 0.0 and {cell["exact"] for cell in wrong["cells"]} == {0.0}
    assert [cell["deviation"] for cell in wrong["cells"]] == pytest.approx(
        [cell["deviation"] for cell in right["cells"]]
    )


def test_an_answer_is_right_if_all_of_its_tokens_are():
    zero = ord("0")

    def knows_all_but_zeros(batch):
        return np.asarray(batch.targets) != zero

    found = measured(PASSKEY, knows_all_but_zeros, window=64, max_tokens=0)
    cells = make_cells(PASSKEY, BYTES, window=64)
    assert len(found["cells"]) == len(cells)
    for row, cell in zip(found["cells"], cells, strict=True):
        answers = [e.tokens[slice(*e.answers[0])] for e in cell.examples]
        assert row["exact"] == np.mean([zero not in answer for answer in answers])
        assert row["token_accuracy"] == np.mean([answer != zero for answer in answers])
        assert (row["length"], row["depth"]) == (cell.length, cell.depth)
    assert found["exact"] == pytest.approx(np.mean([row["exact"] for row in found["cells"]]))


def test_why_nothing_can_be_measured():
    found = measured(PASSKEY, pytest.fail, window=2)
    assert found["no_exact"] == "no text of it fits 16 windows of 2 tokens"
    assert set(found) == {"task", "window", "no_exact"}

    class Capitals:
        encode = staticmethod(lambda text: BYTES.encode(text.upper()))
        decode = staticmethod(BYTES.decode)

    found = recall_evaluation.evaluate_recall(
        pytest.fail, PASSKEY, Capitals(), ONE, window=64, batch_tokens=64
    )
    assert found["no_exact"] == "the tokenizer changes its texts"


@pytest.fixture(scope="module")
def run():
    """A dense run of recall texts with random weights: (config, params, router)."""
    config = tiny_run(
        "recall:mqar,symbols=8",
        model__vocab_size=272,
        model__moe__num_experts=0,
        model__attention__window=20,
    )
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * generator.normal(size=leaf.shape).astype(np.float32) + (leaf.ndim == 1),
        lm.abstract_params(config.model),
    )
    # So few ids have large logits that some answers are right.
    is_rare_V = ~np.isin(np.arange(272), [*b" abdfghjkl"])
    params["embed"]["table_VD"][is_rare_V] *= 0.01
    return config, params, lm.init_router(config.model)


@pytest.mark.slow
def test_packed_rows_give_what_each_text_alone_gives(run):
    config, params, router = run
    evaluator = Evaluator(config, Sources.open(config.data), BYTES, ONE)
    how = dict(seq_len=50, batch_size=4, rope_base_global=1e4, weights="params", max_tokens=2000)
    assert "recall" not in evaluator(params, router, **how)["a"]
    found = evaluator(params, router, **how, recall=True)
    assert found["a"]["recall"] == found["b"]["recall"]
    forward = jax.jit(lambda tokens: lm.LightningLM(config.model).apply(params_, tokens).logits())
    params_ = {"params": params}
    cells = make_cells(MQAR, BYTES, window=20, max_tokens=2000)
    rows = found["a"]["recall"]["cells"]
    for row, cell in zip(rows, cells, strict=True):
        right = []
        for example in cell.examples:
            # A causal model does not see the padding.
            tokens = np.pad(example.tokens, (0, 81 - len(example.tokens)))
            best = np.asarray(jnp.argmax(forward(tokens[None]), -1))[0]
            right += [
                best[start - 1 : stop - 1] == example.tokens[start:stop]
                for start, stop in example.answers
            ]
        assert row["exact"] == np.mean([all(answer) for answer in right])
        assert row["token_accuracy"] == pytest.approx(np.mean(np.concatenate(right)))
    assert max(row["token_accuracy"] for row in rows) > 0


@pytest.mark.slow
def test_a_run_that_never_saw_a_task_is_measured_on_it(run, tmp_path):
    config, params, router = run
    write_start(tmp_path / "run", config, params, router, origin={})
    options = EvalOptions(data="recall:passkey,digits=2", max_tokens=2000)
    found = evaluation.evaluate_run(str(tmp_path / "run"), options)["domains"]["data"]
    assert found["bits_per_byte"] > 0
    assert found["recall"]["task"] == "recall:passkey,longest=1000,digits=2"
    assert {cell["depth"] for cell in found["recall"]["cells"]} == {0, 0.25, 0.5, 0.75, 1}


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_a_mesh_measures_the_same():
    config = build(RunConfig, tiny_config(model__vocab_size=272, model__moe__num_experts=0))

    def measure(**sizes):
        mesh = mesh_of(**sizes)
        with jax.set_mesh(mesh):
            params = jax.jit(lambda: lm.init_params(config.model, jax.random.key(0)))()
            step = recall_evaluation.make_greedy_step(config, mesh)
            return recall_evaluation.evaluate_recall(
                lambda batch: step(params, lm.init_router(config.model), batch, 1e4),
                *(MQAR, BYTES, mesh),
                window=21,
                batch_tokens=60,
                max_tokens=500,
            )

    assert measure() == measure(data=2, tensor=2, sequence=2)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_the_last_evaluation_of_a_training_measures_and_others_do_not(run, tmp_path):
    stage = dataclasses.replace(run[0].stages[0], tokens=3 * 4 * 32, warmup_tokens=0)
    config = dataclasses.replace(
        run[0], stages=(stage,), eval_every=2, eval_tokens=500, final_eval_tokens=2000
    )
    results = loop.run(config, tmp_path / "run")
    assert read_json(tmp_path / "run" / "evaluation.json") == results
    assert results["a"]["recall"]["window"] == 20 and results["b"]["recall"]["cells"]
    evaluated = [
        row["eval"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") if "eval" in row
    ]
    assert len(evaluated) == 1 and "recall" not in evaluated[0]["a"]
