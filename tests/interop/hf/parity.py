"""Measures a model of ours against stored outputs of `transformers` for the same files.

A fixture is a folder with `config.json`, `model.safetensors` and `io.npz`; its keys are those that
tests/interop/make_fixture.py writes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lightning_jax import model as lm
from lightning_jax.infer.engine import Engine
from lightning_jax.infer.sampling import Sampling
from lightning_jax.interop import hf
from lightning_jax.interop.hf.tensors import file_tensors
from lightning_jax.layers.block import Layer, Unit
from lightning_jax.layers.moe import MoE
from lightning_jax.ops import loss as losses
from lightning_jax.runtime.files import read_json

# Float32 noise of both sides is below a tenth of these (see the fixtures' own notes).
LOGITS, HIDDEN, LOSS, GRADIENT = 3e-4, 1e-3, 1e-5, 1e-3


@dataclasses.dataclass
class Fixture:
    """A model read from `folder`, and the outputs stored beside it."""

    folder: Path
    io: dict[str, np.ndarray]
    imported: hf.Imported

    @classmethod
    def open(cls, folder: Path, kv_source=None) -> Fixture:
        with np.load(folder / "io.npz") as stored:
            io = dict(stored)
        return cls(folder, io, hf.load(folder, kv_source=kv_source))

    def with_config(self, **changes) -> Fixture:
        """The same weights under a config with dotted `changes` (dots written `__`)."""
        config = self.imported.config
        for name, value in changes.items():
            *path, last = name.split("__")
            nested = {last: value}
            node = getattr(config, path[0]) if path else None
            config = dataclasses.replace(
                config, **({path[0]: dataclasses.replace(node, **nested)} if path else nested)
            )
        return dataclasses.replace(self, imported=self.imported._replace(config=config))

    def forward(self, tokens_BT, **segments):
        """Returns the model's output."""
        config, params, router = self.imported

        @jax.jit
        def run(params, router, tokens_BT, segments):
            return lm.LightningLM(config).apply(
                {"params": params},
                tokens_BT,
                segments.get("position_ids"),
                segments.get("segment_ids"),
                router=router,
            )

        return run(params, router, jnp.asarray(tokens_BT), segments)

    def layers(self, tokens_BT) -> list[dict]:
        """What each layer and its router returned, from the first layer to the last."""
        config, params, router = self.imported
        specs = [config.unit_layers] * config.num_units
        units = [
            (jax.tree.map(lambda a, unit=unit: a[unit], params["units"]), router.bias_URE[unit])
            for unit in range(config.num_units)
        ]
        if config.prefix_layers:
            specs.insert(0, config.prefix_layers)
            units.insert(0, (params["prefix"], router.bias_URE[0, :0]))

        def keep(module, name):
            return (isinstance(module, Layer) and name == "__call__") or (
                isinstance(module, MoE) and name == "_route"
            )

        @jax.jit
        def run(units, tokens_BT):
            ones_BT, base = jnp.ones_like(tokens_BT), config.attention.rope_base_global
            index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
            kinds = lm.kind_contexts(config, index_BT[:, 0], index_BT, ones_BT, base, None)
            context = lm.Context(kinds, ones_BT != 0, router.top_p)
            x_BTD = params["embed"]["table_VD"][tokens_BT].astype(config.compute_dtype)
            found = []
            for layers, (weights, bias_RE) in zip(specs, units, strict=True):
                (x_BTD, _), variables = Unit(config, layers, False).apply(
                    {"params": weights},
                    x_BTD,
                    bias_RE,
                    {},
                    context,
                    jnp.int32(0),
                    capture_intermediates=keep,
                    mutable=["intermediates"],
                )
                found += [variables["intermediates"][spec.key] for spec in layers]
            return found

        return run(units, jnp.asarray(tokens_BT))

    def logits(self) -> np.ndarray:
        return np.asarray(self.forward(self.io["input_ids"]).logits())


def check_forward(fixture: Fixture) -> None:
    """Hidden states of every layer, logits, and what every router decided."""
    io, moe = fixture.io, fixture.imported.config.moe
    output, captured = fixture.forward(io["input_ids"]), fixture.layers(io["input_ids"])
    hidden = [layer["__call__"][0][0] for layer in captured]
    for index, (ours, theirs) in enumerate(zip(hidden, io["hidden"][1:], strict=True)):
        error = np.abs(np.asarray(ours)[:1] - theirs).max()
        assert error <= HIDDEN and error <= 1e-4 * np.abs(theirs).max(), f"layer {index}: {error}"
    assert np.abs(np.asarray(output.logits()) - io["logits"]).max() <= LOGITS
    routings = [layer.get("moe", {}).get("_route") for layer in captured]
    assert any(f"router_idx_{i}" in io for i in range(len(routings))) == bool(moe.num_experts)
    for index, found in enumerate(routings):
        assert (found is not None) == (f"router_idx_{index}" in io), f"layer {index}"
        if found is not None:
            _check_routing(found[0], io, index, moe.routed_scale)


