import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops import attention
from lightning_jax.ops.attention import (
    IMPLEMENTATIONS,
    attention_probabilities,
    dot_product_attention,
)
from lightning_jax.ops.kernels import peers
from lightning_jax.ops.kernels.gpu import attention as gpu_attention
from lightning_jax.ops.kernels.tpu import attention as tpu_attention
from lightning_jax.ops.mask import EMPTY_POSITION, Mask
from tests.ops.kernels.dense_attention import dense_attention


def _inputs(B=2, T=6, S=6, N=4, K=2, H=8, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def _exact(query, key, value, mask, dout=None, **options):
    """Output and gradients in float64."""
    visible_BTS = np.asarray(mask.as_array(query.shape[1], key.shape[1]))
    dout = np.zeros(query.shape) if dout is None else dout
    options = {"scale": query.shape[-1] ** -0.5} | options
    return dense_attention(query, key, value, dout, visible_BTS=visible_BTS, **options)


def _positioned():
    """Two rows of a half-filled cache of 8 slots."""
    queries = jnp.array([[3, 4, 5], [0, 1, 2]])
    keys = jnp.array([[8, 1, 2, 3, 4, 5, EMPTY_POSITION, 0], [0, 1, 2] + [EMPTY_POSITION] * 5])
    return queries, keys


SEGMENTS = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 0, 0, 0, 0]])
MASKS = {
    "causal": Mask(),
    "window": Mask(window=3),
    "bidirectional": Mask(causal=False),
    "packed": Mask(None, None, SEGMENTS, SEGMENTS, window=2),
    "cache": Mask(*_positioned(), window=3),
    "last": Mask(window=3, query_offset=4),
    "packed last": Mask(None, None, SEGMENTS[:, 2:], SEGMENTS, query_offset=2),
}


def _lengths(name):
    """Queries and keys of a mask."""
    return {"cache": (3, 8), "last": (2, 6), "packed last": (4, 6)}.get(name, (6, 6))


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_reference_matches_the_dense_softmax(name, with_sinks, softcap, dtype, tolerance):
    T, S = _lengths(name)
    arrays = _inputs(T=T, S=S, dtype=dtype)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    attend = functools.partial(
        dot_product_attention, implementation="reference", logit_softcap=softcap
    )
    out = jax.jit(attend)(*arrays, MASKS[name], sinks_N=sinks)
    assert out.dtype == dtype
    expected, _ = _exact(*arrays, MASKS[name], sinks=sinks, softcap=softcap)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, tolerance, tolerance)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_probabilities_are_those_of_the_dense_softmax(name, with_sinks):
    T, S = _lengths(name)
    query, key, _ = _inputs(T=T, S=S)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    probs_BNTS = attention_probabilities(query, key, MASKS[name], sinks_N=sinks)
    # With unit vectors as values, the output of a query has the weights of the keys.
    value = jnp.broadcast_to(jnp.eye(S, key.shape[-1])[None, :, None], key.shape)
    expected_BTNH, _ = _exact(query, key, value, MASKS[name], sinks=sinks)
    found_BTNS = np.asarray(probs_BNTS).transpose(0, 2, 1, 3)
    np.testing.assert_allclose(found_BTNS, expected_BTNH[..., :S], atol=1e-5)


