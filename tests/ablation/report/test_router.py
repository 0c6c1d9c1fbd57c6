"""The pictures of a router are made of a run's held-out text."""

import pytest

from lightning_jax.ablation.report.router import router_pictures
from tests.infer.random_run import save_run
from tests.tiny import tiny_run, write_corpus

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
def test_every_picture_is_made_of_all_domains(tmp_path):
    config = tiny_run(write_corpus(tmp_path / "text", 300), model__vocab_size=272)
    save_run(tmp_path / "run", config)
    figures, text = router_pictures(tmp_path / "run")
    assert [*figures] == [
        "experts_by_layer",
        "experts_by_domain",
        "experts_by_position",
        "expert_load",
    ]
    domains = [label.get_text() for label in figures["experts_by_domain"].axes[0].get_xticklabels()]
    assert domains == ["a", "b"]
    # A row of training has 32 tokens: positions go to the fifth or sixth power of two.
    positions = figures["experts_by_position"].axes[0].lines[0].get_xdata()
    assert positions[0] == 1 and 16 <= positions[-1] <= 32
    assert text.count('experts">') > 3


def test_a_model_without_experts_has_none(tmp_path):
    save_run(tmp_path, tiny_run("unread", model__vocab_size=272, model__moe__num_experts=0))
    assert router_pictures(tmp_path) == ({}, "")
