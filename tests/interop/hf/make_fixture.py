"""Makes a small model with `transformers` and stores its weights and outputs, for `parity.py`.

Everything is float32 with eager attention; weights are drawn so that norms, biases, sinks and
routers matter: norm scales are around 1, nothing else is 0.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

BATCH, LENGTH, PROMPT, NEW = 2, 48, 21, 8
DOCUMENTS = (17, 12, 19)
# Below this a routing or greedy decision could fall either way within float32 noise.
MARGIN = 1e-4


def make(model_class, config, folder: Path, seed: int = 0) -> None:
    """Writes `config.json`, `model.safetensors` and `io.npz` into `folder`."""
    import torch

    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    _draw(model, seed)
    model.save_pretrained(folder)
    rng = np.random.default_rng(seed)
    tokens = torch.tensor(rng.integers(3, config.vocab_size, (BATCH, LENGTH)))
    stored = {"input_ids": tokens.numpy().astype(np.int32), "loss_mask": rng.random((2, 48)) < 0.7}
    stored |= _forward(model, tokens) | _packed(model, tokens) | _generated(model, tokens)
    stored |= _loss_and_gradients(model, tokens, torch.tensor(stored["loss_mask"]))
    np.savez(folder / "io.npz", **stored)


def _draw(model, seed):
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "norm" in name:
                value.copy_(1 + 0.25 * noise)
            elif value.ndim == 1 or "bias" in name or "sinks" in name:
                value.copy_(0.3 * noise)
            elif "router" in name or name.endswith("mlp.gate.weight"):
                value.copy_(noise / 4)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)


def _forward(model, tokens):
    """Logits, the residual stream before each layer and after the last, and every router."""
    import torch

    hidden, routers, hooks = [], {}, []
    layers = model.model.layers
    hooks.append(layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0])))
    for index, layer in enumerate(layers):
        keep = lambda _, __, out: hidden.append(out[0] if isinstance(out, tuple) else out)  # noqa: E731
        hooks.append(layer.register_forward_hook(keep))
        router = getattr(layer.mlp, "router", None) or getattr(layer.mlp, "gate", None)
        if router is not None:
            note = lambda _, __, out, index=index: routers.__setitem__(index, out)  # noqa: E731
            hooks.append(router.register_forward_hook(note))
    with torch.no_grad():
        logits = model(tokens).logits
    for hook in hooks:
        hook.remove()
    stored = {"logits": logits.numpy(), "hidden": np.stack([h[:1].numpy() for h in hidden])}
    for index, (scores, gates, chosen) in routers.items():
        shape = (*tokens.shape, -1)
        order = chosen.argsort(dim=-1)
        stored[f"router_logits_{index}"] = scores.reshape(shape).numpy()
        stored[f"router_idx_{index}"] = chosen.gather(1, order).reshape(shape).numpy()
        stored[f"router_w_{index}"] = gates.gather(1, order).reshape(shape).numpy()
        ranked = scores.sort(dim=-1, descending=True).values
        margin = (ranked[:, chosen.shape[-1] - 1] - ranked[:, chosen.shape[-1]]).min()
        assert margin > MARGIN, f"layer {index}: routing margin {margin}; take another seed"
    return stored


def _packed(model, tokens):
    """The documents of one row, each run alone from position 0."""
    import torch

    logits, start = [], 0
    for length in DOCUMENTS:
        with torch.no_grad():
            logits.append(model(tokens[:1, start : start + length]).logits)
        start += length
    return {
        "packed_segment_ids": np.repeat(np.arange(1, 4), DOCUMENTS)[None].astype(np.int32),
        "packed_position_ids": np.concatenate([np.arange(n) for n in DOCUMENTS])[None],
        "packed_logits": torch.cat(logits, 1).numpy(),
    }


def _generated(model, tokens):
    """Greedy decoding, recomputed without a cache."""
    import torch

    row, logits = tokens[:, :PROMPT], []
    for _ in range(NEW):
        with torch.no_grad():
            logits.append(model(row).logits[:, -1])
        top = logits[-1].topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 10 * MARGIN, "greedy margin; take another seed"
        row = torch.cat([row, logits[-1].argmax(-1, keepdim=True)], 1)
    return {
        "gen_prompt_len": np.int32(PROMPT),
        "gen_tokens": row[:, PROMPT:].numpy(),
        "gen_logits": torch.stack(logits, 1).numpy(),
    }


def _loss_and_gradients(model, tokens, mask):
    import torch

    logits = model(tokens).logits[:, :-1].reshape(-1, model.config.vocab_size)
    nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1), reduction="none")
    loss = nll.mean()
    loss.backward()
    keep = mask[:, 1:].reshape(-1)
    names, norms, projections = [], [], []
    for name, flat in _file_gradients(model):
        names.append(name)
        norms.append(np.linalg.norm(flat))
        projections.append(np.sum(flat * np.cos(0.37 * np.arange(flat.size) + 0.1)))
    return {
        "loss": loss.item(),
        "loss_masked": nll[keep].mean().item(),
        "grad_names": np.asarray(names),
        "grad_norm": np.asarray(norms),
        "grad_proj": np.asarray(projections),
    }


def _file_gradients(model):
    """Gradients by the names of the file, which splits what memory holds fused by expert."""
    for name, value in model.named_parameters():
        gradient = value.grad.double().numpy()
        if name.endswith("mlp.experts.gate_up_proj") and model.config.model_type != "gpt_oss":
            for expert, both in enumerate(gradient):
                for part, rows in zip(("gate", "up"), np.split(both, 2), strict=True):
                    short = name.removesuffix("gate_up_proj")
                    yield f"{short}{expert}.{part}_proj.weight", rows.ravel()
        elif name.endswith("mlp.experts.down_proj") and model.config.model_type != "gpt_oss":
            for expert, rows in enumerate(gradient):
                yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", rows.ravel()
        else:
            yield name, gradient.ravel()
