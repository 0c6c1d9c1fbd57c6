"""What windows lose that bits per byte hide: the exact recall of what stands far back.

Three quarters of the text are recall tasks (docs/data_formats.md), so that models of this size
learn any; the verdicts are about the rest, source code.

    python -m experiments.sweep --sweep=configs/sweeps/recall.py --workdir=runs/recall --jobs=2
    python -m experiments.report --workdir=runs/recall
"""

from configs import ablation, base


def get_sweep() -> dict:
    config = ablation.get_config()
    config.data.sources = base.named(
        code=base.source("stdlib:code"),
        induction=base.source("recall:induction,longest=300,symbols=16"),
        mqar=base.source("recall:mqar,longest=200,symbols=16"),
        copy=base.source("recall:copy,longest=200,symbols=16"),
    )
    for stage in config.stages.values():
        stage.tokens = 400_000
    config.stages.stable.warmup_tokens = 40_000
    config.stages.decay.decay_tokens = 400_000
    return dict(
        question="Which layer pattern still finds what stands further back than its window?",
        base=config,
        baseline="G",
        arms={
            "G": {"model.unit": "G", "model.num_units": 8},
            "LLLG": {"model.unit": "LLLG", "model.num_units": 2},
            "LLLGLLLg": {"model.unit": "LLLGLLLg", "model.num_units": 1},
            "L": {"model.unit": "L", "model.num_units": 8},
        },
        factors={"pattern": ["model.unit", "model.num_units"]},
        seeds=(0, 1, 2),
    )
