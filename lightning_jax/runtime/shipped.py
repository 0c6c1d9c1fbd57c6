"""What comes with the package: its version, and where its programs and config files are.

A checkout, also one installed with `pip install -e`, has `experiments/` and `configs/` beside the
package. A wheel has them inside, in `lightning_jax/shipped/`: as top-level packages of a user's
environment they would take names that belong to her.
"""

from __future__ import annotations

import ast
import glob
import os
import sys
from pathlib import Path

from lightning_jax.config.errors import UserError, suggest

CONFIGS, SWEEPS, PROGRAMS = "configs", "configs/sweeps", "experiments"
# As setup.py has it.
IN_WHEEL = "shipped"
_PACKAGE = Path(__file__).resolve().parents[1]
_FILES = "[!_]*.py"


def version() -> str:
    """Returns the version of this package, installed or not."""
    return sys.modules[__name__.partition(".")[0]].__version__


def root() -> Path:
    """Returns the folder that has `configs/` and `experiments/`."""
    inside = _PACKAGE / IN_WHEEL
    return inside if inside.is_dir() else _PACKAGE.parent


def is_here() -> bool:
    """Whether that is the present folder: a checkout, where Python finds them by itself."""
    return os.path.samefile(root(), ".")


def expose() -> None:
    """Makes `configs` and `experiments` importable, before any other packages of these names."""
    sys.path.insert(0, str(root()))


def programs() -> dict[str, str]:
    """Returns the programs by name, with the first line of what each says of itself."""
    found = {}
    for path in sorted((root() / PROGRAMS).glob(_FILES)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        found[path.stem] = text.partition("\n")[0]
    return found


def names(folder: str) -> list[str]:
    """Returns what the files of a folder are called, such as "small" for `configs/small.py`."""
    return sorted(path.stem for path in (root() / folder).glob(_FILES))


def find(path: str, folder: str, given: str) -> str:
    """Returns the file that a user means by a path, or by the name of one that is shipped.

    Args:
      path: of a file; or `small`, `small.py` or `configs/small.py`, from any folder.
      folder: of the files that have names: `CONFIGS` or `SWEEPS`.
      given: the flag, as an error says it.

    Raises:
      UserError: there is no such file; lists those that there are.
    """
    ours = os.path.join("" if is_here() else root(), folder, path.removeprefix(f"{folder}/"))
    for file in (path, ours, f"{ours}.py"):
        if os.path.isfile(file):
            return file
    beside = glob.glob(os.path.join(os.path.dirname(path), _FILES)) if "/" in path else []
    near = sorted(beside) or names(folder)
    raise UserError(f"{given}: no such file: {suggest(path.removesuffix('.py'), near)}")
