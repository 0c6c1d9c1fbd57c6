"""A cache changes nothing: any way of feeding tokens through it equals one forward without it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest

from configs import base
from lightning_jax import model as lm
from lightning_jax.config import ModelConfig
from lightning_jax.config.fields import build

WINDOW, CHUNK = 8, 10
PATTERNS = ("G", "L", "Gg", "LlG", "LLLGLLLg")


def model_config(
    unit: str, *, dense: bool = False, prefix: str = "", experts: str = "onehot", **attention
) -> ModelConfig:
    fields = base.get_config().model.to_dict()
    fields |= dict(vocab_size=48, model_dim=32, unit=unit, num_units=2, mlp_dim=48, prefix=prefix)
    fields["attention"] |= dict(num_heads=4, num_kv_heads=2, head_dim=8, window=WINDOW) | attention
    fields["moe"] |= dict(num_experts=0 if dense else 8, expert_dim=16, max_experts=4, top_p=0.5)
    fields["moe"]["implementation"] = experts  # onehot compiles fastest
    return build(ModelConfig, fields)


@functools.lru_cache(maxsize=4)
def params_of(config: ModelConfig):
    """Random parameters, also those that start at zero (sinks, gates) or one (scales)."""

    rng = np.random.default_rng(0)

    def draw(leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return noise * 32**-0.5 if leaf.ndim > 2 else 1 + 0.3 * noise

    return jax.tree.map(draw, lm.abstract_params(config))


@functools.partial(jax.jit, static_argnames=("config",))
def forward(config, params, tokens, positions, segments, cache=None, start=None):
    output = lm.LightningLM(config).apply(
        {"params": params}, tokens, positions, segments, cache=cache, start_B=start
    )
    return output.hidden_BTD, output.logits(), output.cache


@dataclasses.dataclass(frozen=True)
class Rows:
    """A packed row (two documents, positions restart), a whole one, and a right-padded one."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray

    @classmethod
    def make(cls, length: int) -> Rows:
        index = np.tile(np.arange(length, dtype=np.int32), (3, 1))
        cut, end = 1 + length // 3, max(length // 2, 1)
        positions, segments = index.copy(), np.ones_like(index)
        positions[0, cut:] -= cut
        segments[0, cut:] = 2
        segments[2, end:] = 0
        tokens = np.random.default_rng(length).integers(0, 48, index.shape, dtype=np.int32)
        return cls(tokens, positions, segments)

    @property
    def lengths(self) -> np.ndarray:
        return (self.segments != 0).sum(axis=1)


def one_by_one(lengths):
    return [(1, np.ones(3, int))] * lengths.max()


