"""Names of slices, and the lines about those that cannot be."""

import importlib.util

import pytest

from lightning_jax.aot import topologies
from lightning_jax.aot.topologies import Slice
from lightning_jax.config.errors import UserError


@pytest.mark.parametrize(
    ("name", "count", "chips"),
    [
        ("v5e:16x16", 1, 256),
        ("V6E:4x4", 2, 32),
        ("v5p:8x8x8", 1, 512),
        ("v4:1x1x1", 1, 1),
        ("v5p:24x16x16", 1, 6144),
    ],
)
def test_slices(name, count, chips):
    found = Slice.parse(name, count)
    assert found.chips == chips and str(found) == name.lower()


@pytest.mark.parametrize(
    ("name", "count", "line"),
    [
        ("v9:2x2", 1, "topology = 'v9:2x2': the chip must be one of v4, v5e, v5p, v6e"),
        ("v5:2x2", 1, "as in v5e:4x4"),
        ("v5e", 1, "topology = 'v5e': must be v5e:16x16 or smaller, such as v5e:2x2"),
        ("v5e:16x32", 1, "must be v5e:16x16 or smaller"),
        ("v5e:0x4", 1, "must be v5e:16x16"),
        ("v5e:4", 1, "must be v5e:16x16"),
        ("v5e:2x2x2", 1, "must be v5e:16x16"),
        ("v5p:4x4", 1, "must be v5p:16x16x24 or smaller"),
        ("v5p:16x24x24", 1, "must be v5p:16x16x24"),
        ("v5e:axb", 1, "must be v5e:16x16"),
        ("v5e:2x2", 0, "slices = 0: must be at least 1"),
    ],
)
def test_slices_that_cannot_be(name, count, line):
    with pytest.raises(UserError) as error:
        Slice.parse(name, count)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_rings_close_where_the_documentation_says():
    assert Slice.parse("v5e:16x8").chip.wraps((16, 8)) == (True, False)
    assert Slice.parse("v5p:4x4x8").chip.wraps((4, 4, 8)) == (True, True, True)
    assert Slice.parse("v5p:2x4x4").chip.wraps((2, 4, 4)) == (False, False, False)


def test_without_libtpu_the_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu is missing: pip install '.*\[tpu-aot\]'"):
        topologies.versions()


def test_the_environment_keeps_other_processes_and_passes_flags(monkeypatch):
    monkeypatch.setenv("MINE", "1")
    found = topologies.environment(["--a=b", "--c=d"])
    assert found["MINE"] == "1" and found["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert found["LIBTPU_INIT_ARGS"] == "--a=b --c=d"
