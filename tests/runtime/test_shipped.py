"""Programs and configs by name, beside the package or inside of it."""

import sys

import pytest

import lightning_jax
from lightning_jax.config.errors import UserError
from lightning_jax.runtime import shipped


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_version_is_that_of_the_package():
    assert shipped.version() == lightning_jax.__version__


def test_a_checkout_has_them_beside_the_package(elsewhere, monkeypatch):
    assert (shipped.root() / "configs" / "base.py").is_file() and not shipped.is_here()
    monkeypatch.chdir(shipped.root())
    assert shipped.is_here()


def test_a_wheel_has_them_inside(elsewhere, monkeypatch):
    (elsewhere / "shipped").mkdir()
    monkeypatch.setattr(shipped, "_PACKAGE", elsewhere)
    assert shipped.root() == elsewhere / "shipped" and not shipped.is_here()


def test_they_come_before_other_packages_of_these_names(monkeypatch):
    monkeypatch.setattr(sys, "path", ["/other"])
    shipped.expose()
    assert sys.path == [str(shipped.root()), "/other"]


def test_each_program_says_what_it_does_in_a_line():
    found = shipped.programs()
    assert found["train"].startswith("Train a run") and "__init__" not in found
    assert all(line.endswith(".") for line in found.values())


@pytest.mark.parametrize("path", ["small", "small.py", "configs/small.py"])
def test_a_config_has_a_name_in_every_folder(path, elsewhere, monkeypatch):
    assert shipped.find(path, "configs", "") == str(shipped.root() / "configs" / "small.py")
    monkeypatch.chdir(shipped.root())
    assert shipped.find(path, "configs", "") == "configs/small.py"


def test_a_file_here_comes_first(elsewhere):
    (elsewhere / "small.py").touch()
    (elsewhere / "tour").mkdir()
    assert shipped.find("small.py", "configs", "") == "small.py"
    assert shipped.find("tour", "configs", "").endswith("/configs/tour.py")
    assert shipped.find("pattern", "configs/sweeps", "").endswith("/configs/sweeps/pattern.py")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("smal", 'one of ablation, base, .*did you mean "small"'),
        ("smal.py", 'one of ablation, base, .*did you mean "small"'),
        ("configs/smal.py", "one of ablation, base, .*small"),
        ("mine/on.py", 'one of mine/one.py .did you mean "mine/one.py"'),
        ("/nowhere/x.py", "one of ablation, base, "),
        ("", "one of ablation, base, "),
        ("x" * 300, "one of ablation, base, "),
        ("\0", "one of ablation, base, "),
    ],
)
def test_what_is_no_file_is_one_line_that_lists_those_there_are(path, hint, elsewhere):
    (elsewhere / "mine").mkdir()
    (elsewhere / "mine" / "one.py").touch()
    with pytest.raises(UserError, match=f"^given: no such file: {hint}"):
        shipped.find(path, "configs", "given")
