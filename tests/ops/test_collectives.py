"""A sum over devices whose gradient is that of a sum."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lightning_jax.ops import collectives


@pytest.mark.usefixtures("compile_afresh")
def test_the_gradient_of_a_total_is_that_of_psum_without_its_communication():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(auto, auto))
    x = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    factor = np.array([2.0, -1.0, 0.5], np.float32)

    def weighted(summed):
        def loss(x):
            local = lambda x: summed(x[0] ** 2, ("a", "b"))  # noqa: E731
            run = jax.shard_map(local, in_specs=P(("a", "b")), out_specs=P(), check_vma=False)
            return (factor * run(x) ** 2).sum()

        return jax.jit(jax.value_and_grad(loss)).lower(x).compile()

    with jax.set_mesh(mesh):
        ours, plain = weighted(collectives.total), weighted(jax.lax.psum)
        found = jax.device_get(ours(x))
        sums = [program.as_text().count(" all-reduce(") for program in (ours, plain)]
    sum_D = (x.astype(np.float64) ** 2).sum(axis=0)
    np.testing.assert_allclose(found[0], (factor * sum_D**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(found[1], 4 * x * factor[None] * sum_D[None], rtol=1e-6)
    assert sums == [1, 2]
    np.testing.assert_array_equal(collectives.total(x, ()), x)
