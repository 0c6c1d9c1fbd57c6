"""Names of curves: what matters comes first in the alphabet, what is rarely needed last."""

from lightning_jax.train import tags

ROW = {
    "step": 7,
    "stage": "stable",
    "loss": 1.5,
    "objective": None,
    "bad_steps": 0,
    "grad_norm": 0.5,
    "top_p": 1,
    "mean_experts": [1.0, 3.0],
    "histogram": [[1.0], [2.0]],
    "tokens_per_second": 9.0,
    "data": {"a": {"tokens": 100, "epochs": 0.5}},
    "eval": {
        "a": {
            "weights": "params",
            "loss": 2.0,
            "bits_per_byte": 1.25,
            "loss_by_position": {"0-15": 3.0, "16-63": None},
            "tokens": 9,
            "experts_by_layer": [1.0],
        }
    },
}


def test_every_number_has_a_name_and_layers_their_extremes():
    assert tags.of_row(ROW) == {
        "loss/train": 1.5,
        "z_other/bad_steps": 0.0,
        "optimizer/grad_norm": 0.5,
        "router/top_p": 1.0,
        "router/mean_experts/mean": 2.0,
        "router/mean_experts/min": 1.0,
        "router/mean_experts/max": 3.0,
        "speed/tokens_per_second": 9.0,
        "text/a/tokens": 100.0,
        "text/a/epochs": 0.5,
        "loss/eval/a": 2.0,
        "bits_per_byte/a": 1.25,
        "position_loss/a/0-15": 3.0,
        "z_other/eval/tokens/a": 9.0,
    }


def test_a_person_sees_quality_first_and_counters_last():
    groups = sorted({name.split("/")[0] for name in tags.of_row(ROW)})
    assert groups[:2] == ["bits_per_byte", "loss"] and groups[-1] == "z_other"


def test_what_an_evaluation_writes_is_known_by_its_name():
    names = {name for name in [*tags.of_row(ROW), tags.SAMPLE] if tags.is_of_evaluation(name)}
    assert names == {
        "loss/eval/a",
        "bits_per_byte/a",
        "position_loss/a/0-15",
        "z_other/eval/tokens/a",
        "sample",
    }
