"""Held-out loss by domain and by position in the document."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.checkpoint import load_run
from lightning_jax.config import MeshConfig, RunConfig, SourceConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import LARGEST_COUNT, require
from lightning_jax.config.kinds import LARGEST_INDEX
from lightning_jax.config.routing import EvalRouting
from lightning_jax.data import round_trip
from lightning_jax.data.batch import Batch
from lightning_jax.data.mixture import EvalBatches, eval_batches
from lightning_jax.data.sources import Sources
from lightning_jax.data.tokenizer import Tokenizer, resolve_tokenizer
from lightning_jax.runtime import compiler
from lightning_jax.runtime.phases import phase
from lightning_jax.train import recall_evaluation
from lightning_jax.train import step as steps
from lightning_jax.train.placement import put_whole
from lightning_jax.train.plan import Plan

logger = logging.getLogger(__name__)

ONE_DEVICE = MeshConfig(**dict.fromkeys(sharding.MESH_AXES, 1))
POSITION_BUCKETS = (16, 64, 256, 1024, 4096, 16384)


def make_eval_step(config: RunConfig, mesh: Mesh) -> Callable[..., Any]:
    """Returns the jitted `(params, router, batch, rope_base_global) -> {"nll_BT", "stats"}`.

    The outputs are whole on every device. It compiles once for each shape of batch.
    """

    def eval_step(params: Any, router: lm.Router, batch: Batch, rope_base_global: Any) -> Any:
        return steps.eval_step(config, params, router, batch, rope_base_global)

    return jax.jit(
        eval_step, out_shardings=sharding.replicated(mesh), compiler_options=compiler.options()
    )


def position_buckets(seq_len: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions, growing by 4, that cover `seq_len`."""
    edges = [0, *[edge for edge in POSITION_BUCKETS if edge < seq_len], seq_len]
    return list(zip(edges[:-1], edges[1:], strict=True))


