"""What an arm changes is told by its built config."""

import pytest

from lightning_jax.ablation import factors
from lightning_jax.ablation.sweep import override
from lightning_jax.config import RunConfig
from lightning_jax.config.fields import build, to_dict
from tests.tiny import tiny_run

PATTERN = {"pattern": ["model.unit", "model.num_units"]}
RATE = {"rate": ["stages.*.learning_rate"]}
# Its stages have mixtures of the sources `a` and `b`.
BASE = tiny_run("corpus.jsonl")


@pytest.mark.parametrize(
    ("arm", "known", "expected"),
    [
        ({}, {}, {}),
        # The value that the baseline has is no change, whatever the arm says.
        ({"model.unit": "LG"}, {}, {}),
        ({"model.unit": "GG"}, {}, {"model.unit": ["model.unit"]}),
        (
            {"model.unit": "L", "model.num_units": 2},
            PATTERN,
            {"pattern": ["model.unit", "model.num_units"]},
        ),
        (
            {"stages.stable.learning_rate": 0.5, "stages.decay.learning_rate": 0.5},
            RATE,
            {"rate": ["stages.stable.learning_rate", "stages.decay.learning_rate"]},
        ),
        (
            {"model.mlp_dim": 96, "model.num_units": 2},
            PATTERN,
            {"pattern": ["model.num_units"], "model.mlp_dim": ["model.mlp_dim"]},
        ),
        # A source joins every mixture, or leaves it.
        (
            {"data.sources.c": "c.txt"},
            {},
            {
                "data.sources.c": [
                    "data.sources.c",
                    "stages.decay.mixture.c",
                    "stages.stable.mixture.c",
                ]
            },
        ),
        (
            {"data.sources.b": None, "model.mlp_dim": 96},
            {},
            {
                "data.sources.b": [
                    "data.sources.b",
                    "stages.decay.mixture.b",
                    "stages.stable.mixture.b",
                ],
                "model.mlp_dim": ["model.mlp_dim"],
            },
        ),
        # Weights of sources that stay are factors of their own, unless they are called one.
        (
            {"stages.stable.mixture.a": 0.5},
            {"mixture": ["stages.*.mixture.*"]},
            {"mixture": ["stages.stable.mixture.a"]},
        ),
    ],
)
def test_fields_of_one_factor_count_once(arm, known, expected):
    config = build(RunConfig, override(to_dict(BASE), arm))
    found = factors.changed(BASE, config, known)
    assert {name: {*fields} for name, fields in found.items()} == {
        name: {*fields} for name, fields in expected.items()
    }
