"""Single fields changed by flags and sweeps: sources and mixtures follow each other."""

import pytest

from configs import base, small
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, to_dict
from lightning_jax.config.overrides import fields, may_add, misleading, override, parse, plain


def run_with(changes, config=base):
    return build(RunConfig, override(plain(config.get_config()), changes))


def weights(run):
    return [pytest.approx(run.data.weights(stage)) for stage in run.stages]


def test_a_copy_is_changed():
    values = {"a": {"b": 1, "c": {"d": 2}}}
    assert override(values, {"a.b": 3, "a.c": {"e": 4}}) == {"a": {"b": 3, "c": {"e": 4}}}
    assert values == {"a": {"b": 1, "c": {"d": 2}}}


@pytest.mark.parametrize(
    "changes",
    [
        {"data.sources.poems.path": "poems.txt"},
        {"data.sources.poems": "poems.txt"},
        {"data.sources.poems": {"path": "poems.txt", "weight": 1.0}},
    ],
)
def test_a_source_is_added_to_every_stage(changes):
    run = run_with(changes)
    [source] = [source for source in run.data.sources if source.name == "poems"]
    assert (source.path, source.eval_path, source.weight) == ("poems.txt", "", 1.0)
    assert weights(run) == [{"code": 0.9, "docs": 0.1, "poems": 1.0}] * 2
    # A stage with a mixture of its own gives it the same share.
    run = run_with(changes, small)
    assert weights(run)[1] == {"code": 0.8, "docs": 0.2, "poems": 1.0}
    assert build(RunConfig, to_dict(run)) == run


def test_the_share_of_a_new_source_is_that_of_stages_without_a_mixture():
    values = plain(small.get_config())
    for source in values["data"]["sources"].values():
        source["weight"] *= 5
    values["stages"]["decay"]["mixture"] = {"code": 8, "docs": 2}
    changes = {"data.sources.poems.path": "poems.txt", "data.sources.poems.weight": 5}
    run = build(RunConfig, override(values, changes))
    assert weights(run)[0] == {"code": 4.5, "docs": 0.5, "poems": 5}
    assert weights(run)[1] == {"code": 8, "docs": 2, "poems": 10}


def test_a_source_is_removed_from_every_stage():
    assert weights(run_with({"data.sources.docs": None})) == [{"code": 0.9}] * 2
    assert weights(run_with({"data.sources.docs": None}, small)) == [{"code": 0.9}, {"code": 0.8}]


@pytest.mark.parametrize("config", [base, small])
def test_all_sources_are_replaced(config):
    changes = {"data.sources.docs": None, "data.sources.code": None, "data.sources.mine": "*.txt"}
    run = run_with(changes, config)
    assert run.data.source_names == ("mine",)
    assert all(list(run.data.weights(stage)) == ["mine"] for stage in run.stages)


