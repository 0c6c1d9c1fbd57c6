"""Whether the runs in a folder are those that a sweep would make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_jax.ablation.results import Run
from lightning_jax.ablation.sweep import FILE, Sweep
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, first_change, to_dict
from lightning_jax.runtime.files import read_json
from lightning_jax.train.workdir import CONFIG


def check_runs(sweep: Sweep, root: Path) -> None:
    """Raises UserError where the folder is a run's, or has what the sweep would not have made.

    That is a run of no arm or seed of the sweep, or runs inferred with another routing of a name.
    """
    if (root / CONFIG).exists():
        raise UserError(f"workdir = {str(root)!r}: is a run's folder; a sweep needs one of its own")
    runs = sweep.runs()
    wanted, arms = {run.folder(root) for run in runs}, {run.arm for run in runs}
    for path in sorted(root.glob(f"*/seed_*/{CONFIG}")):
        if path.parent not in wanted:
            where = path.parent.relative_to(root)
            known = path.parent.parent.name in arms
            field, value = ("seeds", sweep.seeds) if known else ("arms", [*sweep.arms])
            raise UserError(
                f"{field} = {value!r}: this workdir has a run {str(where)!r}, which is not in it"
            )
    before = read_json(root / FILE, missing_ok=True).get("inference")
    for name, way in sweep.inference.items():
        old = before.get(name, way) if isinstance(before, dict) else way
        if old != way and any(root.glob(f"*/seed_*/inference/{name}.json")):
            raise UserError(
                f"inference.{name} = {way!r}: runs in this workdir were inferred with {old!r}; use "
                "another name"
            )


def check_configs(configs: Mapping[Run, RunConfig], root: Path) -> None:
    """Raises the UserError of `check_config` for the first run that has begun with another."""
    for run, config in configs.items():
        check_config(str(run), config, run.folder(root))


def check_config(name: str, config: RunConfig, folder: Path) -> None:
    """Raises UserError where a run has begun in the folder with another config; names the field.

    A config that cannot be read is left to `results.read`.
    """
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        before, now = to_dict(build(RunConfig, read_json(path))), to_dict(config)
    except UserError:
        return
    if now["model"]["vocab_size"] == 0:
        # 0 means "the tokenizer's"; a run records the actual size.
        now["model"]["vocab_size"] = before["model"]["vocab_size"]
    changed = first_change(before, now)
    if changed:
        field, old, new = changed
        raise UserError(
            f"{field} = {new!r}: {name} in this workdir has {old!r}; use another --workdir "
            "or the sweep as it was"
        )
