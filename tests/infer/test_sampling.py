import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.infer.sampling import Sampling, sample

LOGITS_V = np.log([0.5, 0.25, 0.15, 0.1])
DRAWS = 4000  # of every test: one shape and few settings, so that little is compiled


@functools.partial(jax.jit, static_argnames=("valid_vocab",))
def _sample(logits_BV, key, temperature=1.0, top_k=0, top_p=1.0, valid_vocab=None):
    rows = logits_BV.shape[0]
    return sample(
        logits_BV,
        jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows)),
        temperature_B=jnp.full(rows, temperature, jnp.float32),
        top_k_B=jnp.full(rows, top_k, jnp.int32),
        top_p_B=jnp.full(rows, top_p, jnp.float32),
        valid_vocab=valid_vocab or logits_BV.shape[1],
    )


def _frequencies(logits_V, **how):
    logits_BV = np.tile(np.asarray(logits_V, np.float32)[None], (DRAWS, 1))
    tokens_B = np.asarray(_sample(logits_BV, jax.random.key(0), **how))
    return np.bincount(tokens_B, minlength=len(logits_V)) / DRAWS


@pytest.mark.parametrize(
    "how, expected",
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, np.array([0.25, 0.0625, 0.0225, 0.01]) / 0.345),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.6}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.4}, [1, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0]),
        # The nucleus is that of the distribution which top_k leaves: 2/3 reaches 0.6 alone.
        ({"top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),
        ({"valid_vocab": 2}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(how, expected):
    measured = _frequencies(LOGITS_V, **how)
    np.testing.assert_allclose(measured, expected, atol=0.03)
    np.testing.assert_array_equal(measured == 0, np.asarray(expected) == 0)


def test_order_of_the_vocabulary_does_not_matter():
    shuffled = _frequencies(LOGITS_V[[2, 0, 3, 1]], top_p=0.6)
    np.testing.assert_allclose(shuffled, [0, 2 / 3, 0, 1 / 3], atol=0.03)


def test_greedy_takes_the_first_of_equals_and_ignores_the_key():
    logits_BV = np.array([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    for seed in range(3):
        tokens_B = _sample(logits_BV, jax.random.key(seed), temperature=0.0)
        np.testing.assert_array_equal(tokens_B, [1, 0])


@pytest.mark.parametrize("how", [{"top_k": 2}, {"top_p": 0.4}])
def test_ties_at_the_cut_go_to_lower_ids(how):
    assert set(np.flatnonzero(_frequencies([0.0, 0.0, 0.0, 0.0], **how))) == {0, 1}


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {}, {"top_k": 3, "top_p": 0.9}])
def test_padding_rows_of_the_embedding_are_never_drawn(how):
    frequencies = _frequencies([0.0, 0.0, 50.0, 50.0], valid_vocab=2, **how)
    assert frequencies[2:].sum() == 0


def test_a_row_depends_on_the_key_its_place_and_its_logits_alone():
    logits_BV = np.random.default_rng(0).normal(size=(DRAWS, 4)).astype(np.float32)
    key = jax.random.key(2)
    whole_B = np.asarray(_sample(logits_BV, key))
    np.testing.assert_array_equal(whole_B, _sample(logits_BV, key))
    np.testing.assert_array_equal(whole_B[:3], _sample(logits_BV[:3], key))
    changed_BV = np.concatenate([-logits_BV[:1], logits_BV[1:]])
    np.testing.assert_array_equal(whole_B[1:], _sample(changed_BV, key)[1:])
    assert (whole_B != _sample(logits_BV, jax.random.key(3))).any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("how", [{}, {"top_p": 0.6}, {"top_k": 2}])
def test_extreme_logits_stay_in_range(scale, how):
    logits_BV = np.random.default_rng(0).normal(size=(DRAWS, 4)).astype(np.float32) * scale
    tokens_B = np.asarray(_sample(logits_BV.astype(np.float32), jax.random.key(0), **how))
    assert tokens_B.dtype == np.int32
    assert ((tokens_B >= 0) & (tokens_B < 4)).all()
    if scale > 1:
        np.testing.assert_array_equal(tokens_B, logits_BV.argmax(axis=-1))


def test_the_lowest_temperature_is_greedy_where_logits_differ():
    np.testing.assert_array_equal(_frequencies(LOGITS_V, temperature=1e-4), [1, 0, 0, 0])


def test_impossible_tokens_are_not_drawn():
    frequencies = _frequencies([0.0, -np.inf, 0.0, -np.inf], top_p=0.6)
    np.testing.assert_array_equal(frequencies == 0, [False, True, False, True])


def test_bfloat16_logits_are_sampled_in_float32():
    logits_BV = jnp.zeros((DRAWS, 4), jnp.bfloat16)
    exact_BV = np.zeros((DRAWS, 4), np.float32)
    key = jax.random.key(0)
    np.testing.assert_array_equal(_sample(logits_BV, key), _sample(exact_BV, key))


@pytest.mark.parametrize(
    "how, name",
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_bad_settings_are_named(how, name):
    with pytest.raises(UserError, match=f"^{name} = "):
        Sampling(**how)
