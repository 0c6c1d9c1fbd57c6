"""Links lead somewhere, in the repository and in the site, and name one address of the project."""

import re
from urllib.parse import unquote

import pytest
import yaml

from docs.tools import hooks
from tests.docs.blocks import PAGES, ROOT
from tests.docs.shell import REPOSITORY

LINK = re.compile(r"\]\((?!#)([^)\s]+)\)")
BADGE = re.compile(r"https://colab\.research\.google\.com/github/([^)\s]+)")


def pages():
    return [page for page in PAGES if page.name != "api.md"]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_to_files_lead_to_one(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link and not link.startswith("mailto:"):
            target = page.parent / unquote(path)
            assert target.exists(), f"{page.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target.read_text()), f"{page.name}: {link}"


def anchors(text):
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[`*]|\(http\S*\)", "", title).lower() for title in titles)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip()) for title in plain}


def test_there_is_one_address():
    extra = re.search(r"repository: &repository (\S+)", (ROOT / "mkdocs.yml").read_text())
    assert extra[1] == REPOSITORY
    for page in pages():
        for found in re.findall(r"https://github\.com/[\w./-]*lightning_jax", page.read_text()):
            assert found == REPOSITORY, f"{page.name}: setup.py says {REPOSITORY}"


def test_every_notebook_has_a_badge_that_leads_to_it():
    here = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/"
    badges = BADGE.findall((ROOT / "README.md").read_text())
    assert badges and all(badge.startswith(here) for badge in badges)
    shown = {badge.removeprefix(here) for badge in badges}
    assert shown == {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_links_out_of_the_site_go_to_the_repository():
    link = hooks.target
    assert link("benchmarks/results", REPOSITORY) == f"{REPOSITORY}/tree/main/benchmarks/results"
    assert link("configs/base.py", REPOSITORY) == f"{REPOSITORY}/blob/main/configs/base.py"
    assert (link("docs/runs.md", REPOSITORY), link("README.md", REPOSITORY)) == (
        "runs.md",
        "index.md",
    )


def test_every_page_is_in_the_menu():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text())
    menu = set(leaves(yaml.safe_load(text)["nav"]))
    there = {page.name for page in PAGES if page.parent == ROOT / "docs"}
    assert menu - {*hooks.FROM_ROOT} == there


def leaves(nav):
    for entry in nav:
        for value in entry.values():
            yield from leaves(value) if isinstance(value, list) else [value]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="needs the docs extra")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    home = (tmp_path / "index.html").read_text()
    # Nothing is fetched from elsewhere when a page is opened.
    remote = re.compile(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)')
    for page in tmp_path.glob("*.html"):
        assert not remote.findall(page.read_text()), page.name
    assert "docs/img" not in home
