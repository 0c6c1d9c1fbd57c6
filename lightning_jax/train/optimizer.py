"""The update rule: AdamW, or Muon on matrices with AdamW on the rest.

`update` returns the direction u of a step; the caller applies `params - learning_rate * u`. Nothing
here knows the learning rate or the stage, so a change of stage resets nothing: Adam's bias
correction counts the steps of the whole run.

The logical axis names of a parameter decide how it is treated:

| parameter | names | decay | Muon |
|---|---|---|---|
| projections, MLPs, experts | embed on one side, the rest on the other | yes | yes |
| embedding, head, router | one is vocab or router | yes | no |
| norm scales, sinks | one name | no | no |

`layers` and `expert` are batch axes: Muon orthogonalises every matrix of the stack separately.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, muon

from lightning_jax.config import OptimizerConfig

_STACKS = ("layers", "expert")
_NOT_MUON = ("vocab", "router")
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
      ValueError: under Muon, a matrix whose names do not tell its two sides apart.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _muon(config, axes) if config.name == "muon" else _adam(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask(axes)),
    )


def decay_mask(axes: Any) -> Any:
    """Marks the parameters that weight decay shrinks: two or more axes, `layers` not counted."""
    return _map_names(lambda names: sum(name != "layers" for name in names) >= 2, axes)


def muon_dimensions(axes: Any) -> Any:
    """Input and output axes of each matrix that Muon updates; None where AdamW updates."""
    return _map_names(_sides, axes)


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """Returns `decay * ema + (1 - decay) * params`, leaf by leaf."""
    return jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema, params)


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
    matrix = [axis for axis, name in enumerate(names) if name not in _STACKS]
    if len(matrix) < 2 or any(name in _NOT_MUON for name in names):
        return None
    embed = [axis for axis in matrix if names[axis] == "embed"]
    if len(embed) != 1 or embed[0] not in (matrix[0], matrix[-1]):
        raise ValueError(f"parameter axes {names}: Muon needs 'embed' first or last, once")
    if embed[0] == matrix[0]:
        return MuonDimensionNumbers(tuple(embed), tuple(matrix[1:]))
    return MuonDimensionNumbers(tuple(matrix[:-1]), tuple(embed))
