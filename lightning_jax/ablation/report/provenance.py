"""Where the runs of a sweep come from: commands, commits, versions, text, from their `run.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_jax.ablation.results import Run
from lightning_jax.config.errors import UserError
from lightning_jax.runtime.invocation import recorded
from lightning_jax.train.record import Record


def provenance(runs: Sequence[Run], workdir: Path) -> dict[str, Any]:
    """Describes the sessions of all runs that have begun.

    Returns `environments`, the distinct ways in which sessions were started (`command`, `commit`,
    `versions`), and `runs`, one dict each: `arm`, `seed`, `begun` (time of the first session),
    `environments` (of its sessions, as indices), `tokenizer` (digest of its files) and `data`
    (digest of the text by source). A `run.json` that cannot be read is left out.
    """
    environments: list[dict[str, Any]] = []
    found = []
    for run in runs:
        record = None
        with contextlib.suppress(UserError):
            record = Record.read(run.folder(workdir))
        if record is None or not record.sessions:
            continue
        mine = [_environment(session) for session in record.sessions]
        for one in mine:
            if one not in environments:
                environments.append(one)
        found.append(
            {
                "arm": run.arm,
                "seed": run.seed,
                "begun": str(record.sessions[0].get("time", "?")),
                "environments": sorted({environments.index(one) for one in mine}),
                "tokenizer": record.tokenizer,
                "data": {name: row["fingerprint"] for name, row in record.known_data().items()},
            }
        )
    return {"environments": environments, "runs": found}


def _environment(session: dict[str, Any]) -> dict[str, Any]:
    commit = session["git_commit"] or f"unknown: {session.get('git_commit_unknown', '?')}"
    versions = {"python": str(session.get("python", "?")), **session["versions"]}
    return {"command": recorded(session["command"]), "commit": commit, "versions": versions}


def changed_text(found: dict[str, Any]) -> list[str]:
    """Returns the sources whose text differs between runs, of the result of `provenance`."""
    digests: dict[str, set[str]] = {}
    for run in found["runs"]:
        for name, digest in run["data"].items():
            digests.setdefault(name, set()).add(digest)
    return [name for name, values in digests.items() if len(values) > 1]
