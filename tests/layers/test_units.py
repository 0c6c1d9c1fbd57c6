"""Equal layers in one loop compute what the layers one by one do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config.pattern import LayerSpec
from lightning_jax.layers import units
from lightning_jax.train.step import weighted_balance_loss
from tests.targets import TPU
from tests.tiny import random_batch, tiny_model

WEIGHTS = {"switch": 0.1, "group": 0.1, "z": 0.1}


def keys(run: tuple[LayerSpec, ...]) -> str:
    return "".join(spec.letter for spec in run)


@pytest.mark.parametrize(
    "unit, mlps, runs",
    [
        ("LLLGLLLg", "", "LLL G LLL g"),
        ("LLll", "", "LL ll"),
        ("GGGG", "EEDD", "GG GG"),
        ("LGLG", "", "L G L G"),
        ("LLLL", "DEED", "L LL L"),
    ],
)
def test_runs_are_of_equal_letters_with_equal_mlps(unit, mlps, runs):
    config = tiny_model(unit=unit, unit_mlp=mlps)
    with jax.sharding.use_abstract_mesh(TPU):
        found = units._runs(config)
        unrolled = units._runs(tiny_model(unit=unit, unit_mlp=mlps, scan=False))
    assert " ".join(map(keys, found)) == runs
    assert sum(found, ()) == config.unit_layers
    # On this CPU, and without scans, each layer is by itself.
    assert len(units._runs(config)) == len(unrolled) == len(unit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit, changes",
    [
        ("LLl", dict(num_units=1, prefix="LL")),
        ("LLLGLLLg", dict(remat="full")),
        ("LLLL", dict(unit_mlp="DDEE", remat="checkpoint_dots")),
        ("LLll", dict(remat="full")),
    ],
)
def test_loops_give_the_values_statistics_and_gradients_of_single_layers(
    unit, changes, monkeypatch
):
    config = tiny_model(unit=unit, **{"num_units": 2, "mlp_dim": 24, **changes})
    params = jax.jit(functools.partial(lm.init_params, config))(jax.random.key(1))
    batch = random_batch(2, 16, 64)
    bias_URE = 0.1 * jax.random.normal(jax.random.key(2), lm.init_router(config).bias_URE.shape)
    router = lm.Router(bias_URE, jnp.float32(0.4))

    def loss(params):
        output = lm.LightningLM(config, train=True).apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids, router=router
        )
        balance = weighted_balance_loss(WEIGHTS, output.stats, None)
        return (jnp.sin(output.hidden_BTD) ** 2).mean() + balance, output

    def values():
        (value, output), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return value, output.hidden_BTD, output.stats, grads

    alone, here, used = values(), units._runs, []

    def runs_of_a_tpu(config):
        with jax.sharding.use_abstract_mesh(TPU):
            used.append(here(config))
        return used[-1]

    monkeypatch.setattr(units, "_runs", runs_of_a_tpu)
    close = functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5)
    jax.tree.map(close, values(), alone)
    # Else single layers were compared with themselves.
    assert any(len(run) > 1 for run in used[-1])
