"""The update rule: AdamW, or Muon on matrices with AdamW on the rest.

`update` returns the direction u of a step; the caller applies `params - learning_rate * u`. Nothing
here knows the learning rate or the stage, so a change of stage resets nothing: Adam's bias
correction counts the steps of the whole run.

The logical axis names of a parameter decide its role (`role`):

| role | parameters | names besides stacks | decay | Muon |
|---|---|---|---|---|
| matrix | projections, MLPs, experts | embed on one side, the rest on the other | yes | yes |
| table | embedding, head, router | embed, and vocab or router | yes | no |
| vector | norm scales, biases, sinks | one feature, split into heads or not | no | no |

`layers` and `expert` stack parameters and are no side of one: Muon orthogonalises every matrix of
the stack separately, and the stack of the experts' biases is no matrix.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lightning_jax.config import OptimizerConfig

_STACKS = ("layers", "expert")
_TABLES = ("vocab", "router")
# One feature in two axes: head h, entry i of it.
_SPLIT_FEATURES = (["heads", "head"], ["kv_heads", "head"])
# Root mean square of a Muon update that matches AdamW's, so that one learning rate serves both
# (Moonlight, arXiv 2502.16982, section 2.2).
_MUON_RMS = 0.2


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """Builds the transformation: clip by global norm, rescale, add decoupled weight decay.

    AdamW is arXiv 1711.05101; Muon orthogonalises the momentum by five Newton-Schulz steps (Jordan
    2024) with `beta1` as its momentum. Weight decay is multiplied by the learning rate, as the
    direction is.

    Args:
      config: the update rule.
      axes: tree like the parameters, of tuples of one logical axis name each.

    Returns:
      A transformation whose update, times `-learning_rate`, is added to the parameters.

    Raises:
      ValueError: as `role`.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _muon(config, axes) if config.name == "muon" else _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)),
    )


def role(names: tuple[str, ...]) -> str:
    """Returns "matrix", "table" or "vector" for a parameter with these logical axis names.

    Raises:
      ValueError: names that do not tell the two sides of a matrix apart.
    """
    own = [name for name in names if name not in _STACKS]
    if len(own) == 1 or own in _SPLIT_FEATURES:
        return "vector"
    if own.count("embed") != 1 or "embed" not in (own[0], own[-1]):
        raise ValueError(f"parameter axes {names}: a matrix needs 'embed' first or last, once")
    return "table" if set(own) & set(_TABLES) else "matrix"


def decay_mask(axes: Any) -> Any:
    """Marks the parameters that weight decay shrinks: all but vectors."""
    return _map_names(lambda names: role(names) != "vector", axes)


def muon_dimensions(axes: Any) -> Any:
    """Input and output axes of each matrix that Muon updates; None where AdamW updates."""
    return _map_names(_sides, axes)


def update_ema(ema: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """Returns `share * params + (1 - share) * ema`, leaf by leaf.

    The share of the new parameters is `1 - decay`, and early in a run `9 / (10 + updates)` if that
    is more: the average then reaches back a tenth of the run, however short it is, and forgets the
    initial parameters like `updates ** -9`. With a fixed decay it would still hold `decay ** n` of
    them after n updates. This is the warm-up of TensorFlow's ExponentialMovingAverage, a power
    average in the words of Karras et al. (arXiv 2312.02696, section 3.1).

    Args:
      updates: how often the parameters were updated before.
    """
    share = jnp.maximum(1 - decay, 9 / (10 + jnp.asarray(updates, jnp.float32)))
    return jax.tree.map(lambda e, p: e + share * (p - e), ema, params)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.epsilon)


def _muon(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    dimensions = muon_dimensions(axes)
    labels = jax.tree.map(
        lambda entry: "adam" if entry is None else "muon", dimensions, is_leaf=_is_entry
    )
    orthogonal = muon(
        learning_rate=1.0,
        beta=config.beta1,
        eps=config.epsilon,
        consistent_rms=_MUON_RMS,
        # Only matrices reach this transform; a parameter of the other group is a masked node here.
        muon_weight_dimension_numbers=lambda params: jax.tree.map(
            lambda entry, leaf: leaf if isinstance(leaf, optax.MaskedNode) else entry,
            dimensions,
            params,
            is_leaf=_is_entry,
        ),
    )
    # optax.contrib.muon returns the step to add; ours is the direction to subtract.
    return optax.partition(
        {"muon": optax.chain(orthogonal, optax.scale(-1.0)), "adam": _adam(config)}, labels
    )


def _map_names(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def _is_entry(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, MuonDimensionNumbers)


def _sides(names: tuple[str, ...]) -> MuonDimensionNumbers | None:
    if role(names) != "matrix":
        return None
    own = [axis for axis, name in enumerate(names) if name not in _STACKS]
    if names[own[0]] == "embed":
        return MuonDimensionNumbers(tuple(own[:1]), tuple(own[1:]))
    return MuonDimensionNumbers(tuple(own[:-1]), tuple(own[-1:]))
