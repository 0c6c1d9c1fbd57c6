"""`run.json`: where a run's weights, text and tokenizer come from, and what ran in its folder.

Nothing in it is overwritten: `origin` (of imported weights), `data` (fingerprints of the text) and
`tokenizer` stay as the run began with them, text that was changed on purpose is listed in
`data_changes`, and every session adds itself to `sessions`.
"""

from __future__ import annotations

import datetime
import platform
import socket
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning_jax.config.errors import UserError
from lightning_jax.config.kinds import OBJECT, TEXT, check, integer, list_of, map_of, or_null
from lightning_jax.runtime import shipped
from lightning_jax.runtime.checkout import git_commit
from lightning_jax.runtime.files import read_json, write_json

FILE = "run.json"
_ENTRIES = {
    "origin": OBJECT,
    "data": map_of(OBJECT),
    "data_changes": map_of(list_of(OBJECT)),
    "tokenizer": TEXT,
    "sessions": list_of(OBJECT),
    "sessions_left_out": integer(0),
}
_SESSION = {
    "first_step": integer(1),
    "command": list_of(TEXT),
    "versions": map_of(TEXT),
    "git_commit": or_null(TEXT),
}
_TEXT = {"fingerprint": TEXT}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
# A job that is requeued a thousand times keeps a file that can be read.
_MOST_SESSIONS, _MOST_CHANGES = 100, 20

Rows = Mapping[str, Mapping[str, Any]]


class Record:
    """The content of a `run.json`, to which entries are added; `write` puts it on disk."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    @classmethod
    def read(cls, workdir: Path) -> Record:
        """Reads the folder's record; it is empty where there is none.

        Raises:
          UserError: a file that is damaged, or not the record of a run.
        """
        path = workdir / FILE
        try:
            values = read_json(path, missing_ok=True)
            check(values, _ENTRIES, path, required=())
            for session in values.get("sessions", ()):
                check(session, _SESSION, f"{path}: sessions", required=[*_SESSION])
            changes = values.get("data_changes", {})
            for name, row in values.get("data", {}).items():
                for text in (row, *changes.get(name, ())):
                    check(text, _TEXT, f"{path}: data of {name}", required=[*_TEXT])
        except UserError as error:
            raise UserError(f"{error}; move the file away to begin a new record") from error
        return cls(values)

    def write(self, workdir: Path) -> None:
        """Writes the file. UserError: disk."""
        ordered = {name: self._values[name] for name in _ENTRIES if name in self._values}
        write_json(workdir / FILE, {**ordered, **self._values})

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """The sessions, oldest first, without those left out."""
        return self._values.get("sessions", [])

    @property
    def tokenizer(self) -> str | None:
        """The digest of the tokenizer's files; None if it is not known."""
        return self._values.get("tokenizer")

    def known_data(self) -> dict[str, Mapping[str, Any]]:
        """Returns, by source, the row of `Sources.fingerprint` that the run last went on with."""
        changes = self._values.get("data_changes", {})
        first = self._values.get("data", {})
        return {name: [row, *changes.get(name, ())][-1] for name, row in first.items()}

    @property
    def origin(self) -> Any:
        """Where the weights of checkpoint 0 came from; None if the run made its own."""
        return self._values.get("origin")

    def begin(self, tokenizer: str, *, data: Rows | None = None, origin: Any = None) -> None:
        """Sets what a run begins with, in place of what starts left that took no step."""
        begins = {"origin": origin, "tokenizer": tokenizer, "data": data, "data_changes": None}
        self._values = {name: value for name, value in self._values.items() if name not in begins}
        self._values |= {name: value for name, value in begins.items() if value is not None}

    def go_on(self, tokenizer: str, data: Rows, first_step: int) -> None:
        """Adds what a run has from `first_step` on, where that is not what it had before."""
        self._values.setdefault("tokenizer", tokenizer)
        known, first = self.known_data(), self._values.setdefault("data", {})
        changes = self._values.setdefault("data_changes", {})
        for name, row in data.items():
            if name not in known:
                first[name] = {"first_step": first_step, **row}
            elif known[name]["fingerprint"] != row["fingerprint"]:
                rows = [*changes.get(name, ()), {"first_step": first_step, **row}]
                changes[name] = rows[-_MOST_CHANGES:]

    def add_session(self, first_step: int, **entries: Any) -> None:
        """Adds a session of this process that begins now with `first_step`, and its `entries`."""
        commit, reason = git_commit()
        session = {
            "first_step": first_step,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **entries,
            "command": sys.argv,
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "versions": {
                "lightning_jax": shipped.version(),
                **{name: metadata.version(name) for name in _PACKAGES},
            },
            "git_commit": commit,
        }
        if reason:
            session["git_commit_unknown"] = reason
        sessions = [*self.sessions, session]
        left_out = len(sessions) - _MOST_SESSIONS
        if left_out > 0:
            del sessions[1 : 1 + left_out]  # The first one stays, and the newest.
            self._values["sessions_left_out"] = self._values.get("sessions_left_out", 0) + left_out
        self._values["sessions"] = sessions
