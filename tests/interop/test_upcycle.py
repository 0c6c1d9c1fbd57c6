"""Upcycling: the function kept where that is possible, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax import model as lm
from lightning_jax.config.errors import UserError
from lightning_jax.interop.upcycle import is_exact, slices, upcycle
from tests.tiny import random_batch, tiny_model

DENSE = dict(unit="G", num_units=4, moe__num_experts=0)
# 48 hidden units: three slices of 16, eight experts are no whole copies of three, twelve are four.
ROUTED = dict(
    moe__num_experts=12,
    moe__max_experts=6,
    moe__top_k=6,
    moe__num_groups=1,
    moe__num_shared_experts=0,
    moe__train_routing="top_k",
    moe__eval_routing="top_k",
    moe__target_experts=0.0,
    moe__renormalize_gates=True,
)


def make(seed=0, **changes):
    config = tiny_model(64, **{**DENSE, **changes})
    params = lm.init_params(config, jax.random.key(seed))
    return config, jax.tree.map(lambda p: 1.5 * p, params)


def logits(config, params, router=None):
    batch = random_batch(2, 24, 64)
    run = jax.jit(
        lambda params, router: (
            lm.LightningLM(config)
            .apply(
                {"params": params},
                batch.tokens,
                batch.positions,
                batch.segment_ids,
                router=router,
            )
            .logits()
        )
    )
    # Padding meets no expert, so its logits are not those of a dense MLP.
    return np.asarray(run(params, router))[batch.segment_ids > 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(moe__num_shared_experts=1, moe__top_k=4),
        dict(moe__expert_dim=48, moe__num_experts=4, moe__max_experts=4, moe__top_k=2),
        dict(moe__routed_scale=2.5, moe__router_score="sigmoid"),
        dict(unit_mlp="DE", unit="GG", num_units=2),
        dict(prefix="G", num_units=3),
    ],
)
def test_function_is_kept(changes):
    source, params = make()
    target = tiny_model(64, **{**DENSE, **ROUTED, **changes})
    made, router = upcycle(source, params, target, jax.random.key(1))
    assert is_exact(source, target)
    shapes = jax.tree.map(jnp.shape, lm.abstract_params(target))
    assert jax.tree.map(jnp.shape, made) == shapes
    np.testing.assert_allclose(
        logits(target, made, router), logits(source, params), rtol=1e-4, atol=2e-5
    )


@pytest.mark.slow
def test_routing_differs_between_tokens_and_copies_are_whole():
    source, params = make()
    target = tiny_model(64, **DENSE | ROUTED)
    made, _ = upcycle(source, params, target, jax.random.key(1))
    router_DE = np.asarray(made["units"]["0_G"]["moe"]["router_DE"][0])
    np.testing.assert_array_equal(router_DE[:, :3], router_DE[:, [0, 0, 0]])
    assert np.abs(router_DE[:, 0] - router_DE[:, 3]).max() > 0.01


@pytest.mark.slow
def test_raw_gates_are_made_up_for_on_average():
    source, params = make()
    target = tiny_model(64, **{**DENSE, **ROUTED, "moe__renormalize_gates": False})
    made, router = upcycle(source, params, target, jax.random.key(1))
    assert not is_exact(source, target)
    want = logits(source, params)
    error = np.abs(logits(target, made, router) - want).mean() / np.abs(want).mean()
    # Without the scale of the down projections it is about 1.
    assert error < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["mean", "first"])
def test_windows_and_shared_keys_and_values(pool):
    source, params = make()
    target = tiny_model(64, **{**DENSE, **ROUTED, "unit": "LGLg", "num_units": 1})
    made, _ = upcycle(source, params, target, jax.random.key(1), pool=pool)
    theirs = params["units"]["0_G"]["attention"]
    owner = made["units"]["1_G"]["attention"]
    want = theirs["key_DKH"][1]
    if pool == "mean":
        want = (theirs["key_DKH"][1] + theirs["key_DKH"][3]) / 2
    np.testing.assert_allclose(owner["key_DKH"][0], want, rtol=1e-6)
    borrower = made["units"]["3_g"]["attention"]
    assert "key_DKH" not in borrower
    np.testing.assert_array_equal(borrower["query_DNH"][0], theirs["query_DNH"][3])
    assert not is_exact(source, target)


def test_a_source_that_shares_gives_each_layer_the_projections_it_read():
    source, params = make(unit="Gg", num_units=2)
    target = tiny_model(64, **{**DENSE, **ROUTED})
    made, _ = upcycle(source, params, target, jax.random.key(1))
    keys = made["units"]["0_G"]["attention"]["key_DKH"]
    np.testing.assert_array_equal(keys[0], keys[1])
    assert np.abs(np.asarray(keys[0] - keys[2])).max() > 0
    # Borrowed keys were computed from the owner's input, own ones are not.
    assert not is_exact(source, target)


@pytest.mark.slow
def test_an_untied_head_starts_as_the_embedding():
    source, params = make()
    target = tiny_model(64, **{**DENSE, **ROUTED, "tie_embeddings": False})
    made, router = upcycle(source, params, target, jax.random.key(1))
    np.testing.assert_allclose(
        logits(target, made, router), logits(source, params), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ({}, dict(model_dim=64), "model.model_dim = 64: must be the source's, 32"),
        ({}, dict(num_units=3), "model.num_layers = 3"),
        ({}, dict(attention__num_kv_heads=1), "model.attention.num_kv_heads = 1"),
        ({}, dict(moe__expert_dim=20), "expert_dim = 20: must divide the dense MLP's 48"),
        ({}, dict(moe__num_experts=8), "num_experts = 8: must be a multiple of the 3 slices"),
        ({}, dict(moe__num_shared_experts=3), "more slices than num_shared_experts = 3"),
        (dict(attention__sinks=True), {}, "attention.sinks = False: the source has it"),
        (dict(attention__qk_norm="projection"), {}, "qk_norm = 'head': not 'projection'"),
        (dict(tie_embeddings=False), {}, "tie_embeddings = True"),
        (dict(mlp_dim=64), dict(unit_mlp="D"), "mlp_dim = 48: must be the source's, 64"),
        (dict(moe__num_experts=8), {}, "the source has experts already"),
    ],
)
def test_what_does_not_fit_is_named(source, target, message):
    source, params = make(**source)
    target = tiny_model(64, **{**DENSE, **ROUTED, **target})
    with pytest.raises(UserError, match=message):
        upcycle(source, params, target, jax.random.key(0))


def test_an_unknown_pool_is_named():
    source, params = make()
    with pytest.raises(UserError, match='did you mean "mean"'):
        upcycle(source, params, source, jax.random.key(0), pool="men")


def test_a_dense_target_is_a_copy():
    source, params = make()
    wide = dataclasses.replace(source, head_chunk=128)
    made, _ = upcycle(source, params, wide, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, made, params)
    assert is_exact(source, wide)


def test_slices_by_hand():
    target = tiny_model(64, **{**DENSE, **ROUTED, "moe__num_shared_experts": 1})
    cut = slices(48, target)
    assert (cut.size, cut.shared, cut.routed, cut.copies) == (16, 1, 2, 6)
