"""The choice of experts for each token, and the order in which the slots are computed.

Letters: M tokens, E experts, C choices (slots) per token, S = M*C slots, D model width, J groups of
G consecutive experts, R rows. In `route` and its results M stands for any number of leading axes,
such as [B, T].
Everything here is float32: bfloat16 cumulative sums over many experts mis-threshold.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lightning_jax.config.errors import suggest

KINDS = ("top_k", "top_p", "dense")
SCORES = ("softmax", "sigmoid")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choices:
    """The experts of each token: everything that their computation needs.

    expert_index_MC: int32, the chosen experts in selection order; `num_experts` marks an empty
      slot. Filled slots come first.
    gate_MC: float32, the weight of each choice; 0 in empty slots. Differentiable.
    num_experts: static, E.
    """

    expert_index_MC: jax.Array
    gate_MC: jax.Array
    num_experts: int = dataclasses.field(metadata={"static": True})

    @property
    def filled_MC(self) -> jax.Array:
        return self.expert_index_MC < self.num_experts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
    """The router's scores of every expert: with the choices, all that balance losses need.

    logits_ME: float32 router logits; 0 for masked tokens. Differentiable.
    probs_ME: float32 scores over their sum over all E experts. Differentiable.
    score: static, "softmax" or "sigmoid": how the scores come from the logits.
    """

    logits_ME: jax.Array
    probs_ME: jax.Array
    score: str = dataclasses.field(default="softmax", metadata={"static": True})

    @property
    def log_scores_ME(self) -> jax.Array:
        """Logarithms of the scores, up to a constant per token: their softmax is `probs_ME`."""
        return _log_scores(self.logits_ME, self.score)


class Routing(NamedTuple):
    """The choices of M tokens, and the scores that they were made from."""

    choices: Choices
    scores: Scores


def _log_scores(logits_ME: jax.Array, score: str) -> jax.Array:
    return logits_ME if score == "softmax" else jax.nn.log_sigmoid(logits_ME)


def route(
    logits_ME: jax.Array,
    *,
    kind: str,
    slots: int,
    score: str = "softmax",
    top_p: float | jax.Array = 1.0,
    bias_E: jax.Array | None = None,
    renormalize: bool = False,
    token_mask_M: jax.Array | None = None,
    num_groups: int = 1,
    max_groups: int = 0,
) -> Routing:
    """Chooses experts for each token from router logits.

    Kinds:
      "top_k": exactly `slots` experts.
      "top_p": the smallest set, in sorted order, whose probabilities reach `top_p`; the expert
        that crosses is kept, so there is always one; at most `slots`. `top_p >= 1` means all up
        to `slots` whatever the rounding (Huang et al. 2403.07652; cap as in XMoE, 2403.18926).
      "dense": all E experts in index order; `slots` must be E.
    Equal scores go to the lower index. Scores are a softmax over the experts, or a sigmoid of each
    logit (DeepSeek-V3, 2412.19437 section 2.1.2), whose probability mass is its share of the sum.

    Args:
      logits_ME: router logits, any float dtype; computed in float32.
      kind: one of the above.
      slots: C, static.
      score: "softmax" or "sigmoid".
      top_p: probability mass to reach: a number, a traced scalar, or one value per token. Read by
        "top_p" only.
      bias_E: added to the scores to order the selection, and for nothing else: gates and
        probability mass stay unbiased, and no gradient reaches it (2408.15664). It cannot change
        "dense", which selects every expert.
      renormalize: divide the gates by their sum over the chosen; else raw scores.
      token_mask_M: bool, False for padding, whose slots are all empty and which has no gradient.
      num_groups: groups of consecutive experts, E / num_groups in each.
      max_groups: the experts of a token come from at most so many groups, those with the largest
        sum of their two best selection scores; 0 for no limit (device-limited routing, 2405.04434
        section 2.2.2; in this form 2412.19437 section 2.1.2). The probability mass that "top_p"
        has to reach is still that of all experts, so it may take all `slots` and not reach it.

    Raises:
      ValueError: unknown kind or score, bad `slots`, `top_p` not above 0, groups without enough
        experts, or shapes that misfit.
    """
    _check(logits_ME, kind, score, slots, top_p, bias_E, token_mask_M)
    _check_groups(logits_ME.shape[-1], slots, num_groups, max_groups)
    E = logits_ME.shape[-1]
    logits_ME = logits_ME.astype(jnp.float32)
    if token_mask_M is not None:
        # Before the softmax, so that not even a NaN in padding reaches a gradient.
        logits_ME = jnp.where(token_mask_M[..., None], logits_ME, 0.0)
    probs_ME = jax.nn.softmax(_log_scores(logits_ME, score), axis=-1)
    scores_ME = probs_ME if score == "softmax" else jax.nn.sigmoid(logits_ME)

    if kind == "dense":
        index_MC = jax.lax.broadcasted_iota(jnp.int32, logits_ME.shape, logits_ME.ndim - 1)
        gate_MC = scores_ME
    else:
        order_ME = jax.lax.stop_gradient(scores_ME)
        if bias_E is not None:
            bias_E = jax.lax.stop_gradient(bias_E.astype(jnp.float32))
            order_ME += jnp.broadcast_to(bias_E, order_ME.shape)
        if max_groups:
            order_ME = _within_groups(order_ME, num_groups, max_groups)
        _, index_MC = jax.lax.top_k(order_ME, slots)
        gate_MC = jnp.take_along_axis(scores_ME, index_MC, axis=-1)

    keep_MC = jnp.ones(index_MC.shape, bool)
    if kind == "top_p":
        mass_MC = jnp.take_along_axis(jax.lax.stop_gradient(probs_ME), index_MC, axis=-1)
        keep_MC = _reaches(mass_MC, jnp.asarray(top_p, jnp.float32))
    if token_mask_M is not None:
        keep_MC &= token_mask_M[..., None]
    gate_MC = jnp.where(keep_MC, gate_MC, 0.0)
    if renormalize:
        total_M = jnp.sum(gate_MC, axis=-1)
        gate_MC = gate_MC / jnp.where(total_M > 0, total_M, 1.0)[..., None]
    choices = Choices(jnp.where(keep_MC, index_MC, E), gate_MC, E)
    return Routing(choices, Scores(logits_ME, probs_ME, score))


def _within_groups(order_ME: jax.Array, num_groups: int, max_groups: int) -> jax.Array:
    """-inf for the experts outside of each token's best groups."""
    order_MJG = order_ME.reshape(*order_ME.shape[:-1], num_groups, -1)
    best_MJ2, _ = jax.lax.top_k(order_MJG, min(2, order_MJG.shape[-1]))
    _, group_MX = jax.lax.top_k(jnp.sum(best_MJ2, axis=-1), max_groups)
    allowed_MJ = jnp.any(jax.nn.one_hot(group_MX, num_groups, dtype=bool), axis=-2)
    return jnp.where(allowed_MJ[..., None], order_MJG, -jnp.inf).reshape(order_ME.shape)