def _check_routing(routing, io, layer, scale):
    chosen = io[f"router_idx_{layer}"]
    shape = (*chosen.shape[:2], -1)
    index = np.asarray(routing.choices.expert_index_MC).reshape(shape)
    order = np.argsort(index, axis=-1)
    np.testing.assert_array_equal(np.take_along_axis(index, order, -1), chosen)
    gates = np.take_along_axis(np.asarray(routing.choices.gate_MC).reshape(shape), order, -1)
    np.testing.assert_allclose(scale * gates, io[f"router_w_{layer}"], atol=3e-5, rtol=1e-4)
    logits = np.asarray(routing.scores.logits_ME).reshape(shape)
    np.testing.assert_allclose(logits, io[f"router_logits_{layer}"], atol=3e-4)


def check_packed(fixture: Fixture) -> None:
    """Documents packed into one row give what each gives alone."""
    io = fixture.io
    ids = {name: jnp.asarray(io[f"packed_{name}"]) for name in ("segment_ids", "position_ids")}
    # The file may number documents from 0, which is padding here.
    ids["segment_ids"] = ids["segment_ids"] - ids["segment_ids"].min() + 1
    logits = fixture.forward(io["input_ids"][:1], **ids).logits()
    assert np.abs(np.asarray(logits) - io["packed_logits"]).max() <= LOGITS


def check_decode(fixture: Fixture) -> None:
    """Greedy tokens with the cache, and the logits that chose them, by prefill of the whole."""
    io, (config, params, router) = fixture.io, fixture.imported
    length, tokens = int(io["gen_prompt_len"]), io["gen_tokens"]
    prompts = io["input_ids"][:, :length]
    engine = Engine(config, params, router, max_length=length + tokens.shape[1], prefill_chunk=16)
    made = engine.generate(
        prompts.tolist(),
        Sampling(temperature=0.0),
        max_new_tokens=tokens.shape[1],
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(made, tokens)
    cache = lm.init_cache(config, *(len(prompts), length + tokens.shape[1]))
    whole = np.concatenate([prompts, tokens], axis=1)
    step = jax.jit(
        lambda cache, chunk, start: lm.LightningLM(config).apply(
            {"params": params}, chunk, router=router, cache=cache, start_B=start
        )
    )
    for start in range(0, length + tokens.shape[1] - 1, 7):
        chunk = whole[:, start : start + 7]
        output = step(cache, jnp.asarray(chunk), jnp.full(len(prompts), start, jnp.int32))
        cache = output.cache
        for offset in range(chunk.shape[1]):
            which = start + offset - (length - 1)
            if 0 <= which < tokens.shape[1]:
                error = np.abs(np.asarray(output.logits())[:, offset] - io["gen_logits"][:, which])
                assert error.max() <= LOGITS, f"token {which}: {error.max()}"


def check_loss_and_gradients(fixture: Fixture) -> None:
    """Mean cross-entropy, plain and masked, and the gradient of every tensor of the file."""
    io, (config, params, router) = fixture.io, fixture.imported
    tokens = jnp.asarray(io["input_ids"])

    def mean_loss(params, mask_BT):
        output = lm.LightningLM(config).apply({"params": params}, tokens, router=router)
        hidden = output.hidden_BTD[:, :-1].reshape(-1, config.model_dim)
        weights = mask_BT[:, 1:].reshape(-1)
        loss_sum, _, _ = losses.cross_entropy(
            hidden,
            output.head_DV,
            tokens[:, 1:].reshape(-1),
            weights,
            z_weight=0.0,
            chunk=64,
        )
        return loss_sum / weights.sum()

    run = jax.jit(jax.value_and_grad(mean_loss))
    masked, _ = run(params, jnp.asarray(io["loss_mask"], jnp.float32))
    assert abs(float(masked) - float(io["loss_masked"])) <= LOSS
    value, grads = run(params, jnp.ones(tokens.shape))
    assert abs(float(value) - float(io["loss"])) <= LOSS
    found = file_gradients(fixture, grads)
    for name, norm, projection in zip(
        io["grad_names"].tolist(), io["grad_norm"], io["grad_proj"], strict=True
    ):
        flat = found[name].ravel().astype(np.float64)
        ours = np.linalg.norm(flat)
        assert abs(ours - norm) <= GRADIENT * norm + 1e-6, f"{name}: {ours}, not {norm}"
        ours = np.sum(flat * np.cos(0.37 * np.arange(flat.size) + 0.1))
        assert abs(ours - projection) <= GRADIENT * norm + 1e-6, f"{name}: {ours}, {projection}"


def file_gradients(fixture: Fixture, grads) -> dict[str, np.ndarray]:
    """Gradients in the names and layout of the file; a selection bias has none."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(grads)
    named = {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}
    model_type = read_json(fixture.folder / "config.json")["model_type"]
    return {
        tensor.name: tensor.join([np.asarray(named[p.path][p.index]) for p in tensor.parts])
        for tensor in file_tensors(fixture.imported.config, model_type)
        if all(part.path in named for part in tensor.parts)
    }
