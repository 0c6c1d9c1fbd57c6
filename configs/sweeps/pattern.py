"""Attention pattern x window: full attention against sliding windows, alone and mixed with it.

python -m experiments.sweep --sweep=configs/sweeps/pattern.py --workdir=runs/pattern --jobs=2
python -m experiments.report --workdir=runs/pattern
"""

from configs import ablation


def get_sweep() -> dict:
    patterns = {
        "LG": {"model.unit": "LG", "model.num_units": 4},
        "LLLG": {"model.unit": "LLLG", "model.num_units": 2},
        "L": {"model.unit": "L", "model.num_units": 8},
    }
    arms = {
        f"{name}_w{window}": {**pattern, "model.attention.window": window}
        for name, pattern in patterns.items()
        for window in (16, 64)
    }
    return dict(
        question="What do sliding windows lose against full attention, alone and mixed with it?",
        base=ablation.get_config(),
        baseline="G",
        arms={"G": {"model.unit": "G", "model.num_units": 8}, **arms},
        factors={"pattern": ["model.unit", "model.num_units"]},
        several={"*": "every pattern has either window, and full attention has none"},
        seeds=(0, 1, 2),
    )
