"""Files: written whole or not at all, and read with one-line errors."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lightning_jax.config.errors import UserError

StrPath = str | os.PathLike[str]
# TensorStore, under Orbax, reports a failed system call as text inside another exception.
_OS_ERROR = re.compile(r"(?:OS error |os_error_code=')(\d+)")
# What a file system answers that cannot sync a folder, or that does not let us read its names.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EPERM)
# The name that `replacing` gives to a file until it is whole.
_TEMPORARY = re.compile(r"\..+\.(?P<process>\d+)\.\d+\.tmp")


def os_error_number(error: BaseException) -> int | None:
    """Returns the errno in the text of a TensorStore error, else None."""
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns the errors of a full, read-only or forbidden disk into the line `what: reason`."""
    try:
        yield
    except Exception as error:
        number = os_error_number(error)
        if number is None and not isinstance(error, OSError):
            raise
        reason = os.strerror(number) if number is not None else getattr(error, "strerror", None)
        raise UserError(f"{what}: {reason or error}") from error


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[BinaryIO]:
    """Opens a new file that takes the name `path` when the block ends without an error.

    A reader, or a crash, sees the old file or the new one; after the block also a loss of power.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_output(flag: str, path: StrPath) -> None:
    """Makes sure, before any work, that a file can be written at `path`; leaves no trace.

    Raises:
      UserError: names the flag, its value and the reason.
    """
    path = Path(path)
    if os.path.isdir(path):
        raise UserError(f"{flag} = {str(path)!r}: is a folder, must be a file")
    if not os.path.isdir(path.parent):
        raise UserError(f"{flag} = {str(path)!r}: there is no folder {str(path.parent)!r}")
    _check_writable(flag, path, path)


def check_output_folder(flag: str, path: StrPath) -> None:
    """Makes sure, before any work, that `path` takes files, or that it can be made a folder.

    Leaves no trace.

    Raises:
      UserError: names the flag, its value and the reason.
    """
    existing = Path(path).absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not os.path.isdir(existing):
        raise UserError(f"{flag} = {str(path)!r}: {str(existing)!r} is not a folder")
    _check_writable(flag, path, existing / ".write_test")


def _check_writable(flag: str, path: StrPath, file: Path) -> None:
    """Writes and removes a file beside `file`; raises a UserError about `path` if it cannot."""
    probe = _temporary(file)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # A name that is too long.
        probe.write_bytes(b"\0" * 4096)
    except OSError as error:
        raise UserError(f"{flag} = {str(path)!r}: cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _temporary(path: Path) -> Path:
    """The name of a file that becomes `path` once it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")


def sync_folder(path: StrPath) -> None:
    """Waits until the names in a folder are on disk, where the file system can do that.

    Raises:
      OSError: the disk fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def remove_leftovers(folder: StrPath) -> None:
    """Removes what killed writers of `replacing` left in a folder, not in those below it.

    Call it where no thread of this process writes there. Files of other live processes stay.
    """
    for path in Path(folder).glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        if found and not is_another(int(found["process"])):
            path.unlink(missing_ok=True)


def is_another(process: int) -> bool:
    """Whether a process lives that is not this one (in containers numbers repeat)."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it lives, as another user's
        return True
    return True


def write_file(path: StrPath, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8. UserError: disk."""
    with disk_errors(f"cannot write {path}"), replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: StrPath, value: Any) -> None:
    """Writes a whole file of indented JSON, of the `plain` value. UserError: disk."""
    write_file(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it, at every depth.

    Scalars and arrays of numpy and jax become numbers and lists, tuples lists, keys strings; NaN
    and infinities, which JSON does not have, become None.
    """
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def parse_json(content: bytes, where: object) -> Any:
    """Returns the value of a JSON document from outside; `where` names it in the errors.

    Raises:
      UserError: it is not UTF-8 (a byte order mark is accepted), not JSON, or nested too deep, or
        it has NaN, an infinity or a number beyond the floats, which JSON does not have.
    """
    try:
        return json.loads(
            content.decode("utf-8-sig"), parse_constant=_refuse_number, parse_float=_finite
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({' '.join(str(error).split())})") from error


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text[:20]} is not a finite number")


def read_json(path: StrPath, *, missing_ok: bool = False) -> dict[str, Any]:
    """Returns the object in a JSON file; with `missing_ok` an empty one where there is no file.

    `config.kinds.check` compares its values with what they must be.

    Raises:
      UserError: there is no such file, it cannot be read, or it holds no JSON object.
    """
    path = Path(path)
    if missing_ok and not path.exists():
        return {}
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    value = parse_json(content, path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: must be a JSON object, not {type(value).__name__}")
    return value


def user_folder() -> Path | None:
    """Returns `$XDG_CACHE_HOME/lightning_jax` or `~/.cache/lightning_jax`; None without a home."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "lightning_jax" if os.path.isabs(home) else None