def evaluate_batches(
    eval_step: Callable[[Batch], Any],
    batches: EvalBatches,
    mesh: Mesh,
    *,
    domain: str,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluates one domain; `eval_step` maps a batch on the mesh to a result of `step.eval_step`.

    `before_batch` is called before each batch, and may raise.

    Returns `loss` (nats per token), `perplexity`, `bits_per_byte` (of the text's UTF-8 bytes; the
    end-of-document tokens' cost is included; None for a text without bytes, and for one that the
    tokenizer changes, then with the reason in `no_bits_per_byte`), `tokens`, `bytes`,
    `loss_by_position` and, with routed experts, `experts_per_token` (mean over layers) and
    `experts_by_layer`.

    Raises:
      UserError: there is no token to predict.
    """
    buckets = position_buckets(batches.seq_len)
    nll, tokens = np.zeros(len(buckets)), np.zeros(len(buckets), np.int64)
    used: list[np.ndarray] = []
    seen: list[np.ndarray] = []
    with phase(f"evaluating {domain}") as now:
        for number, batch in enumerate(batches, 1):
            now.detail = f"batch {number} of {len(batches)}"
            before_batch()
            result = eval_step(put_whole(batch, mesh))
            nll_BT, mask_BT = np.asarray(result["nll_BT"], np.float64), batch.loss_mask > 0
            for index, (low, high) in enumerate(buckets):
                inside = mask_BT & (batch.positions >= low) & (batch.positions < high)
                nll[index] += nll_BT[inside].sum()
                tokens[index] += inside.sum()
            if result["stats"] is not None:
                counts = np.asarray(result["stats"].assigned_count_E, np.float64)
                used.append(counts.sum(-1).ravel())
                seen.append(np.asarray(result["stats"].tokens, np.float64).ravel())
    if not tokens.sum():
        raise UserError(f"evaluation: nothing to measure: {domain!r} has no held-out tokens")
    loss = nll.sum() / tokens.sum()
    is_comparable = batches.num_bytes > 0 and not batches.lost_bytes
    row: dict[str, Any] = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": nll.sum() / math.log(2) / batches.num_bytes if is_comparable else None,
        "tokens": int(tokens.sum()),
        "bytes": batches.num_bytes,
        "loss_by_position": {
            f"{low}-{high - 1}": nll[i] / tokens[i]
            for i, (low, high) in enumerate(buckets)
            if tokens[i]
        },
    }
    if batches.lost_bytes:
        row["no_bits_per_byte"] = round_trip.reason(batches.lost_bytes, batches.num_bytes)
    if used:
        by_layer = np.sum(used, axis=0) / np.maximum(np.sum(seen, axis=0), 1)
        row["experts_per_token"] = float(by_layer.mean())
        row["experts_by_layer"] = by_layer.tolist()
    return row


class Evaluator:
    """Evaluates the held-out part of every source; keeps compiled code and tokens.

    Construct it under `jax.set_mesh(mesh)`, or without a mesh for one device.
    """

    def __init__(self, config: RunConfig, sources: Sources, tokenizer: Tokenizer, mesh: Mesh):
        self._config, self._sources, self._tokenizer, self._mesh = config, sources, tokenizer, mesh
        self._batches: dict[tuple[int, int, int], dict[str, EvalBatches]] = {}
        self._step = make_eval_step(config, mesh)
        self._greedy_step = recall_evaluation.make_greedy_step(config, mesh)

    def __call__(
        self,
        params: Any,
        router: lm.Router,
        *,
        seq_len: int,
        batch_size: int,
        rope_base_global: float,
        weights: str,
        max_tokens: int = 0,
        recall: bool = False,
        before_document: Callable[[], None] = lambda: None,
        before_batch: Callable[[], None] = lambda: None,
    ) -> dict[str, dict[str, Any]]:
        """Returns `evaluate_batches` of each source, over `max_tokens` of its tokens (0: all).

        With `recall` a source that is a recall task also has `recall`, what `evaluate_recall`
        finds in `max_tokens` of its examples. Each result names its `weights`: "params", or "ema"
        if `params` are their average. `before_document` is called before a document is tokenized,
        once for each shape of batch, and `before_batch` before each batch; what they raise ends the
        evaluation.
        """
        shape = (seq_len, batch_size, max_tokens)
        if shape not in self._batches:
            with phase("tokenizing the held-out text"):
                self._batches[shape] = {
                    name: eval_batches(
                        source,
                        tokenizer=self._tokenizer,
                        seq_len=seq_len,
                        batch_size=batch_size,
                        max_tokens=max_tokens,
                        before_document=before_document,
                    )
                    for name, source in self._sources.eval.items()
                }
        base = np.float32(rope_base_global)
        eval_step = lambda batch: self._step(params, router, batch, base)  # noqa: E731
        results: dict[str, dict[str, Any]] = {
            name: {
                "weights": weights,
                **evaluate_batches(
                    eval_step, batches, self._mesh, domain=name, before_batch=before_batch
                ),
            }
            for name, batches in self._batches[shape].items()
        }
        greedy_step = lambda batch: self._greedy_step(params, router, batch, base)  # noqa: E731
        for name, source in self._sources.eval.items() if recall else ():
            if documents := recall_evaluation.task_of(source):
                results[name]["recall"] = recall_evaluation.evaluate_recall(
                    greedy_step,
                    documents,
                    self._tokenizer,
                    self._mesh,
                    window=self._config.model.attention.window,
                    batch_tokens=seq_len * batch_size,
                    max_tokens=max_tokens,
                    before_batch=before_batch,
                )
        return results


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Settings of a run that an evaluation replaces; None keeps the run's own.

    Raises:
      UserError: a number out of its range.
    """

    data: str | None = None
    step: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    max_tokens: int | None = None
    routing: EvalRouting = EvalRouting()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("seq_len", 1, LARGEST_INDEX),
            ("batch_size", 1, LARGEST_INDEX),
            ("max_tokens", 0, LARGEST_COUNT),
        ):
            value = getattr(self, name)
            fits = value is None or low <= value <= high
            require(fits, f"eval.{name}", value, f"in [{low}, {high}]")
        require(self.step is None or self.step >= 0, "step", self.step, "0 or more")