def in_chunks(lengths):
    """Chunks longer than the window, the last one padded past the end of the cache."""
    return [(CHUNK, np.full(3, CHUNK))] * -(-lengths.max() // CHUNK)


def ragged(lengths):
    """A chunk that takes another number of tokens from each row, then one by one."""
    return [
        (CHUNK, np.array([3, CHUNK, 2])),
        (CHUNK, np.array([CHUNK, 1, 0])),
        *one_by_one(lengths),
    ]


def feed(config, params, rows: Rows, plan):
    """Feeds `rows` through a cache; `plan` gives the width of each chunk and tokens per row."""
    batch, length = rows.tokens.shape
    hidden = np.zeros((batch, length, config.model_dim), np.float32)
    logits = np.zeros((batch, length, config.vocab_size), np.float32)
    cache, start = lm.init_cache(config, batch, length), np.zeros(batch, np.int32)
    for width, wanted in plan(rows.lengths):
        count = np.minimum(wanted, rows.lengths - start)
        index = start[:, None] + np.arange(width)[None]
        valid = np.arange(width)[None] < count[:, None]
        at = (np.arange(batch)[:, None], np.minimum(index, length - 1))
        segments = np.where(valid, rows.segments[at], 0).astype(np.int32)
        hidden_chunk, logits_chunk, cache = forward(
            config, params, rows.tokens[at], rows.positions[at], segments, cache, start
        )
        to = (at[0].repeat(width, axis=1)[valid], index[valid])
        hidden[to], logits[to] = np.asarray(hidden_chunk)[valid], np.asarray(logits_chunk)[valid]
        start = (start + count).astype(np.int32)
    assert (start == rows.lengths).all()
    return hidden, logits


def assert_cache_changes_nothing(config: ModelConfig, length: int, plans) -> None:
    rows, params = Rows.make(length), params_of(config)
    expected = forward(config, params, rows.tokens, rows.positions, rows.segments)[:2]
    for plan in plans:
        for got, want in zip(feed(config, params, rows, plan), expected, strict=True):
            real = rows.segments != 0
            np.testing.assert_allclose(
                got[real], np.asarray(want)[real], atol=1e-5, rtol=1e-5, err_msg=plan.__name__
            )


PLANS = (one_by_one, in_chunks, ragged)


SLOW = [pytest.param(unit, marks=pytest.mark.slow) for unit in PATTERNS if unit != "LlG"]


@pytest.mark.parametrize("unit", ["LlG", *SLOW])
def test_decode_and_prefill_equal_one_forward(unit):
    assert_cache_changes_nothing(model_config(unit), 3 * WINDOW, PLANS)


@pytest.mark.slow
def test_dense_mlps_prefix_and_all_options():
    config = model_config(
        "LlGg",
        dense=True,
        prefix="G",
        qk_norm="projection",
        qkv_bias=True,
        out_bias=True,
        output_gate=True,
        sinks=True,
        global_rope=False,
    )
    assert_cache_changes_nothing(config, 3 * WINDOW, PLANS)


@pytest.mark.slow
@pytest.mark.parametrize("length", [WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("unit", ["L", "LlG"])
def test_every_length_around_the_window(unit, length):
    """With dense MLPs, which compile faster; a longer length is above, with experts."""
    assert_cache_changes_nothing(model_config(unit, dense=True), length, PLANS)


@pytest.mark.parametrize("length", [WINDOW - 1, 3 * WINDOW])
def test_sizes_and_owners_of_the_cache(length):
    cache = lm.init_cache(model_config("LlGg", prefix="GL"), 2, length)
    ring = min(WINDOW, length)
    sizes = {kind: segment_BS.shape for kind, segment_BS in cache.segments.items()}
    assert sizes == {"L": (2, ring), "G": (2, length)}
    shapes = {
        name: {owner: kv.key_UBSKH.shape for owner, kv in owners.items()}
        for name, owners in (("prefix", cache.prefix), ("units", cache.units))
    }
    assert shapes == {
        "prefix": {"0_G": (1, 2, length, 2, 8), "1_L": (1, 2, ring, 2, 8)},
        "units": {"0_L": (2, 2, ring, 2, 8), "2_G": (2, 2, length, 2, 8)},
    }


def _largest_gap(config, params, other_config, other_params):
    rows = Rows.make(3 * WINDOW)
    hidden = forward(config, params, rows.tokens, rows.positions, rows.segments)[0]
    other, _ = feed(other_config, other_params, rows, in_chunks)
    return np.abs(np.asarray(hidden) - other)[rows.segments != 0].max()


@pytest.mark.slow
def test_the_comparison_has_teeth():
    config = model_config("LlG")
    params = params_of(config)
    assert _largest_gap(config, params, config, params) < 1e-5
    off_by_one = model_config("LlG", window=WINDOW - 1)
    assert _largest_gap(config, params, off_by_one, params) > 1e-2
    # The same layers, but the second one reads keys and values of its own.
    borrower = params["units"]["1_l"]
    owner = params["units"]["0_L"]["attention"]
    own = {name: owner[name] for name in owner if name.startswith(("key", "value"))}
    units = {key: value for key, value in params["units"].items() if key != "1_l"}
    units["1_L"] = borrower | {"attention": borrower["attention"] | own}
    assert _largest_gap(config, params, model_config("LLG"), params | {"units": units}) > 1e-2
