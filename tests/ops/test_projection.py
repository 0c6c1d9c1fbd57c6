import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.ops.kernels.cpu import narrow
from lightning_jax.ops.projection import project


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_matches_the_product_of_the_rounded_operands(dtype, multiplied, monkeypatch):
    monkeypatch.setattr(narrow, "multiplies_bfloat16", lambda: multiplied)
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 5, 8), (8, 3, 4)))
    bias = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    got = project("BTD,DNH->BTNH", x, kernel, bias)
    want = np.einsum("btd,dnh->btnh", *(np.asarray(a, np.float64) for a in (x, kernel)))
    want += np.asarray(bias)
    assert got.dtype == dtype
    tolerance = 1e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float64), want, tolerance, tolerance)
