import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.kernels import common


def test_a_row_that_sees_nothing_sums_to_exactly_zero():
    hidden, floor = (jnp.float32(x) for x in (common.HIDDEN, common.FLOOR))
    for factor in (1.0, 1e-3, common.LOG2_E * 50.0):
        assert jnp.exp2(hidden * factor - floor * factor) == 0
    # A score added to a hidden pair does not show it.
    assert jnp.exp(hidden + 1e6 - floor) == 0


def test_products_are_float32_sums_over_the_named_axes():
    left, right = np.arange(6.0).reshape(2, 3), np.arange(12.0).reshape(4, 3)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = common.dot(jnp.asarray(left, dtype), jnp.asarray(right, dtype), (1, 1))
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, left @ right.T)


def test_sink_gradient_is_the_share_of_the_sink_times_delta():
    sinks, delta = jnp.array([0.5, -1.0], jnp.bfloat16), jnp.array([[[1.0, 2.0], [3.0, 0.0]]])
    lse = jnp.array([[[1.0, 2.0], [0.0, 5.0]]])
    found = common.sink_gradient(sinks, lse, delta)
    exact = -(np.exp(np.array([[0.5], [-1.0]])) / 2.0 ** np.array(lse[0]) * delta[0]).sum(1)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, 1e-2)
    assert common.sink_gradient(None, lse, delta) is None


ONE, INT8 = jnp.ones((1, 2, 4, 16)), jnp.ones((1, 2, 4, 16), jnp.int8)


@pytest.mark.parametrize(
    "check, arguments, message",
    [
        (common.check_band, (4, 4, 0, 0), "window=0"),
        (common.check_band, (4, 3, None, -1), "query_offset=-1"),
        (common.check_band, (4, 5, None, 2), "4 queries for 5 keys: at query_offset=2 .* 6 keys"),
        (common.check_dtypes, ((ONE, INT8), (jnp.float32, jnp.int8)), "float32, int8: must all"),
        (common.check_dtypes, ((ONE,), (jnp.bfloat16,)), "float32: must all be the same, bfloat16"),
        (common.check_scores, (0.0, None), r"scale=0\.0"),
        (common.check_scores, (1.0, -2.0), r"logit_softcap=-2\.0"),
        (common.check_head_size, (48, (16, 32)), "head size 48: must be one of 16, 32"),
        (common.check_rows, (5, 4, 19), "5 queries of 4 heads: at most 19"),
        (common.check_cache, (ONE, (ONE, INT8), (None, None)), "value cache of int8 without"),
        (common.check_cache, (ONE, (ONE, ONE), (ONE, ONE)), "key cache of float32 with scales"),
    ],
)
def test_bad_arguments_are_named_with_the_kernel(check, arguments, message):
    with pytest.raises(ValueError, match=f"kernel: .*{message}"):
        check("kernel", *arguments)


def test_good_arguments_pass():
    for check, arguments in (
        (common.check_band, (4, 6, 1, 2)),
        (common.check_dtypes, ((ONE, ONE), (jnp.float32, jnp.bfloat16))),
        (common.check_scores, (0.5, 2.0)),
        (common.check_head_size, (64, common.TRITON_HEAD_SIZES)),
        (common.check_rows, (5, 4, 20)),
        (common.check_cache, (ONE, (INT8, ONE), (ONE, None))),
    ):
        check("kernel", *arguments)