def evaluate_run(workdir: str, options: EvalOptions) -> dict[str, Any]:
    """Evaluates a checkpoint of a run on its held-out text, or on the files of `options.data`.

    Which text that is, is logged: imported weights know none of their own.

    Returns:
      `step`, `weights` ("ema" where the run keeps an average, else "params"), `routing`, `data`,
      which says by domain the path of its text, and which `split` of it was measured ("held out" or
      "all"), and `domains`, which maps each domain to the result of `evaluate_batches`.

    Raises:
      UserError: no such run, checkpoint or data, an option that the run's model cannot take, or a
        loss that is not finite.
    """
    loaded = load_run(workdir, step=options.step).with_routing(options.routing)
    config, router = loaded.config, loaded.router
    data = config.data
    if options.data:
        source = SourceConfig("data", path=options.data, eval_path=options.data, weight=0.0)
        data = dataclasses.replace(data, sources=(source,))
    texts = {source.name: _measured(source) for source in data.sources}
    _say(texts, is_imported=not loaded.meta.step and not options.data)
    rows = config.model.vocab_size
    tokenizer = resolve_tokenizer(Sources.open(config.data), workdir, rows=rows)
    mesh = sharding.make_mesh(ONE_DEVICE, jax.devices()[:1])
    segment = Plan.of(config).last_trained(loaded.meta.step)
    limit = config.final_eval_tokens if options.max_tokens is None else options.max_tokens
    domains = Evaluator(config, Sources.open(data), tokenizer, mesh)(
        loaded.params,
        router,
        seq_len=options.seq_len or segment.seq_len,
        batch_size=options.batch_size or segment.micro_batch,
        rope_base_global=loaded.model.attention.rope_base_global,
        weights=loaded.weights,
        max_tokens=limit,
        recall=True,
    )
    require_finite(domains)
    moe = config.model.moe
    routing: dict[str, Any] = {"kind": moe.eval_routing if moe.num_experts else "dense MLP"}
    if moe.num_experts:
        routing |= {"top_k": moe.top_k, "top_p": float(router.top_p)}
    return {
        "step": loaded.meta.step,
        "weights": loaded.weights,
        "routing": routing,
        "data": texts,
        "domains": domains,
    }


def _measured(source: SourceConfig) -> dict[str, str]:
    """Where the text of a domain is, and which part of it is evaluated."""
    if source.eval_path:
        return {"path": source.eval_path, "split": "all"}
    return {"path": source.path, "split": "held out"}


def _say(texts: Mapping[str, Mapping[str, str]], is_imported: bool) -> None:
    found = ", ".join(f"{name} = {row['path']} ({row['split']})" for name, row in texts.items())
    if is_imported:
        logger.warning(
            "text     %s: these weights were imported, and not trained on it; --data=FILES "
            "evaluates them on other text",
            found,
        )
    else:
        logger.info("text     %s", found)


def require_finite(results: dict[str, dict[str, Any]]) -> None:
    """Raises a UserError that names the first domain whose loss is not finite."""
    for name, row in results.items():
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"evaluation: the loss of {name!r} is {row['loss']}: with these weights "
                f"({row['weights']}) the model computes numbers that are not finite"
            )


def one_line(results: dict[str, dict[str, Any]]) -> str:
    """Returns the bits per byte of each domain as one line of text, in nats per token without."""
    return "held out: " + "  ".join(
        f"{name} {row['loss']:.3f} nats/token"
        + (f" ({row['no_bits_per_byte']})" if "no_bits_per_byte" in row else "")
        if row["bits_per_byte"] is None
        else f"{name} {row['bits_per_byte']:.3f} bits/byte"
        for name, row in results.items()
    )