def limit_capacity(choices: Choices, capacity: int) -> Choices:
    """Empties the slots beyond `capacity` of each expert within each row of tokens.

    Earlier tokens of a row win. A row is the last token axis: index [B, T, C] has B rows, so what
    is dropped depends neither on the mesh nor on micro-batches (groups of GShard, 2006.16668
    section 2.2). The gates that stay keep their values. Filled slots need no longer come first.
    """
    E = choices.num_experts
    chosen_MTE = jnp.any(jax.nn.one_hot(choices.expert_index_MC, E, dtype=jnp.int32) > 0, axis=-2)
    earlier_MTE = jnp.cumsum(chosen_MTE, axis=-2, dtype=jnp.int32) - chosen_MTE
    index_MC = jnp.minimum(choices.expert_index_MC, E - 1)
    rank_MC = jnp.take_along_axis(earlier_MTE, index_MC, axis=-1)
    keep_MC = choices.filled_MC & (rank_MC < capacity)
    return Choices(
        jnp.where(keep_MC, choices.expert_index_MC, E), jnp.where(keep_MC, choices.gate_MC, 0.0), E
    )


def _reaches(prob_MC: jax.Array, top_p: jax.Array) -> jax.Array:
    """True while the mass before a choice is below `top_p`; a prefix of every row."""
    last = prob_MC.ndim - 1
    # A parallel prefix sum may dip by a rounding error, which would leave a hole in the prefix.
    mass_MC = jax.lax.cummax(jnp.cumsum(prob_MC, axis=last), axis=last)
    before_MC = jnp.concatenate([jnp.zeros_like(mass_MC[..., :1]), mass_MC[..., :-1]], axis=last)
    first_MC = jax.lax.broadcasted_iota(jnp.int32, prob_MC.shape, last) == 0
    top_p_M1 = jnp.broadcast_to(top_p, prob_MC.shape[:-1])[..., None]
    return (before_MC < top_p_M1) | (top_p_M1 >= 1.0) | first_MC


