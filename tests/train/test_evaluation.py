"""Held-out loss against float64 logits, by domain and position; what an evaluation may change."""

import dataclasses
import json
import logging
import math

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.data.batch import Batch
from lightning_jax.data.mixture import eval_batches
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import ByteTokenizer
from lightning_jax.ops.balance import RoutingStats
from lightning_jax.train import evaluation
from lightning_jax.train.evaluation import EvalOptions, Evaluator
from lightning_jax.train.plan import Plan
from lightning_jax.train.start import write_start
from tests.tiny import tiny_run, write_corpus

ONE = sharding.make_mesh(evaluation.ONE_DEVICE, jax.devices()[:1])
BASES = (1e4, 50.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A dense run with random weights: (config, params, router)."""
    corpus = write_corpus(tmp_path_factory.mktemp("corpus"))
    config = tiny_run(corpus, model__vocab_size=272, model__unit="G", model__moe__num_experts=0)
    generator = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * generator.normal(size=leaf.shape).astype(np.float32) + (leaf.ndim == 1),
        lm.abstract_params(config.model),
    )
    return config, params, lm.init_router(config.model)


class Batches(list):
    """Batches with the attributes of `EvalBatches`."""

    seq_len, num_bytes, lost_bytes = 20, 10, 0


def batch(positions, mask):
    positions = np.asarray(positions, np.int32)
    return Batch(*[positions] * 4, np.asarray(mask, np.float32))


def test_buckets_cover_every_position_once():
    assert evaluation.position_buckets(8) == [(0, 8)]
    assert evaluation.position_buckets(16) == [(0, 16)]
    assert evaluation.position_buckets(300) == [(0, 16), (16, 64), (64, 256), (256, 300)]


def test_sums_are_those_of_targets_by_hand():
    batches = Batches([batch([[0, 1, 17], [0, 18, 19]], [[1, 1, 1], [1, 1, 0]])] * 2)
    nll_BT = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 99.0]])
    stats = RoutingStats(**{field.name: None for field in dataclasses.fields(RoutingStats)})
    # Two layers that use one and three experts per token.
    assigned_count_URE = np.array([[[3.0, 2.0]], [[10.0, 5.0]]])
    stats = dataclasses.replace(
        stats, assigned_count_E=assigned_count_URE, tokens=np.full((2, 1), 5.0)
    )
    row = evaluation.evaluate_batches(
        lambda _: {"nll_BT": nll_BT, "stats": stats}, batches, ONE, domain="a"
    )
    assert json.loads(json.dumps(row)) == row
    assert row["tokens"] == 10 and row["bytes"] == 10
    assert row["loss"] == pytest.approx(62 / 10)
    assert row["perplexity"] == pytest.approx(math.exp(6.2))
    assert row["bits_per_byte"] == pytest.approx(62 / math.log(2) / 10)
    assert row["loss_by_position"] == {"0-15": pytest.approx(11 / 3), "16-19": pytest.approx(10)}
    assert row["experts_by_layer"] == [1.0, 3.0] and row["experts_per_token"] == 2.0


def test_a_loss_beyond_floats_is_no_overflow():
    nll_BT = np.full((1, 2), 1e6)
    batches = Batches([batch([[0, 1]], [[1, 1]])])
    row = evaluation.evaluate_batches(
        lambda _: {"nll_BT": nll_BT, "stats": None}, batches, ONE, domain="a"
    )
    assert math.isfinite(row["perplexity"]) and "experts_per_token" not in row


def test_a_text_that_the_tokenizer_changes_has_no_bits_per_byte():
    # Case D12
    batches = Batches([batch([[0, 1]], [[1, 1]])])
    batches.lost_bytes = 4
    nll_BT = np.ones((1, 2))
    row = evaluation.evaluate_batches(
        lambda _: {"nll_BT": nll_BT, "stats": None}, batches, ONE, domain="a"
    )
    assert row["bits_per_byte"] is None and row["loss"] == 1.0
    reason = "no bits/byte: the tokenizer changes texts with 40.0% of the bytes"
    assert row["no_bits_per_byte"] == reason
    line = evaluation.one_line({"a": row, "b": {"bits_per_byte": 0.5}})
    assert line == f"held out: a 1.000 nats/token ({reason})  b 0.500 bits/byte"


def oracle(run, batches, base):
    """Mean nats of the targets, from the logits in float64."""
    config, params, _ = run

    @jax.jit
    def forward(params, tokens, *placed):
        model = lm.LightningLM(config.model)
        return model.apply({"params": params}, tokens, *placed, rope_base_global=base).logits()

    nll = tokens = 0.0
    for rows in batches:
        logits_BTV = np.asarray(
            forward(params, rows.tokens, rows.positions, rows.segment_ids), np.float64
        )
        chosen_BT = np.take_along_axis(logits_BTV, rows.targets[..., None], axis=-1)[..., 0]
        nll_BT = np.log(np.exp(logits_BTV).sum(-1)) - chosen_BT
        nll += (nll_BT * rows.loss_mask).sum()
        tokens += rows.loss_mask.sum()
    return nll / tokens


def test_the_evaluator_agrees_with_the_logits_and_compiles_once(run, monkeypatch):
    config, params, router = run
    traced, eval_step = [], evaluation.steps.eval_step
    monkeypatch.setattr(
        evaluation.steps, "eval_step", lambda *args: traced.append(0) or eval_step(*args)
    )
    evaluator = Evaluator(config, Sources.open(config.data), ByteTokenizer(), ONE)
    shape = dict(seq_len=32, batch_size=4, max_tokens=300)
    options = dict(shape, weights="params")
    sources = Sources.open(config.data).eval
    batches = eval_batches(sources["a"], tokenizer=ByteTokenizer(), **shape)
    losses = []
    for base in BASES:
        results = evaluator(params, router, rope_base_global=base, **options)
        assert set(results) == {"a", "b"} and results["b"]["weights"] == "params"
        losses.append(results["a"]["loss"])
        assert losses[-1] == pytest.approx(oracle(run, batches, base), rel=1e-5)
    assert losses[0] != losses[1] and len(traced) == 1
    assert evaluation.one_line(results).startswith("held out: a ")


def test_a_folder_is_evaluated_at_its_own_stage_or_as_asked(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config, params, router = run
    write_start(tmp_path / "run", config, params, router, origin={})
    found = evaluation.evaluate_run(str(tmp_path / "run"), EvalOptions(max_tokens=30))
    assert found["step"] == 0 and found["routing"] == {"kind": "dense MLP"}
    evaluator = Evaluator(config, Sources.open(config.data), ByteTokenizer(), ONE)
    how = dict(seq_len=32, batch_size=4, max_tokens=300, rope_base_global=1e4, weights="params")
    assert found["domains"] == evaluator(params, router, **how) and found["weights"] == "params"
    # Weights that were imported have no text of their own: it says which one it takes.
    corpus = config.data.sources[0].path
    assert found["data"] == dict.fromkeys("ab", {"path": corpus, "split": "held out"})
    [line] = [line for line in caplog.messages if line.startswith("text ")]
    assert f"a = {corpus} (held out), b = " in line and "these weights were imported" in line
    assert "--data=FILES" in line

    text = tmp_path / "other.txt"
    text.write_text("def f(): pass\n" * 20)
    options = EvalOptions(data=str(text), seq_len=16, batch_size=2)
    caplog.clear()
    found = evaluation.evaluate_run(str(tmp_path / "run"), options)
    assert found["data"] == {"data": {"path": str(text), "split": "all"}}
    assert [m for m in caplog.messages if "text " in m] == [f"text     data = {text} (all)"]
    other = found["domains"]["data"]
    # One prediction per byte, and the end of the document.
    assert other["bytes"] == 14 * 20 and other["tokens"] == other["bytes"] + 1
    assert list(other["loss_by_position"]) == ["0-15"]


# Case D4
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_tokens=-4), r"eval.max_tokens = -4: must be in \[0, "),
        (dict(max_tokens=2**60), "eval.max_tokens = 1152921504606846976: must be in"),
        (dict(seq_len=2**31), "eval.seq_len = 2147483648: must be in"),
        (dict(seq_len=0), r"eval.seq_len = 0: must be in \[1, "),
        (dict(batch_size=0), "eval.batch_size = 0: must be in"),
        (dict(batch_size=-1), "eval.batch_size = -1: must be in"),
        (dict(step=-1), "step = -1: must be 0 or more"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    EvalOptions(max_tokens=20_000_000_000)
    with pytest.raises(UserError, match=message):
        EvalOptions(**options)


# Case D4
@pytest.mark.parametrize("batches", [[], [batch([[0, 1]], [[0, 0]])]])
def test_nothing_measured_is_an_error_and_no_perfect_score(batches):
    step = lambda _: {"nll_BT": np.zeros((1, 2)), "stats": None}  # noqa: E731
    with pytest.raises(UserError, match="nothing to measure: 'law' has no held-out tokens"):
        evaluation.evaluate_batches(step, Batches(batches), ONE, domain="law")


def test_a_text_without_bytes_has_no_bits_per_byte():
    made = Batches([batch([[0]], [[1]])])
    made.num_bytes = 0
    step = lambda _: {"nll_BT": np.ones((1, 1)), "stats": None}  # noqa: E731
    row = evaluation.evaluate_batches(step, made, ONE, domain="a")
    assert row["bits_per_byte"] is None and row["loss"] == 1.0
    assert evaluation.one_line({"a": row}) == "held out: a 1.000 nats/token"


# Case D1
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_evaluation_that_is_not_finite_is_an_error(run, tmp_path, value):
    config, params, router = run
    row = {"loss": value, "weights": "ema"}
    with pytest.raises(UserError, match="the loss of 'b' is .*with these weights .ema."):
        evaluation.require_finite({"a": {**row, "loss": 1.0}, "b": row})
    broken = jax.tree.map(np.copy, params)
    broken["units"]["0_G"]["mlp"]["up_DF"][0, 3, 4] = value
    write_start(tmp_path / "run", config, broken, router, origin={})
    with pytest.raises(UserError, match="0: params/units/0_G/mlp/up_DF has values that are not"):
        evaluation.evaluate_run(str(tmp_path / "run"), EvalOptions(max_tokens=30))


# Case D7
def test_an_evaluation_says_which_weights_it_measured(run, tmp_path):
    config, params, router = run
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        items = {"params": params, "router": router, "ema": params}
        checkpointer.save(0, items, None, to_dict(Plan.of(config).meta(0)))
    found = evaluation.evaluate_run(str(tmp_path), EvalOptions(max_tokens=30))
    assert found["weights"] == "ema" and found["domains"]["a"]["weights"] == "ema"
    assert found["domains"]["a"]["tokens"] >= 30
