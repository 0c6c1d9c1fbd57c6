"""Names of the curves of a run, for TensorBoard and other trackers.

They show groups (what stands before the first slash) in the order of the alphabet. So what a person
looks at comes first, bits per byte and losses, and what is rarely needed last, in `z_other`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

OTHER = "z_other"
# Where the numbers of a training step go that do not belong to `OTHER`.
_HOMES = {
    "loss": "loss/train",
    "learning_rate": "optimizer/learning_rate",
    "grad_norm": "optimizer/grad_norm",
    "tokens_per_second": "speed/tokens_per_second",
    "top_p": "router/top_p",
    "bias_max": "router/bias_max",
}
# The same for the evaluation of a source, whose name comes after.
_EVALUATION_HOMES = {
    "bits_per_byte": "bits_per_byte",
    "loss": "loss/eval",
    "loss_by_position": "position_loss",
    "experts_per_token": "router/experts_per_token",
}
_OTHER_EVALUATION = f"{OTHER}/eval"
SAMPLE = "sample"


def of_row(row: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row of `metrics.jsonl` by name.

    A list over layers gives its mean, least and greatest number; what is no number is left out.
    """
    curves: dict[str, float] = {}
    for name, value in row.items():
        if name == "step":
            continue
        if name == "eval":
            for source, result in value.items():
                for key, number in result.items():
                    home = _EVALUATION_HOMES.get(key, f"{_OTHER_EVALUATION}/{key}")
                    curves |= _numbers(f"{home}/{source}", number)
        elif name == "data":
            curves |= _numbers("text", value)
        elif isinstance(value, list) and np.ndim(value) == 1:
            numbers = [entry for entry in value if entry is not None]
            for reduce in (np.mean, np.min, np.max) if numbers else ():
                curves[f"router/{name}/{reduce.__name__}"] = float(reduce(numbers))
        else:
            curves |= _numbers(_HOMES.get(name, f"{OTHER}/{name}"), value)
    return curves


def is_of_evaluation(name: str) -> bool:
    """Whether a name is that of a curve or text that an evaluation writes."""
    homes = (*_EVALUATION_HOMES.values(), _OTHER_EVALUATION)
    return name == SAMPLE or name.startswith(tuple(f"{home}/" for home in homes))


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Numbers by slash-joined name."""
    if isinstance(value, dict):
        inner = (_numbers(f"{name}/{key}", part) for key, part in value.items())
        return {key: number for part in inner for key, number in part.items()}
    return {name: float(value)} if isinstance(value, (int, float)) else {}
