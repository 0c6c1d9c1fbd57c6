"""What a model does with a text, against its own forward pass and against sums in numpy."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config.errors import UserError
from tests.infer.random_run import random_run
from tests.tiny import mesh_of

TEXT = "def \u6f22 return"


@pytest.fixture(scope="module")
def run():
    return random_run()


@pytest.fixture(scope="module")
def plain(run):
    """The model's own output on the ids of `TEXT`, all at once and without padding."""
    ids = np.asarray([run.encode(TEXT)], np.int32)
    model = lm.LightningLM(run.model)
    return ids[0], model.apply({"params": run.params}, ids, router=run.router)


def test_logits_are_those_of_one_forward_pass(run, plain):
    ids, output = plain
    logits_TV = run.logits(TEXT)
    assert logits_TV.shape == (len(ids), run.model.vocab_size) and logits_TV.dtype == np.float32
    np.testing.assert_allclose(logits_TV, output.logits()[0], atol=1e-5)


def test_losses_are_those_of_the_next_tokens(run):
    logits_TV = run.logits(TEXT).astype(np.float64)[:-1]
    ids = run.encode(TEXT)[1:]
    expected = np.log(np.exp(logits_TV).sum(-1)) - logits_TV[np.arange(len(ids)), ids]
    np.testing.assert_allclose(run.token_losses(TEXT), expected, atol=1e-5)


def test_routing_counts_the_experts_that_the_statistics_count(run, plain):
    ids, output = plain
    found = run.routing(TEXT)
    assert "".join(found.pieces) == TEXT and len(found.pieces) == len(ids)
    assert found.layers == (0, 1) and found.count_RT.shape == (2, len(ids))
    assigned_RE = np.asarray(output.stats.assigned_count_E).reshape(2, -1)
    np.testing.assert_array_equal(found.load_RE, assigned_RE)
    assert found.experts_per_token == assigned_RE.sum() / (2 * len(ids))


def test_a_longer_text_begins_with_the_same_logits(run):
    longer = run.logits(TEXT + " yield" * 10)
    np.testing.assert_allclose(longer[: len(run.encode(TEXT))], run.logits(TEXT), atol=1e-5)


def test_the_same_seed_writes_the_same_text(run):
    texts = [run.generate("def ", max_new_tokens=12, seed=seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_a_model_without_experts_has_no_routing():
    run = random_run(model__moe__num_experts=0)
    assert np.isfinite(run.logits("def ")).all()
    with pytest.raises(UserError, match="num_experts = 0: must be above 0"):
        run.routing("def ")


def test_a_score_is_over_all_tokens_of_all_texts(run):
    texts = [TEXT, "ab"]
    nats = sum(run.token_losses(text).sum() for text in texts)
    counts = np.concatenate([run.routing(text).count_RT for text in texts], axis=1)
    score = run.score(texts)
    # A token is a byte, and each text is predicted from its bos on.
    assert score.tokens == sum(len(text.encode()) for text in texts)
    assert score.bits_per_byte == pytest.approx(nats / np.log(2) / score.tokens)
    assert score.experts_per_token == pytest.approx(counts.mean())
    for bad in ([], "a text"):
        with pytest.raises(UserError, match="texts"):
            run.score(bad)
    with pytest.raises(UserError, match="text = b'a': must be a string"):
        run.logits(b"a")


@pytest.fixture(scope="module")
def sharing():
    """Nine layers whose MLPs add nothing: a prefix, and two units that borrow; with sinks."""
    run = random_run(
        model__prefix="G",
        model__unit="LGlg",
        model__num_units=2,
        model__moe__num_experts=0,
        model__attention__num_kv_heads=2,
        model__attention__sinks=True,
    )
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * ("down_FD" not in jax.tree_util.keystr(path)), run.params
    )
    return dataclasses.replace(run, loaded=dataclasses.replace(run.loaded, params=params))


def _rms_norm(x_TD, scale_D):
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + 1e-5) * scale_D