@pytest.mark.parametrize("name", MASKS)
def test_reference_gradients_match_differences(name):
    T, S = _lengths(name)
    arrays = [np.asarray(x, np.float64) for x in _inputs(T=T, S=S)]
    arrays.append(np.array([0.5, -1.0, 3.0, 0.0]))
    rng = np.random.default_rng(1)
    weight = rng.normal(size=arrays[0].shape)

    def loss(query, key, value, sinks):
        out = dot_product_attention(
            query, key, value, MASKS[name], sinks_N=sinks, implementation="reference"
        )
        return jnp.sum(out * jnp.asarray(weight, jnp.float32))

    def exact(arrays):
        return np.sum(_exact(*arrays[:3], MASKS[name], sinks=arrays[3])[0] * weight)

    gradients = jax.jit(jax.grad(loss, (0, 1, 2, 3)))(
        *(jnp.asarray(x, jnp.float32) for x in arrays)
    )
    _, oracle = _exact(*arrays[:3], MASKS[name], weight, sinks=arrays[3])
    for index, (gradient, known) in enumerate(zip(gradients, oracle, strict=True)):
        direction = rng.normal(size=gradient.shape)
        moved = [
            exact([x + step * direction if i == index else x for i, x in enumerate(arrays)])
            for step in (1e-5, -1e-5)
        ]
        slope = np.sum(np.asarray(gradient, np.float64) * direction)
        difference = (moved[0] - moved[1]) / 2e-5
        assert slope == pytest.approx(difference, rel=1e-4, abs=1e-4)
        assert np.sum(known * direction) == pytest.approx(difference, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("implementation", ["reference", "xla_banded"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_blind_queries_are_exactly_zero_with_zero_gradients(implementation, with_sinks):
    arrays = _inputs()
    sinks = jnp.zeros(4) if with_sinks else None
    mask = Mask(None, None, *[jnp.zeros((2, 6), jnp.int32)] * 2)

    def attend(*args):
        return dot_product_attention(
            *args[:3], mask, sinks_N=args[3], implementation=implementation
        )

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(attend, *args)
        return out, pull(jnp.ones_like(out))

    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(both(*arrays, sinks)))


def _interpreted(monkeypatch):
    """Kernels of devices that are not here run as plain JAX."""
    for module, name in (
        (tpu_attention, "sliding_window_attention"),
        (gpu_attention, "sliding_window_attention"),
        (peers, "splash_attention"),
    ):
        function = functools.partial(getattr(module, name), interpret=True)
        monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize(
    "name, implementation",
    [
        pytest.param("causal", "xla_banded", marks=pytest.mark.slow),
        pytest.param("window", "xla_banded", marks=pytest.mark.slow),
        ("packed", "xla_banded"),
        ("packed", "pallas_tpu"),
        pytest.param("packed", "pallas_gpu", marks=pytest.mark.slow),
        ("window", "splash"),
        ("packed last", "xla_banded"),
        pytest.param("packed last", "pallas_tpu", marks=pytest.mark.slow),
        pytest.param("packed last", "pallas_gpu", marks=pytest.mark.slow),
        ("last", "splash"),
    ],
)
def test_implementations_agree(name, implementation, monkeypatch):
    _interpreted(monkeypatch)
    ours = implementation != "splash"
    (T, S), mask = _lengths(name), MASKS[name]
    arrays = _inputs(T=T, S=S, H=16)
    sinks = jnp.array([0.5, -1.0, 3.0, 0.0]) if ours else None

    def outcome(implementation):
        attend = functools.partial(
            dot_product_attention, mask=mask, scale=0.7, implementation=implementation
        )
        out, pull = jax.vjp(lambda *a: attend(*a[:3], sinks_N=a[3]), *arrays, sinks)
        return jax.tree.leaves((out, pull(jnp.cos(out))))

    expected = outcome("reference")
    for left, right in zip(
        jax.jit(outcome, static_argnums=0)(implementation), expected, strict=True
    ):
        np.testing.assert_allclose(left, right, 3e-5, 3e-5)
    exact, _ = _exact(*arrays, mask, sinks=sinks, scale=0.7)
    np.testing.assert_allclose(expected[0], exact, 1e-5, 1e-5)


@pytest.mark.parametrize("implementation", ["xla_banded", "pallas_tpu", "pallas_gpu", "splash"])
def test_softcap_agrees(implementation, monkeypatch):
    _interpreted(monkeypatch)
    arrays = _inputs(H=16)
    attend = functools.partial(
        dot_product_attention, mask=Mask(window=3), scale=0.7, logit_softcap=0.5
    )
    out, expected = (
        jax.jit(functools.partial(attend, implementation=name))(*arrays)
        for name in (implementation, "reference")
    )
    np.testing.assert_allclose(out, expected, 1e-5, 1e-5)


def test_choice_follows_mask_and_length_and_is_logged_once(caplog):
    def has_loop(T, mask):
        arrays = _inputs(B=1, T=T - mask.query_offset, S=T)
        return "scan" in str(jax.make_jaxpr(dot_product_attention)(*arrays, mask))

    # Case F6: for debugging; text that a program writes is not interrupted by it.
    with caplog.at_level(logging.DEBUG, "lightning_jax.ops.attention"):
        assert has_loop(1024, Mask(window=9))
        assert has_loop(1024, Mask(window=9))
    assert [record.getMessage() for record in caplog.records] == [
        "attention: xla_banded on cpu for causal aligned queries, length 1024, window 9"
    ]
    assert caplog.records[0].levelno == logging.DEBUG
    assert not has_loop(16, Mask(window=9))
    assert has_loop(1024, Mask(window=9, query_offset=1000))
    assert not has_loop(1024, Mask(window=9, query_offset=1023))
    assert not has_loop(1024, Mask(causal=False))
    positions = jnp.arange(1024)[None]
    assert not has_loop(1024, Mask(positions, positions))


@pytest.mark.parametrize("backend, kernel", [("tpu", "pallas_tpu"), ("gpu", "pallas_gpu")])
def test_choice_follows_device(backend, kernel):
    choose = functools.partial(attention._choose, backend)
    assert choose(True, True, 64, 64, None, 64) == kernel
    assert choose(True, True, 64, 300, 100, 64) == kernel
    assert choose(False, True, 64, 64, None, 64) == "reference"
    assert choose(True, False, 64, 64, None, 64) == "reference"
    assert attention._choose("gpu", True, True, 512, 512, None, 96) == "xla_banded"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_features_that_an_implementation_lacks_are_named(implementation):
    arrays, positions = _inputs(), jnp.arange(6)[None]
    attend = functools.partial(dot_product_attention, *arrays, implementation=implementation)
    with pytest.raises(ValueError, match=f"{implementation}' cannot honour explicit positions"):
        attend(Mask(positions, positions))
    with pytest.raises(ValueError, match="causal=False"):
        attend(Mask(causal=False))
    lacks = attention._ALL - attention._KERNELS[implementation].honours
    if attention.SEGMENTS in lacks:
        with pytest.raises(ValueError, match="segments"):
            attend(MASKS["packed"])
    if attention.SINKS in lacks:
        with pytest.raises(ValueError, match="sinks"):
            attend(Mask(), sinks_N=jnp.zeros(4))
    if attention.SOFTCAP in lacks:
        with pytest.raises(ValueError, match="logit_softcap"):
            attend(Mask(), logit_softcap=1.0)
    if attention.OFFSET in lacks:
        query, *keys = arrays
        with pytest.raises(ValueError, match="query_offset"):
            dot_product_attention(
                query[:, 2:], *keys, Mask(query_offset=2), implementation=implementation
            )


def test_softcap_must_be_positive():
    with pytest.raises(ValueError, match=r"logit_softcap=0\.0"):
        dot_product_attention(*_inputs(), Mask(), logit_softcap=0.0)


def test_unknown_implementation_suggests_a_name():
    with pytest.raises(ValueError, match='one of reference, .* .did you mean "xla_banded"'):
        dot_product_attention(*_inputs(), Mask(), implementation="xla_band")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"K": 3}, "4 query heads over 3 key/value heads"),
        ({"S": 5}, "6 queries need as many keys, not 5"),
    ],
)
def test_bad_shapes_are_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        dot_product_attention(*_inputs(**change), Mask())


def test_bad_operands_are_one_line():
    query, key, value = _inputs()
    with pytest.raises(ValueError, match="four axes"):
        dot_product_attention(query[0], key, value, Mask())
    with pytest.raises(ValueError, match="expected B=1 and H=8"):
        dot_product_attention(query[:1], key, value, Mask())
    with pytest.raises(ValueError, match="value .* expected the key's shape"):
        dot_product_attention(query, key, value[..., :4], Mask())
    with pytest.raises(ValueError, match=r"sinks \(3,\)"):
        dot_product_attention(query, key, value, Mask(), sinks_N=jnp.zeros(3))
    segments = jnp.ones((2, 5), jnp.int32)
    with pytest.raises(ValueError, match=r"mask.query_segments_BT \(2, 5\)"):
        dot_product_attention(query, key, value, Mask(None, None, segments, segments))
    with pytest.raises(ValueError, match="6 queries need 8 keys at query_offset=2, not 6"):
        dot_product_attention(query, key, value, Mask(query_offset=2))
