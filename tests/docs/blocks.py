"""What the pages show a reader: fenced blocks, and commands in sentences and tables."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = tuple(
    path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
    if path.exists()
)
# Commands, Python that is run, files, and what a program answers.
LANGUAGES = ("sh", "python", "yaml", "text")
# What begins a command; one of these in `code` or in an answer is checked like a block.
STARTERS = re.compile(
    r"^(?:\$ |[A-Z_]+=\S+ )*(?:python|make|pip|uv|lightning-jax|tensorboard|git|source|srun|sbatch|"
    r"mpirun|gcloud|kubectl|docker|benchmarks/\w+\.sh) [^=]"
)


@dataclasses.dataclass(frozen=True)
class Block:
    """Text of one language; `where` is `page:line`."""

    where: str
    language: str
    text: str

    @property
    def page(self) -> str:
        return self.where.partition(":")[0]


def blocks() -> list[Block]:
    """All fenced blocks and commands in `code`, page by page from top to bottom."""
    return [block for page in PAGES for block in _of(page)]


def _of(page: Path) -> Iterator[Block]:
    name, language, inside, start = str(page.relative_to(ROOT)), "", [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.match(r"\s*```(\w*)", line):
            if start:
                yield Block(f"{name}:{start}", language, "\n".join(inside) + "\n")
                start = 0
            else:
                language, inside, start = fence[1], [], number
        elif start:
            inside.append(line)
        else:
            for code in re.findall(r"`([^`]+)`", line):
                if STARTERS.match(code):
                    yield Block(f"{name}:{number}", "sh", code)
    assert not start, f"{name}:{start}: a block without an end"
