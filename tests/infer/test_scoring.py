from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config.errors import UserError
from lightning_jax.infer import scoring
from lightning_jax.infer.scoring import Scorer
from tests import tiny

# The head's chunk is no divisor of any bucket, and smaller than what is scored.
CONFIG = tiny.tiny_model(
    64, head_chunk=7, compute_dtype="float32", attention__rope_base_global=500.0
)
MAX_LENGTH = 40


@functools.cache
def params():
    generator = np.random.default_rng(0)

    def draw(leaf):
        noise = generator.normal(size=leaf.shape).astype(np.float32)
        return noise * 0.4 if leaf.ndim > 1 else 1 + 0.3 * noise

    return jax.tree.map(draw, lm.abstract_params(CONFIG))


def scorer(batch_size=3, **changes):
    options = dict(max_length=MAX_LENGTH, batch_size=batch_size)
    return Scorer(CONFIG, params(), lm.init_router(CONFIG), **(options | changes))


@jax.jit
def forward(weights, tokens_BT):
    return lm.LightningLM(CONFIG).apply({"params": weights}, tokens_BT).logits()


def plain(ids):
    """All logits of one row alone; causality hides the zeros after it."""
    tokens_BT = np.array([ids + [0] * (MAX_LENGTH - len(ids))], np.int32)
    return np.asarray(forward(params(), tokens_BT)[0, : len(ids)], np.float64)


def oracle(context, continuation):
    ids = [*context, *continuation][-MAX_LENGTH - 1 :]
    logits = plain(ids[:-1])[-len(continuation) :]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = logprobs[np.arange(len(continuation)), continuation]
    return picked.sum(), bool((logits.argmax(-1) == continuation).all())


def random_pairs(lengths):
    generator = np.random.default_rng(1)
    return [
        tuple(generator.integers(0, 64, size).tolist() for size in pair_lengths)
        for pair_lengths in lengths
    ]


# One token; longer than the window; longer than MAX_LENGTH; a continuation that fills it.
PAIRS = random_pairs([(1, 1), (30, 3), (5, 12), (60, 4), (3, 40), (11, 1), (2, 2)])


def assert_scores(found, expected):
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], atol=2e-4)
    assert [g for _, g in found] == [g for _, g in expected]


@pytest.mark.slow
def test_scores_are_those_of_a_plain_forward_in_order():
    greedy = list(PAIRS[1][0])
    for _ in range(3):
        greedy.append(int(plain(greedy)[-1].argmax()))
    pairs = [*PAIRS, (greedy[:-3], greedy[-3:])]
    expected = [oracle(*pair) for pair in pairs]
    assert [is_greedy for _, is_greedy in expected].count(True) == 1
    counts = []
    assert_scores(scorer().score(pairs, advance=counts.append), expected)
    assert sum(counts) == len(pairs)


@pytest.mark.slow
def test_a_score_does_not_depend_on_the_batch():
    together = scorer().score(PAIRS)
    assert_scores(scorer().score(PAIRS[::-1])[::-1], together)
    assert_scores([scorer().score([pair])[0] for pair in PAIRS[:4]], together[:4])


@pytest.mark.slow
def test_continuations_of_one_context_share_a_forward(monkeypatch):
    context = PAIRS[5][0]
    pairs = [(context, [token]) for token in range(64)]
    calls = []
    score = scoring._score
    monkeypatch.setattr(scoring, "_score", lambda *args: calls.append(args) or score(*args))
    found = scorer().score(pairs)
    # 64 tokens to score from a row of 32: two rows, one batch.
    assert len(calls) == 1
    assert np.exp([logprob for logprob, _ in found]).sum() == pytest.approx(1, abs=1e-5)
    assert [is_greedy for _, is_greedy in found].count(True) == 1
    assert_scores(found[:5], scorer().score(pairs[:5]))


def test_an_empty_continuation_is_certain():
    assert scorer().score([([1], [])]) == [(0.0, True)]
    assert scorer().score([]) == []


@pytest.mark.slow
def test_few_shapes_compile():
    before = scoring._score._cache_size()
    for length in range(1, 60, 3):
        scorer().score(random_pairs([(length, 2), (1, 1)]))
    # 32 and 48; what MAX_LENGTH cuts off has no shape of its own.
    assert scoring._score._cache_size() - before <= 2


@pytest.mark.parametrize(
    ("pair", "field"),
    [
        (([], [1]), r"pairs\[0\] context"),
        (([64], [1]), r"pairs\[0\]"),
        (([1], [-1]), r"pairs\[0\]"),
        (([1], [1] * 41), "tokens of continuation 0"),
    ],
)
def test_bad_pairs_are_refused(pair, field):
    with pytest.raises(UserError, match=f"^{field} = "):
        scorer().score([pair])


@pytest.mark.parametrize("field", ["max_length", "batch_size"])
def test_bad_sizes_are_refused(field):
    with pytest.raises(UserError, match=f"^{field} = 0"):
        scorer(**{field: 0})


# Case D1
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_an_error_that_names_the_weight(value):
    broken = jax.tree.map(np.array, params())
    broken["embed"]["table_VD"][5] = value
    made = scorer()
    made._model = (CONFIG, broken, *made._model[2:])
    with pytest.raises(UserError, match="scoring: params/embed/table_VD has values that are not"):
        made.score(PAIRS)
    huge = {**params(), "final_norm": {"scale": params()["final_norm"]["scale"] * 1e38}}
    made._model = (CONFIG, huge, *made._model[2:])
    with pytest.raises(UserError, match="the log-probability of pair . is not finite"):
        made.score(PAIRS)
