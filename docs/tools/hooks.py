"""What mkdocs does besides: pages from files of the root, and links that leave the site.

README, CONTRIBUTING and CHANGELOG are written once, in the root, where GitHub shows them. Links in
pages are those that work there, so that a link to a file that is no page goes to the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
# Files of the root that are pages, by the page they become.
FROM_ROOT = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)(#[^)]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are files of the root."""
    for page, source in FROM_ROOT.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links to files of the repository into links to pages or into its address."""
    home = "" if page.file.src_uri in FROM_ROOT else "docs"

    def link(found: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(home, found[2]))
        return f"{found[1]}{target(path, config.extra['repository'])}{found[3] or ''}{found[4]}"

    return _LINK.sub(link, markdown)


def target(path: str, repository: str) -> str:
    """The address, seen from a page, of a file or folder of the repository.

    Args:
      path: relative to the root.
      repository: the project's address.
    """
    pages = {source: page for page, source in FROM_ROOT.items()}
    if path in pages:
        return pages[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
