"""Initial values: equal where models are equal, different everywhere else."""

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from tests.tiny import tiny_model


def layers(**changes):
    """The parameters of each layer by its number, in order."""
    config = tiny_model(**changes)
    params = jax.jit(lambda key: lm.init_params(config, key))(jax.random.key(0))
    found = [params["prefix"][spec.key] for spec in config.prefix_layers]
    for unit in range(config.num_units):
        for spec in config.unit_layers:
            found.append(jax.tree.map(lambda a, u=unit: a[u], params["units"][spec.key]))
    return found, params


def equal(one, two):
    """Up to the last bit: programs of two models may round a product differently."""
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        dict(unit="LG", num_units=3),
        dict(unit="LGg", num_units=2),
        dict(unit="GLGGg", num_units=1, prefix="G"),
        dict(unit="G", num_units=6, attention__window=3),
    ],
    ids=str,
)
def test_layers_of_another_pattern_begin_with_the_same_values(changes):
    dense = dict(moe__num_experts=0)
    full, params = layers(unit="G", num_units=6, **dense)
    other, others = layers(**changes, **dense)
    assert len(full) == len(other) == 6
    for one, two in zip(full, other, strict=True):
        # A borrower has no keys and values of its own.
        same = {**one, "attention": {n: one["attention"][n] for n in two["attention"]}}
        jax.tree.map(equal, same, two)
    equal(params["embed"]["table_VD"], others["embed"]["table_VD"])


def test_experts_leave_attention_as_it_was():
    (one, *_), _ = layers(unit="LG", num_units=1)
    (two, *_), _ = layers(unit="LG", num_units=1, moe__num_experts=0)
    jax.tree.map(equal, one["attention"], two["attention"])


def test_no_two_parameters_are_equal():
    found, params = layers(unit="LG", num_units=2, prefix="L")
    drawn = [a for a in jax.tree.leaves([*found, params["embed"]]) if np.std(a) > 0]
    starts = {np.asarray(a).ravel()[:4].tobytes() for a in drawn}
    # Rounds of the generator repeat for no other key, layer or name.
    assert len(starts) == len({a.tobytes() for a in map(np.asarray, drawn)}) == len(drawn)
