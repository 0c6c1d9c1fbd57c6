"""What the files about the project say agrees: versions, names of extras, commands."""

import re
from pathlib import Path

import pytest
import yaml

import lightning_jax

ROOT = Path(__file__).resolve().parent.parent
PINS = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def yaml_of(name):
    return yaml.safe_load((ROOT / name).read_text())


def test_constraints_are_sorted_and_name_each_package_once():
    names = re.findall(r"^(\S+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert names == sorted(names, key=str.lower) and len({*map(str.lower, names)}) == len(names)


def test_the_citation_is_of_this_version():
    citation = yaml_of("CITATION.cff")
    assert citation["version"] == lightning_jax.__version__
    assert citation["license"] == "Apache-2.0" and citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= {*citation}


def test_hooks_have_one_version_of_a_tool_and_the_tested_ruff():
    hooks = [hook for repo in yaml_of(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    needs = {need for hook in hooks for need in hook.get("additional_dependencies", ())}
    assert f"ruff=={PINS['ruff']}" in needs
    assert len({need.partition("==")[0] for need in needs}) == len(needs)


def test_the_changelog_has_this_version_or_what_comes_next():
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("folder", ["lightning_jax", "experiments", "configs", "benchmarks"])
def test_extras_are_quoted(folder):
    """A shell such as zsh takes brackets for a pattern."""
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"pip install (-e )?[\w.]+\[", text), path
