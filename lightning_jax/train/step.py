"""The train step: loss, gradient, update, as pure functions of a state, a batch and knobs.

Everything here is a function of the *global* batch: the loss divides by the global number of target
tokens and balance statistics are sums over all tokens, so neither the mesh nor the number of
micro-batches changes a value or a gradient (beyond float32 rounding).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lightning_jax import model as lm
from lightning_jax import sharding
from lightning_jax.config import MoeConfig, RunConfig
from lightning_jax.data.batch import Batch
from lightning_jax.layers import vocabulary
from lightning_jax.ops import balance
from lightning_jax.train.optimizer import update_ema
from lightning_jax.train.plan import Knobs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes. `ema` is empty without averaging.

    `step` counts all batches, `bad_steps` those whose loss or gradient was not finite. The router's
    p is in `router` alone; `controller` is the last error of the controller that moves it.
    """

    step: jax.Array
    bad_steps: jax.Array
    params: Any
    ema: Any
    optimizer: Any
    router: lm.Router
    controller: jax.Array


def init_state(
    config: RunConfig, optimizer: optax.GradientTransformation, seed: int | jax.Array
) -> TrainState:
    """Returns the state before the first step; jit it with the shardings wanted.

    The seed is an argument so that all seeds of a config are one program.
    """
    params = lm.init_params(config.model, jax.random.key(seed))
    return TrainState(
        step=jnp.int32(0),
        bad_steps=jnp.int32(0),
        params=params,
        ema=jax.tree.map(jnp.copy, params) if config.optimizer.ema_decay else {},
        optimizer=optimizer.init(params),
        router=lm.init_router(config.model),
        controller=jnp.float32(0),
    )


def weighted_balance_loss(
    weights: dict[str, Any], stats: balance.RoutingStats, counts: balance.RoutingStats | None
) -> jax.Array:
    """Weighted sum of the balance losses named in `weights`, mean over routed layers.

    `stats` and `counts` lead with [U, R] axes; with `counts` of the whole batch, the values of its
    micro-batches add up to that of the batch.
    """
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), (stats, counts))
    losses = jax.vmap(balance.balance_losses)(*flat)
    weighted = (weight * losses[name].mean() for name, weight in weights.items())
    return sum(weighted, start=jnp.zeros((), jnp.float32))