def _check(logits_ME, kind, score, slots, top_p, bias_E, token_mask_M) -> None:
    if logits_ME.ndim < 2:
        raise ValueError(f"logits_ME must have shape [*tokens, experts], got {logits_ME.shape}")
    *M, E = logits_ME.shape
    M = tuple(M)
    for name, value, known in (("kind", kind, KINDS), ("score", score, SCORES)):
        if value not in known:
            raise ValueError(f"routing {name} must be {suggest(value, known)}, got {value!r}")
    if not 1 <= slots <= E:
        raise ValueError(f"slots must be from 1 to the number of experts, {E}, got {slots}")
    if kind == "dense" and slots != E:
        raise ValueError(f"dense routing needs slots = experts = {E}, got slots={slots}")
    if kind == "top_p" and isinstance(top_p, (int, float)) and not top_p > 0:
        raise ValueError(f"top_p must be above 0, got {top_p}")
    if jnp.shape(top_p) not in ((), M):
        raise ValueError(f"top_p must be a scalar or have shape {M}, got {jnp.shape(top_p)}")
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"bias_E must have shape {(E,)}, got {bias_E.shape}")
    if token_mask_M is not None and (token_mask_M.shape != M or token_mask_M.dtype != bool):
        raise ValueError(
            f"token_mask_M must be bool of shape {M}, "
            f"got {token_mask_M.dtype} of shape {token_mask_M.shape}"
        )


def _check_groups(E: int, slots: int, num_groups: int, max_groups: int) -> None:
    if num_groups < 1 or E % num_groups:
        raise ValueError(f"num_groups must divide the number of experts, {E}, got {num_groups}")
    if not 0 <= max_groups <= num_groups:
        raise ValueError(
            f"max_groups must be from 0 to num_groups = {num_groups}, got {max_groups}"
        )
    if max_groups and max_groups * (E // num_groups) < slots:
        raise ValueError(
            f"max_groups = {max_groups} groups of {E // num_groups} experts are too few for "
            f"{slots} slots"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlotOrder:
    """The S = M*C slots sorted by expert, tokens in order within an expert, empty slots last.

    slot_S: int32, the flat slot (token * C + choice) at each sorted position.
    position_MC: int32, the sorted position of each slot; the inverse of `slot_S`.
    size_E: int32, filled slots of each expert.
    end_E: int32, one past the last sorted position of each expert.
    """

    slot_S: jax.Array
    position_MC: jax.Array
    size_E: jax.Array
    end_E: jax.Array

    @property
    def token_S(self) -> jax.Array:
        return self.slot_S // self.position_MC.shape[-1]

    @property
    def filled_MC(self) -> jax.Array:
        return self.position_MC < self.end_E[-1]


def sort_slots(expert_index_MC: jax.Array, num_experts: int) -> SlotOrder:
    """Sorts slots by expert, stably; an index of `num_experts` is an empty slot."""
    S = expert_index_MC.size
    slot_S = jnp.arange(S, dtype=jnp.int32)
    expert_S = expert_index_MC.reshape(-1).astype(jnp.int32)
    if (num_experts + 1) * S < 2**31:
        # One key that holds both sorts 4-5 times faster on CPU than a pair of arrays.
        packed_S = jax.lax.sort(expert_S * S + slot_S, is_stable=False)
        expert_S, slot_S = packed_S // S, packed_S % S
    else:
        expert_S, slot_S = jax.lax.sort((expert_S, slot_S), num_keys=1, is_stable=True)
    end_E = jnp.searchsorted(expert_S, jnp.arange(num_experts), side="right").astype(jnp.int32)
    # A permutation has no duplicates, so this scatter is deterministic.
    position_S = (
        jnp.zeros_like(slot_S).at[slot_S].set(jnp.arange(S, dtype=jnp.int32), unique_indices=True)
    )
    return SlotOrder(
        slot_S, position_S.reshape(expert_index_MC.shape), jnp.diff(end_E, prepend=0), end_E
    )


def ordered_sum(rows_RD: jax.Array, position_MC: jax.Array, weight_MC: jax.Array) -> jax.Array:
    """y_MD = sum over c, in order, of weight_MC * rows_RD[position_MC], in at least float32.

    A gather, never a scatter-add: the same sum in the same order on every run and device.
    """
    dtype = jnp.promote_types(rows_RD.dtype, jnp.float32)

    def add(sum_MD, choice):
        position_M, weight_M = choice
        return sum_MD + weight_M[:, None].astype(dtype) * rows_RD[position_M].astype(dtype), None

    first_MD = weight_MC[:, 0, None].astype(dtype) * rows_RD[position_MC[:, 0]].astype(dtype)
    rest = (position_MC[:, 1:].T, weight_MC[:, 1:].T)
    # Unrolled steps fuse into one pass over the tokens; dense routing of many experts must not
    # unroll them all.
    return jax.lax.scan(add, first_MD, rest, unroll=8)[0]
