"""What a resumed run may change, and why; any other change would make it another run."""

from __future__ import annotations

import dataclasses
import fnmatch
from typing import Any

from lightning_jax.config import CheckpointMeta
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import changes

ALWAYS = "always"
CURRENT = "in the stage of the newest checkpoint and in later ones"
LATER = "in stages that have not begun"
SAME_TEXT = "while the text stays the same"
SAME_BASES = "where every stage keeps its RoPE base"
UNTRAINED = "before the first step"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Fields (patterns, `*` is anything) that may change at some time, and the reason."""

    fields: tuple[str, ...]
    when: str
    why: str


# The same table is in docs/runs.md, which a test compares.
MAY_CHANGE = (
    Rule(
        ("log_every", "histogram_every", "eval_every", "eval_tokens", "final_eval_tokens"),
        ALWAYS,
        "Reports and evaluations do not change what the run learns.",
    ),
    Rule(
        ("sample_prompt", "sample_tokens", "checkpoint_every", "keep_checkpoints"),
        ALWAYS,
        "Neither do samples and checkpoints.",
    ),
    Rule(
        ("mesh.*", "stages.*.accumulate", "data.prefetch"),
        ALWAYS,
        "A step is the same, up to rounding, on other devices, in other micro-batches and with "
        "batches made ahead.",
    ),
    Rule(
        (
            "model.scan",
            "model.remat",
            "model.head_chunk",
            "model.attention.implementation",
            "model.moe.implementation",
            "model.moe.transport",
            "model.moe.exchange_rows",
        ),
        ALWAYS,
        "They choose between programs that compute the same, up to rounding.",
    ),
    Rule(
        ("optimizer.on_nan",),
        ALWAYS,
        "After a loss that is not finite the run can go on without such steps.",
    ),
    Rule(
        ("stages.*.learning_rate", "stages.*.final_learning_rate"),
        CURRENT,
        "After a loss that is not finite the run can go on more slowly.",
    ),
    Rule(("stages", "stages.*"), LATER, "Nothing has been computed with them."),
    Rule(
        ("data.sources.*.path", "data.sources.*.eval_path"),
        SAME_TEXT,
        "A fingerprint tells whether it is the same text, wherever it lies.",
    ),
    Rule(
        ("model.*.rope_base_global",),
        SAME_BASES,
        "It is the base of stages without their own; configs/imported.py reads the newest one.",
    ),
    Rule(
        ("seed", "optimizer.*", "stages", "stages.*", "data.*"),
        UNTRAINED,
        "Imported weights depend on the model and on data.tokenizer alone.",
    ),
)
_FIXED_BY_WEIGHTS = ("data.tokenizer",)


def check(
    before: dict[str, Any], now: dict[str, Any], saved: CheckpointMeta | None
) -> list[tuple[str, Any, Any]]:
    """Compares a run's config with the one that is to resume it, both as nested dicts.

    Args:
      before: of the newest checkpoint, or of the run that was logged without one.
      now: the same, as asked for.
      saved: description of that checkpoint; None without one.

    Returns:
      The changes (dotted field, old value, new value), all of which may be made; those of
      `SAME_TEXT` if the text is the same, which is still to be compared.

    Raises:
      UserError: names the first field that may not change, with both values.
    """
    stage = saved.stage if saved else next(iter(before["stages"]))
    begun = [*before["stages"]][: [*before["stages"]].index(stage) + 1]
    is_untrained = saved is not None and saved.step == 0
    old, new = _bases(before), _bases(now)
    same_bases = all(old[name] == new[name] for name in old.keys() & new.keys())
    if not is_untrained:
        _check_stages(begun, [*now["stages"]], saved)
    made = list(changes(before, now))
    for field, old, new in made:
        if not _is_allowed(field, begun, is_untrained, same_bases):
            raise UserError(
                f"{field} = {new!r}: this workdir's run has {old!r}; use another --workdir "
                "or the run's own value"
            )
    return made


def _check_stages(begun: list[str], now: list[str], saved: CheckpointMeta | None) -> None:
    if saved and begun[-1] not in now:
        raise UserError(
            f"stages = {now}: checkpoint {saved.step} belongs to stage {begun[-1]!r}, which the "
            "config lacks; use another --workdir or the run's own stages"
        )
    if now[: len(begun)] != begun:
        raise UserError(
            f"stages = {now}: must begin with {begun}, which this workdir's run has begun; use "
            "another --workdir or the run's own stages"
        )


def _bases(run: dict[str, Any]) -> dict[str, float]:
    """RoPE base of global layers by stage."""
    model = run["model"]["attention"]["rope_base_global"]
    return {name: stage["rope_base_global"] or model for name, stage in run["stages"].items()}


def _is_allowed(field: str, begun: list[str], is_untrained: bool, same_bases: bool) -> bool:
    times = {ALWAYS, SAME_TEXT} | ({SAME_BASES} if same_bases and not is_untrained else set())
    if is_untrained and field not in _FIXED_BY_WEIGHTS:
        times.add(UNTRAINED)
    section, _, rest = field.partition(".")
    stage = rest.partition(".")[0]
    # `stages` itself is the order of those that have not begun: the others are in theirs.
    if section == "stages" and stage not in begun:
        times |= {CURRENT, LATER}
    elif section == "stages" and stage == begun[-1]:
        times.add(CURRENT)
    return any(
        fnmatch.fnmatchcase(field, pattern)
        for rule in MAY_CHANGE
        if rule.when in times
        for pattern in rule.fields
    )
