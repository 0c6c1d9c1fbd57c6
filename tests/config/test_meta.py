"""What a checkpoint says of itself survives JSON, and a field that is missing is named."""

import json

import pytest

from lightning_jax.config import CheckpointMeta
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from tests.tiny import tiny_run

META = CheckpointMeta(
    config=tiny_run("corpus.jsonl", model__vocab_size=64),
    step=7,
    tokens=20 * 10**9,
    stage="decay",
    seq_len=32,
    rope_base_global=5e4,
)


def test_it_survives_json():
    assert CheckpointMeta.parse(json.loads(json.dumps(to_dict(META)))) == META


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": ...}, "it lacks config in meta"),
        ({"rope_base_global": ...}, "it lacks rope_base_global in meta"),
        ({"step": "7"}, "step = '7': must be of type int"),
        ({"colour": 1}, "unknown config field colour"),
        # Case E4
        ({"step": -1}, r"meta: step = -1: must be a whole number in \[0, "),
        ({"step": 2**31}, "step = 2147483648: must be "),
        ({"tokens": -1}, "tokens = -1: must be a whole number"),
        ({"tokens": 10**30}, "tokens = 10{30}: must be "),
        ({"stage": "dekay"}, "meta: stage = 'dekay': must be .*did you mean \"decay\""),
        ({"stage": None}, "stage = None: must be of type str"),
        ({"seq_len": 0}, "meta: seq_len = 0: must be a whole number"),
        ({"rope_base_global": 1.0}, r"rope_base_global = 1.0: must be a finite number in \(1, "),
        ({"rope_base_global": float("inf")}, "rope_base_global = inf: must be a"),
        ({"rope_base_global": float("nan")}, "rope_base_global = nan: must be a"),
        ({"config": [1]}, "config = .*: must be a mapping"),
    ],
)
def test_what_it_must_have(changes, message):
    values = {k: v for k, v in {**to_dict(META), **changes}.items() if v is not ...}
    with pytest.raises(UserError, match=message):
        CheckpointMeta.parse(values)
