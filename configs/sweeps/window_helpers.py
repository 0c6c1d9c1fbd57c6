"""What helps a small window: attention sinks, head gates, or no position on the full layers.

python -m experiments.sweep --sweep=configs/sweeps/window_helpers.py --workdir=runs/helpers
python -m experiments.report --workdir=runs/helpers
"""

from configs import ablation


def get_sweep() -> dict:
    config = ablation.get_config()
    config.model.unit, config.model.num_units = "LLLGLLLg", 1
    config.model.attention.window = 16
    return dict(
        question="What helps layers with a small window: sinks, head gates, NoPE on full layers?",
        base=config,
        baseline="plain",
        arms={
            "plain": {},
            "sinks": {"model.attention.sinks": True},
            "head_gate": {"model.attention.output_gate": True},
            "nope_global": {"model.attention.global_rope": False},
        },
        seeds=tuple(range(10)),
    )
