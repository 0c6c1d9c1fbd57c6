"""Huge pages for the large blocks of a program, where Linux gives them on request.

XLA on a CPU allocates the temporaries of a compiled program anew on every call. Linux then maps and
clears them page by page, 4 kB at a time: a tenth of a training step. glibc asks for pages of 2 MB
only if the environment says so when the process starts, so a program starts itself again.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_VARIABLE, _SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Re-executes this program with huge pages; returns where that is impossible or pointless.

    Call this before anything is read or opened. Process ID, arguments and folder stay the same. It
    returns if the environment has the setting already (on or off), if Linux gives huge pages to all
    processes or to none, on other systems and C libraries, under a debugger, and if the program is
    not a file that can be started again.
    """
    tunables = os.environ.get(_VARIABLE, "")
    startable = os.path.isfile(sys.argv[0]) and sys.executable and sys.gettrace() is None
    if _SETTING in tunables or not startable or not _given_on_request():
        return
    os.environ[_VARIABLE] = f"{tunables}:{_SETTING}=1".lstrip(":")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def has_huge_pages() -> bool:
    """Whether this process asked for huge pages when it started."""
    return f"{_SETTING}=1" in os.environ.get(_VARIABLE, "").split(":")


def _given_on_request() -> bool:
    library, version = platform.libc_ver()
    if sys.platform != "linux" or library != "glibc":
        return False
    try:
        new_enough = tuple(map(int, version.split(".")[:2])) >= (2, 35)
        return new_enough and "[madvise]" in _SWITCH.read_text()
    except (OSError, ValueError):
        return False