def test_a_mixture_is_changed_from_what_the_stage_would_take():
    changes = {"stages.stable.mixture.poems": 0.3, "data.sources.poems.path": "poems.txt"}
    run = run_with(changes)
    assert weights(run)[0] == {"code": 0.9, "docs": 0.1, "poems": 0.3}
    assert weights(run)[1] == {"code": 0.9, "docs": 0.1, "poems": 1.0}
    assert weights(run_with({"stages.decay.mixture.docs": None}))[1] == {"code": 0.9}
    both = {"stages.decay.mixture.docs": None, "stages.decay.mixture.code": None}
    assert weights(run_with(both, small))[1] == {"code": 0.9, "docs": 0.1}
    assert weights(run_with({"stages.decay.mixture": None}, small))[1] == {"code": 0.9, "docs": 0.1}
    only = {"stages.decay.mixture.docs": 0.4}
    assert weights(run_with(only, small))[1] == {"code": 0.8, "docs": 0.4}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"learning_rate": 1}, "did you mean stages.stable.learning_rate or stages.decay.learn"),
        ({"optimizer.learning_rate": 1}, "did you mean stages.stable.learning_rate or stages.d"),
        ({"data.seq_len": 1}, "did you mean stages.stable.seq_len or stages.decay.seq_len"),
        ({"batch_size": 1}, "did you mean stages.stable.batch_size or stages.decay.batch_size"),
        ({"decay": "cosine"}, "did you mean stages.stable.decay or stages.decay.decay"),
        ({"mixture.code": 1}, "did you mean stages.stable.mixture.code or stages.decay.mixture.co"),
        ({"data.mixture.poems": 1}, "did you mean stages.stable.mixture.poems or "),
        ({"mixture": {}}, "did you mean stages.stable.mixture or stages.decay.mixture"),
        ({"model.num_experts": 1}, r"did you mean model.moe.num_experts\?$"),
        ({"attention": 1}, r"did you mean model.attention\?$"),
        ({"attention.window": 1}, r"did you mean model.attention.window\?$"),
        ({"modle.unit": "G"}, r"did you mean model.unit\?$"),
        ({"model.modle_dim": 1}, r"did you mean model.model_dim\?$"),
        ({"model.n_layer": 1}, r"the depth is the letters of model.unit times model.num_units"),
        ({"lr": 1}, "did you mean stages.stable.learning_rate or "),
        ({"model.hidden_size": 1}, r"did you mean model.model_dim\?$"),
        ({"model.unit.x": 1}, "model.unit.x: model.unit has no fields"),
        ({"nope": 1}, "configs/base.py has every field"),
        ({"stages.stabel.mixture.code": 1}, "unknown config field stages.stabel.mixture: did you"),
        ({"stages.decay.mixture.codes": None}, r'no such source \(did you mean "code"\?\)'),
        ({"stages.decay.mixture": 3}, "stages.decay.mixture = 3: must be None, or a weight by"),
        ({"stages.decay.mixture.code": "x"}, "stages.decay.mixture.code = 'x': must be of type fl"),
        ({"stages.decay.mixture.codes": 1}, r"stages.decay.mixture = 'codes': must be one of code"),
        ({"data.sources.dosc": None}, r'data.sources.dosc = None: .*\(did you mean "docs"\?\)'),
        (
            {"data.sources.dosc.weight": 2},
            r'no such source \(did you mean "docs"\?\); a new one',
        ),
        ({"data.sources.docs.paht": "x"}, r"did you mean data.sources.docs.path\?"),
        (
            {"data.sources.docs.weight": "x"},
            "data.sources.docs.weight = 'x': must be of type fl",
        ),
        ({"data.sources.a/b": "x"}, "a name in data.sources = 'a/b'"),
        ({"data.sources.new": 3}, "data.sources.new.path = 3: must be of type str"),
        (
            {"data.sources.docs": None, "data.sources.code": None},
            "data.sources = .*: must be at least one source",
        ),
    ],
)
def test_an_error_says_what_to_write(changes, line):
    with pytest.raises(UserError, match=line) as caught:
        run_with(changes)
    assert "\n" not in str(caught.value)


def test_what_a_sweep_file_returns_may_be_anything():
    with pytest.raises(UserError, match="unknown config field data.sources"):
        override({"seed": 0}, {"data.sources.a": "x"})


def test_values_are_literals_or_text():
    found = [parse(text) for text in ("64", "1e-3", "True", "None", "G", "poems.txt", "a b", "'1'")]
    assert found == [64, 1e-3, True, None, "G", "poems.txt", "a b", "1"]


def test_which_fields_may_be_added():
    yes = ["data.sources.a", "data.sources.a.path", "stages.s.mixture.a", "stages.s.mixture"]
    no = ["data.sources", "data.source.a", "stages.s.tokens", "data.tokenizer", "seed", "stages.s"]
    assert all(map(may_add, yes)) and not any(map(may_add, no))


def test_fields_lists_sections_and_leaves():
    assert list(fields({"a": {"b": 1}, "c": 2})) == ["a", "a.b", "c"]


def test_top_p_under_the_controller_is_misleading():
    moe = build(RunConfig, base.get_config()).model.moe
    line = misleading(moe, ["seed", "model.moe.top_p"], prefix="--config.")
    assert line == (
        "--config.model.moe.top_p=0.4 is only where the controller starts, which holds 3 experts "
        "per token; a fixed top_p needs --config.model.moe.target_experts=0 too"
    )
    assert misleading(moe, ["model.moe.top_p", "model.moe.target_experts"]) is None
    assert misleading(moe, ["model.moe.top_k"]) is None
    for fixed in ({"model.moe.target_experts": 0.0}, {"model.moe.num_experts": 0}):
        changes = {**fixed, "model.moe.top_p": 0.3}
        assert misleading(run_with(changes).model.moe, ["model.moe.top_p"]) is None