def test_the_logits_are_those_that_follow_from_the_maps(sharing):
    ids, params, model = sharing.encode(TEXT), sharing.params, sharing.model
    maps = sharing.attention(TEXT)
    assert maps.layers == tuple(range(9)) and "".join(maps.pieces) == TEXT
    table_VD = params["embed"]["table_VD"]
    x_TD, values = table_VD[ids], {}
    for layer, spec in enumerate(model.layers):
        unit, own = (layer - 1) // 4, params["prefix" if layer == 0 else "units"][spec.key]
        own = own if layer == 0 else jax.tree.map(lambda leaf, unit=unit: leaf[unit], own)
        if spec.owns_kv:
            normed_TD = _rms_norm(x_TD, own["attention_norm"]["scale"])
            value_TKH = np.einsum("TD,DKH->TKH", normed_TD, own["attention"]["value_DKH"])
            values[spec.key] = value_TKH.repeat(model.attention.num_heads // 2, axis=1)
        seen_TNH = np.einsum("NTS,SNH->TNH", maps.probs_LNTS[layer], values[spec.owner])
        x_TD = x_TD + np.einsum("TNH,NHD->TD", seen_TNH, own["attention"]["out_NHD"])
    hidden_TD = _rms_norm(x_TD, params["final_norm"]["scale"])
    np.testing.assert_allclose(hidden_TD @ table_VD.T, sharing.logits(TEXT), atol=1e-4)


def test_a_map_has_its_window_its_causality_and_its_sink(sharing):
    text = "yield" * 4
    maps = sharing.attention(text)
    ahead_TS = np.subtract.outer(np.arange(len(maps.pieces)), np.arange(len(maps.pieces)))
    for layer, spec in enumerate(sharing.model.layers):
        seen_TS = (ahead_TS >= 0) & (ahead_TS < (8 if spec.is_local else 99))
        assert ((maps.probs_LNTS[layer] > 0) == seen_TS).all()
    assert (maps.sink_LNT > 0).all() and (maps.sink_LNT < 1).all()
    some = sharing.attention(text, layers=[7, 2])
    assert some.layers == (7, 2)
    np.testing.assert_allclose(some.probs_LNTS, maps.probs_LNTS[[7, 2]], atol=1e-6)


@pytest.mark.parametrize("layers", [[], [9], [-1], ["0"], 0])
def test_layers_that_the_model_does_not_have_are_refused(sharing, layers):
    with pytest.raises(UserError, match="layers = .*: must be numbers from 0 to 8"):
        sharing.attention(TEXT, layers=layers)


def test_maps_that_fill_the_memory_are_refused(sharing):
    with pytest.raises(UserError, match="30,001 tokens: must be shorter"):
        sharing.attention("x" * 30_000)
    with pytest.raises(UserError, match="maps would take 48 GiB"):
        sharing.attention("x" * 30_000, layers=[1])


def test_kv_bytes_are_those_of_the_cache(sharing):
    for text in ("ab", "yield" * 4):
        cache = lm.init_cache(sharing.model, 1, len(sharing.encode(text)))
        arrays = jax.tree.leaves((cache.prefix, cache.units))
        assert sharing.kv_bytes(text) == sum(array.nbytes for array in arrays)


def test_the_router_prefers_the_experts_that_it_takes(run):
    probs_RTE, routing = run.router_probs(TEXT), run.routing(TEXT)
    assert probs_RTE.shape == (2, len(routing.pieces), 8)
    np.testing.assert_allclose(probs_RTE.sum(-1), 1, atol=1e-5)
    best_RTE = np.argsort(-probs_RTE, axis=-1)
    for index, count in np.ndenumerate(routing.count_RT):
        np.testing.assert_array_equal(
            routing.expert_index_RTC[index][:count], best_RTE[index][:count]
        )


def test_a_model_without_experts_has_no_router(sharing):
    with pytest.raises(UserError, match="num_experts = 0: must be above 0"):
        sharing.router_probs(TEXT)


@pytest.mark.slow
@pytest.mark.usefixtures("compile_afresh")
def test_maps_and_probabilities_are_the_same_over_devices(sharing, run):
    maps, probs = sharing.attention(TEXT, layers=[1, 4]), run.router_probs(TEXT)
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        split = sharing.attention(TEXT, layers=[1, 4])
        np.testing.assert_allclose(split.probs_LNTS, maps.probs_LNTS, atol=1e-5)
    with jax.set_mesh(mesh_of(expert=2)):
        np.testing.assert_allclose(run.router_probs(TEXT), probs, atol=1e-5)
    with (
        jax.set_mesh(mesh_of(sequence=2)),
        pytest.raises(UserError, match=r"mesh\.sequence = 2: must be 1"),
    ):
        sharing.attention(TEXT)