def forward_loss(
    config: RunConfig,
    params: Any,
    router: lm.Router,
    batch: Batch,
    knobs: Knobs,
    *,
    total_weight: jax.Array,
    counts: balance.RoutingStats | None,
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns this (micro-)batch's part of the loss, and sums for the metrics.

    Args:
      total_weight: target tokens of the whole batch, the divisor of the cross-entropy.
      counts: routing statistics of the whole batch where this is a part of it.
    """
    model = lm.LightningLM(config.model, train=True)
    output = model.apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        router=router,
        rope_base_global=knobs.rope_base_global,
    )
    with jax.named_scope("head"):
        loss_sum, nll_sum, z_sum = vocabulary.cross_entropy(
            output.hidden_BTD,
            output.head_DV,
            batch.targets,
            batch.loss_mask,
            z_weight=knobs.z_loss_weight,
            chunk=config.model.head_chunk,
        )
    divisor = jnp.maximum(total_weight, 1)
    objective = loss_sum / divisor
    if output.stats is not None:
        objective += weighted_balance_loss(knobs.balance_weights, output.stats, counts)
    return objective, {"nll": nll_sum / divisor, "z_loss": z_sum / divisor, "stats": output.stats}


def _split(batch: Batch, parts: int) -> Batch:
    """Leaves [B, T] -> [parts, B / parts, T]; every device keeps its own rows."""
    return jax.tree.map(
        lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), batch
    )


def loss_and_grad(
    config: RunConfig,
    params: Any,
    router: lm.Router,
    batch: Batch,
    knobs: Knobs,
    *,
    accumulate: int,
) -> tuple[jax.Array, dict[str, Any], Any]:
    """Returns (loss, sums for the metrics, gradient) of the batch in `accumulate` parts.

    Balance losses weigh each token's router probabilities by how often the *whole* batch chose each
    expert. So accumulation costs one extra forward pass (a third more), which counts assignments
    before the pass that differentiates.
    """
    total_weight = batch.loss_mask.sum()

    def part(params: Any, micro: Batch, counts: balance.RoutingStats | None) -> Any:
        return forward_loss(
            config,
            params,
            router,
            micro,
            knobs,
            total_weight=total_weight,
            counts=counts,
        )

    differentiate = jax.value_and_grad(part, has_aux=True)
    if accumulate == 1:
        (value, sums), grads = differentiate(params, batch, None)
        return value, sums, grads
    micros = jax.tree.map(
        lambda a: sharding.shard(a, None, "batch", "sequence"), _split(batch, accumulate)
    )

    def summed(function: Callable[[Batch], Any]) -> Any:
        first = jax.tree.map(lambda a: a[0], micros)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, first))
        body = lambda total, micro: (jax.tree.map(jnp.add, total, function(micro)), None)  # noqa: E731
        return jax.lax.scan(body, zeros, micros)[0]

    counts = None
    if knobs.balance_weights:
        counts = summed(lambda micro: part(params, micro, None)[1]["stats"])
    (value, sums), grads = summed(lambda micro: differentiate(params, micro, counts))
    return value, sums, grads


def _update_router(
    moe: MoeConfig, router: lm.Router, controller: jax.Array, stats: balance.RoutingStats
) -> tuple[lm.Router, jax.Array]:
    """Updates the selection bias and the controller from the counts of the global batch."""
    bias_URE, top_p = router.bias_URE, router.top_p
    if moe.bias_update_rate:
        update = lambda bias, load: balance.update_bias(bias, load, rate=moe.bias_update_rate)  # noqa: E731
        bias_URE = jax.vmap(jax.vmap(update))(bias_URE, stats.assigned_count_E)
    if moe.target_experts:
        used = stats.assigned_count_E.sum() / jnp.maximum(stats.tokens.sum(), 1)
        top_p, controller = balance.control_top_p(
            top_p,
            controller,
            used,
            target=moe.target_experts,
            kp=moe.controller_kp,
            ki=moe.controller_ki,
        )
    return lm.Router(bias_URE, top_p), controller


def train_step(
    config: RunConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    knobs: Knobs,
    *,
    accumulate: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state after one optimizer step, and its metrics (arrays on the device).

    Compile it for each number of micro-batches `accumulate` and each batch shape; `knobs` are
    traced.

    A step whose loss or gradient is not finite changes nothing but the counters. With
    `optimizer.on_nan = "stop"` no later step changes anything either, so that the loop, which sees
    metrics one step late, still has the last good state to save.
    """
    value, sums, grads = loss_and_grad(
        config,
        state.params,
        state.router,
        batch,
        knobs,
        accumulate=accumulate,
    )
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    good = finite & (state.bad_steps == 0) if config.optimizer.on_nan == "stop" else finite

    rate, stats = knobs.learning_rate, sums["stats"]
    # Not an elementwise select, for which XLA would copy the moments to hold both versions.
    new = jax.lax.cond(
        good, lambda: _updated(config, optimizer, state, grads, rate, stats), lambda: state
    )
    new = dataclasses.replace(new, step=state.step + 1, bad_steps=state.bad_steps + ~finite)
    metrics = {
        "loss": sums["nll"],
        "objective": value,
        "output_z_loss": sums["z_loss"],
        "grad_norm": grad_norm,
        "learning_rate": rate,
        "bad_steps": new.bad_steps,
        # Exact in int32, for the config bounds the tokens of a step; float32 counts to 2^24.
        "target_tokens": jnp.sum(batch.loss_mask > 0, dtype=jnp.int32),
    }
    if stats is not None:
        metrics["top_p"] = state.router.top_p
        metrics["router"] = jax.vmap(jax.vmap(balance.routing_metrics))(stats)
        metrics["bias_max"] = jnp.abs(new.router.bias_URE).max()
    return new, metrics


def _updated(config, optimizer, state, grads, rate, stats) -> TrainState:
    """Returns the state after a good step, its counters not yet advanced."""
    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    new = dataclasses.replace(state, params=params, optimizer=optimizer_state)
    if state.ema:
        updates = state.step - state.bad_steps
        ema = update_ema(state.ema, params, config.optimizer.ema_decay, updates)
        new = dataclasses.replace(new, ema=ema)
    if stats is not None:
        router, controller = _update_router(config.model.moe, state.router, state.controller, stats)
        new = dataclasses.replace(new, router=router, controller=controller)
    return new


def eval_step(
    config: RunConfig,
    params: Any,
    router: lm.Router,
    batch: Batch,
    rope_base_global: float | jax.Array,
) -> dict[str, Any]:
    """Returns the cross-entropy of each position in nats, and statistics under `eval_routing`."""
    output = _evaluated(config, params, router, batch, rope_base_global)
    nll_BT = vocabulary.token_losses(
        output.hidden_BTD, output.head_DV, batch.targets, chunk=config.model.head_chunk
    )
    return {"nll_BT": nll_BT * batch.loss_mask, "stats": output.stats}


def greedy_step(
    config: RunConfig,
    params: Any,
    router: lm.Router,
    batch: Batch,
    rope_base_global: float | jax.Array,
) -> jax.Array:
    """Returns whether each target is the most probable id after the tokens before it, bool [B, T].

    If all tokens of an answer are, greedy decoding gives that answer.
    """
    output = _evaluated(config, params, router, batch, rope_base_global)
    rank_BT = vocabulary.target_ranks(
        output.hidden_BTD, output.head_DV, batch.targets, chunk=config.model.head_chunk
    )
    return rank_BT == 1


def _evaluated(config, params, router, batch, rope_base_global) -> lm.Output:
    return lm.LightningLM(config.model).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        router=router,
        rope_base_global=rope_base_global,
    )
