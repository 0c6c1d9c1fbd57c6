"""Load statistics of one layer's routing, the balance losses on them, and two controllers.

Everything is float32 and made of sums over tokens, so shards and micro-batches add up. Counts
are exact below 2^24 tokens. Every function works under `jax.vmap` over layers.

Letters: M tokens, E experts, C choices per token, J groups (or partitions) of G = E/J consecutive
experts each, P parts of the experts.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from lightning_jax.ops.routing import Choices, Routing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExchangeStats:
    """How the slots of one layer reached their experts; sums, as those of `RoutingStats`.

    Every slot is in one of the first three: sum(sent_P) + empty + dropped = tokens * C, padding
    included.

    sent_P: rows (filled slots) for each of the P parts of the experts; P is 1 on one device.
    empty: slots without an expert.
    dropped: slots beyond a capacity.
    rounds: rounds of all exchanges, counted on each device; 0 where nothing is exchanged.
    passes: exchanges, counted likewise: the divisor of `rounds`.
    """

    sent_P: jax.Array
    empty: jax.Array
    dropped: jax.Array
    rounds: jax.Array
    passes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingStats:
    """Sums over the tokens of one layer; add two with `jax.tree.map(jnp.add, a, b)`.

    `choices` are no sum; they are None unless they were asked for. Counts carry no gradient;
    `*prob_sum*`, entropy_sum and z_sum do. Padding is in none of them.

    tokens: real tokens.
    top1_count_E: tokens whose most probable expert is e.
    assigned_count_E: filled slots of expert e.
    prob_sum_E: sum of the probabilities (scores over their sum over all experts).
    group_member_count_J: tokens with at least one chosen expert in group j (the set B_g).
    group_prob_sum_E: sum over those members of p_e / (sum of p over the group of e).
    partition_member_count_J, partition_prob_sum_E: the same for the finer partitions.
    entropy_sum: sum of -sum_e p_e log p_e, in nats.
    z_sum: sum of logsumexp(logits)^2.
    kept_mass_sum: sum of the probability mass on the chosen experts.
    experts_histogram: C+1 bins, tokens that use c experts.
    exchange: how the choices were carried out; None if they were only counted.
    choices: the experts of each token, before any capacity.
    """

    tokens: jax.Array
    top1_count_E: jax.Array
    assigned_count_E: jax.Array
    prob_sum_E: jax.Array
    group_member_count_J: jax.Array
    group_prob_sum_E: jax.Array
    partition_member_count_J: jax.Array
    partition_prob_sum_E: jax.Array
    entropy_sum: jax.Array
    z_sum: jax.Array
    kept_mass_sum: jax.Array
    experts_histogram: jax.Array
    exchange: ExchangeStats | None = None
    choices: Choices | None = None


def routing_stats(
    routing: Routing,
    token_mask_M: jax.Array | None = None,
    *,
    num_groups: int = 1,
    num_partitions: int = 1,
) -> RoutingStats:
    """The sums of one layer's routing over its real tokens.

    Args:
      routing: from `ops.routing.route`; M stands for any number of leading axes.
      token_mask_M: bool, False for tokens to leave out. Tokens with no chosen expert, that is,
        those masked when routing, are left out anyway.
      num_groups: expert-parallel groups; must divide E.
      num_partitions: partitions per group; groups times partitions must divide E.

    Raises:
      ValueError: a grouping that does not divide E.
    """
    choices, scores = routing
    E = choices.num_experts
    _check_groups(E, num_groups, num_partitions)
    mask_M = choices.filled_MC[..., 0]
    if token_mask_M is not None:
        mask_M &= token_mask_M
    over_tokens = functools.partial(_sum_where, axes=tuple(range(mask_M.ndim)))
    mask_M1 = mask_M[..., None]
    # An empty slot's index, E, is outside the one-hot range.
    chosen_ME = jnp.any(jax.nn.one_hot(choices.expert_index_MC, E, dtype=bool), axis=-2) & mask_M1
    used_M = jnp.sum(choices.filled_MC, axis=-1)
    bins = choices.expert_index_MC.shape[-1] + 1
    frozen_ME = jax.lax.stop_gradient(scores.probs_ME)
    log_scores_ME = scores.log_scores_ME
    logprob_ME = jax.nn.log_softmax(log_scores_ME, axis=-1)
    entropy_M = -jnp.sum(scores.probs_ME * logprob_ME, axis=-1)
    z_M = jax.nn.logsumexp(scores.logits_ME, axis=-1) ** 2
    top1_ME = jax.nn.one_hot(jnp.argmax(frozen_ME, axis=-1), E, dtype=bool)
    group = _group_sums(over_tokens, log_scores_ME, chosen_ME, num_groups)
    partition = _group_sums(over_tokens, log_scores_ME, chosen_ME, num_groups * num_partitions)
    return RoutingStats(
        tokens=over_tokens(mask_M, 1.0),
        top1_count_E=over_tokens(mask_M1 & top1_ME, 1.0),
        assigned_count_E=over_tokens(chosen_ME, 1.0),
        prob_sum_E=over_tokens(mask_M1, scores.probs_ME),
        group_member_count_J=group[0],
        group_prob_sum_E=group[1],
        partition_member_count_J=partition[0],
        partition_prob_sum_E=partition[1],
        entropy_sum=over_tokens(mask_M, entropy_M),
        z_sum=over_tokens(mask_M, z_M),
        kept_mass_sum=jnp.sum(over_tokens(chosen_ME, frozen_ME)),
        experts_histogram=over_tokens(mask_M1 & jax.nn.one_hot(used_M, bins, dtype=bool), 1.0),
    )


def _check_groups(E: int, num_groups: int, num_partitions: int) -> None:
    for name, parts in (("num_groups", num_groups), ("num_partitions", num_partitions)):
        if parts < 1:
            raise ValueError(f"{name} must be at least 1, got {parts}")
    if E % (num_groups * num_partitions):
        raise ValueError(
            f"num_groups * num_partitions must divide the number of experts, {E}, "
            f"got {num_groups} * {num_partitions}"
        )


def _sum_where(mask, values, *, axes) -> jax.Array:
    """Sum over tokens of `values` where `mask`; a where, so that NaN padding adds nothing."""
    return jnp.sum(jnp.where(mask, values, 0.0), axis=axes, dtype=jnp.float32)


def _group_sums(over_tokens, log_scores_ME, chosen_ME, num_groups):
    *M, E = log_scores_ME.shape
    member_MJ = jnp.any(chosen_ME.reshape(*M, num_groups, -1), axis=-1)
    # A softmax inside the group is p over the group's sum, without dividing by an underflow.
    prob_MJG = jax.nn.softmax(log_scores_ME.reshape(*M, num_groups, -1), axis=-1)
    prob_sum = over_tokens(member_MJ[..., None], prob_MJG)
    return over_tokens(member_MJ, 1.0), prob_sum.reshape(E)


def balance_losses(stats: RoutingStats, counts: RoutingStats | None = None) -> dict[str, jax.Array]:
    """Returns the balance losses of one layer by name, float32 scalars without their weights.

    Each is linear in the differentiable sums of `stats` once the counts are fixed: with `counts`
    of the whole global batch, the losses of its shards or micro-batches *add up* to the loss of
    the batch, in value and gradient (global-batch balance, 2501.11873). Sum them, never average.

    Keys, all 1 at perfect balance unless said:
      switch: E * sum_e f_e P_e, f the top-1 share, P the mean probability (2101.03961 eq. 4; the
        Yi-Lightning report's L_ST, 2412.01253).
      group: Yi-Lightning's L_EP as printed: N_g * sum_{e in g} f_e P_e per expert-parallel group
        g of N_g experts, over the tokens B_g routed to it, averaged over groups. The report's
        text speaks of balance between groups, but the formula is per expert *within* a group; it
        does not define P on B_g either. Here P is normalised inside the group and f is the share
        of the group's assignments, so that both sum to 1.
      partition: L_PEP, the same over the finer partitions of the groups.
      true_group: G * sum_g f_g P_g between groups, f_g the share of all assignments (Step 3.5
        Flash), as the report's text describes; blind to imbalance inside a group.
      z: mean of logsumexp(logits)^2 (2202.08906); 0 at best.
      entropy: mean router entropy in nats, L_dyn of 2403.07652; log E when uniform.

    Args:
      stats: sums whose probabilities are differentiated.
      counts: sums over the whole global batch, for the token counts and shares f; default stats.

    With no token, every loss is 0.
    """
    counts = jax.lax.stop_gradient(stats if counts is None else counts)
    E = stats.prob_sum_E.shape[-1]
    top1_share_E = _ratio(counts.top1_count_E, counts.tokens)
    share_J = _by_group(counts.assigned_count_E, counts.group_member_count_J)
    share_J = _ratio(jnp.sum(share_J, axis=-1), jnp.sum(counts.assigned_count_E))
    prob_J = jnp.sum(_by_group(stats.prob_sum_E, counts.group_member_count_J), axis=-1)
    return {
        "switch": E * jnp.sum(top1_share_E * _ratio(stats.prob_sum_E, counts.tokens)),
        "group": _within_groups(
            counts.assigned_count_E, counts.group_member_count_J, stats.group_prob_sum_E
        ),
        "partition": _within_groups(
            counts.assigned_count_E, counts.partition_member_count_J, stats.partition_prob_sum_E
        ),
        "true_group": share_J.shape[0] * jnp.sum(share_J * _ratio(prob_J, counts.tokens)),
        "z": _ratio(stats.z_sum, counts.tokens),
        "entropy": _ratio(stats.entropy_sum, counts.tokens),
    }


def _within_groups(assigned_E, member_count_J, prob_sum_E):
    assigned_JG = _by_group(assigned_E, member_count_J)
    share_JG = _ratio(assigned_JG, jnp.sum(assigned_JG, axis=-1, keepdims=True))
    prob_JG = _ratio(_by_group(prob_sum_E, member_count_J), member_count_J[:, None])
    return assigned_JG.shape[1] * jnp.mean(jnp.sum(share_JG * prob_JG, axis=-1))


def _by_group(values_E, member_count_J):
    return values_E.reshape(member_count_J.shape[0], -1)


def _ratio(a, b):
    """a / b, and 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def routing_metrics(stats: RoutingStats) -> dict[str, jax.Array]:
    """Returns the metrics of one layer to log, float32.

    Keys: mean_experts (filled slots per token), load_max_over_mean (1 when balanced),
    dead_experts (how many had no token), entropy (nats per token), kept_mass (probability on the
    chosen experts), histogram (share of tokens that use 0..C experts). With `stats.exchange` also
    rows_sent (to experts, wherever they are), part_max_over_mean (rows of the most loaded part),
    exchange_rounds (of one exchange) and dropped_share (of the rows, beyond a capacity).
    """
    stats = jax.lax.stop_gradient(stats)
    assigned_E = stats.assigned_count_E
    metrics = {
        "mean_experts": _ratio(jnp.sum(assigned_E), stats.tokens),
        "load_max_over_mean": _ratio(jnp.max(assigned_E), jnp.mean(assigned_E)),
        "dead_experts": jnp.sum(assigned_E == 0, dtype=jnp.float32),
        "entropy": _ratio(stats.entropy_sum, stats.tokens),
        "kept_mass": _ratio(stats.kept_mass_sum, stats.tokens),
        "histogram": _ratio(stats.experts_histogram, stats.tokens),
    }
    if (exchange := stats.exchange) is not None:
        sent = jnp.sum(exchange.sent_P)
        metrics |= {
            "rows_sent": sent,
            "part_max_over_mean": _ratio(jnp.max(exchange.sent_P), jnp.mean(exchange.sent_P)),
            "exchange_rounds": _ratio(exchange.rounds, exchange.passes),
            "dropped_share": _ratio(exchange.dropped, sent + exchange.dropped),
        }
    return metrics


def update_bias(bias_E: jax.Array, assigned_count_E: jax.Array, *, rate: float) -> jax.Array:
    """One step of loss-free balancing: b += rate * sign(mean load - load), then mean-centred.

    Taken once per optimizer step, on the counts of the global batch (2408.15664). The mean is
    removed because the bias would otherwise drift against the probabilities it is added to.
    """
    load_E = jax.lax.stop_gradient(assigned_count_E)
    bias_E = bias_E + rate * jnp.sign(jnp.mean(load_E) - load_E)
    return bias_E - jnp.mean(bias_E)


# Bounds of the controller's p. Float32 sums of probabilities resolve about 1e-7, and from 1 on a
# threshold would mean all experts, whatever their probabilities.
LOWEST_P, HIGHEST_P = 0.01, 1 - 2.0**-20


def control_top_p(
    top_p: jax.Array,
    last_error: jax.Array,
    mean_experts: jax.Array,
    *,
    target: float,
    kp: float,
    ki: float,
) -> tuple[jax.Array, jax.Array]:
    """One step of the controller of the mean number of experts per token.

    With the error e = log(target / mean_experts), the threshold moves by

        logit(p) += ki * e + kp * (e - last e),    p within [LOWEST_P, HIGHEST_P].

    This is the PI controller of DTop-p (2512.13996) in other coordinates, and in its incremental
    form: all it needs to remember is p itself and the last error, and it cannot wind up. One step
    of logit(p) changes log(mean_experts) by 0.05 to 1.5 steps, from a uniform router (where p is a
    number of experts) to one whose logits have standard deviation 12 (where 1 - p is the mass of a
    tail). So one gain serves all routers: below 1 it does not ring. With errors in p itself, a
    sharp router swings between one expert and all.

    Args:
      top_p: the threshold that the step routed with; its only home is the router's state.
      last_error: e of the step before; 0 before the first.
      mean_experts: experts per token of the global batch; 0 without tokens, which changes nothing.
      target: experts per token to hold.
      kp, ki: proportional and integral gain, per optimizer step.

    Returns:
      (top_p of the next step, e), float32.
    """
    mean_experts = jax.lax.stop_gradient(mean_experts)
    error = jnp.log(target / jnp.where(mean_experts > 0, mean_experts, target))
    p = jnp.clip(top_p.astype(jnp.float32), LOWEST_P, HIGHEST_P)
    moved = jax.scipy.special.logit(p) + ki * error + kp * (error - last_error)
    return jnp.clip(jax.nn.sigmoid(moved), LOWEST_P, HIGHEST_P), error
