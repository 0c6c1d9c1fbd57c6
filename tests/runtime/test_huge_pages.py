"""Programs start themselves again with huge pages, once, and only where that is of use."""

import os
import subprocess
import sys

import pytest

from lightning_jax.runtime import huge_pages

PROGRAM = """
import os, sys
from lightning_jax.runtime import huge_pages
print("started", flush=True)
huge_pages.restart_with_huge_pages()
print(os.environ.get("GLIBC_TUNABLES", ""), *sys.argv[1:], os.getpid(), sys.stdin.read())
"""


def start(tmp_path, *arguments, tunables=None):
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    process = subprocess.Popen(
        [sys.executable, *(arguments or (str(file), "--flag", "two words"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    output, _ = process.communicate(PROGRAM if "-" in arguments else "the input")
    assert process.returncode == 0
    return process.pid, output.splitlines()


on_request = pytest.mark.skipif(
    not huge_pages._given_on_request(), reason="this machine gives no huge pages on request"
)


@on_request
def test_starts_again_as_the_same_process(tmp_path):
    pid, lines = start(tmp_path)
    assert lines == ["started"] * 2 + [
        f"glibc.malloc.hugetlb=1 --flag two words {pid} the input",
    ]


@on_request
def test_keeps_what_the_user_set(tmp_path):
    _, lines = start(tmp_path, tunables="glibc.malloc.check=0")
    assert lines[2].startswith("glibc.malloc.check=0:glibc.malloc.hugetlb=1 ")
    _, lines = start(tmp_path, tunables="glibc.malloc.hugetlb=0")
    assert len(lines) == 2
    assert lines[1].startswith("glibc.malloc.hugetlb=0 ")


def test_what_is_no_file_goes_on_as_it_is(tmp_path):
    assert len(start(tmp_path, "-c", PROGRAM)[1]) == 2
    assert len(start(tmp_path, "-")[1]) == 2


@pytest.mark.parametrize(
    ("switch", "libc", "expected"),
    [
        ("always [madvise] never", ("glibc", "2.35"), True),
        ("[always] madvise never", ("glibc", "2.35"), False),
        ("always madvise [never]", ("glibc", "2.35"), False),
        ("always [madvise] never", ("glibc", "2.31"), False),
        ("always [madvise] never", ("", ""), False),
        (None, ("glibc", "2.35"), False),
    ],
)
def test_only_where_linux_gives_them_on_request(monkeypatch, tmp_path, switch, libc, expected):
    file = tmp_path / "enabled"
    if switch is not None:
        file.write_text(switch + "\n")
    monkeypatch.setattr(huge_pages, "_SWITCH", file)
    monkeypatch.setattr(huge_pages.platform, "libc_ver", lambda: libc)
    monkeypatch.setattr(huge_pages.sys, "platform", "linux")
    assert huge_pages._given_on_request() is expected
