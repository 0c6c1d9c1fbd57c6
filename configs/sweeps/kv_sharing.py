"""Which layers may share keys and values, at three sliding windows to one full attention.

python -m experiments.sweep --sweep=configs/sweeps/kv_sharing.py --workdir=runs/kv --jobs=2
python -m experiments.report --workdir=runs/kv
"""

from configs import ablation


def get_sweep() -> dict:
    config = ablation.get_config()
    config.model.num_units = 1
    return dict(
        question="Which layers can share keys and values, and what does it cost?",
        base=config,
        baseline="none",
        arms={
            "none": {"model.unit": "LLLGLLLG"},
            "global_pairs": {"model.unit": "LLLGLLLg"},
            "cla2": {"model.unit": "LlLGlLlg"},
            "trailing": {"model.unit": "LLLGlllg"},
        },
        seeds=(0, 1, 2, 3),
    )
