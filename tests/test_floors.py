"""The house keeps its floors: imports run down only, files and functions stay short.

A new package under lightning_jax/ gets its line in `MAY_IMPORT` and in the table of
docs/architecture.md, which says why; a new file gets its name in that table.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "lightning_jax"
SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
# Generated from the code: tests/docs/test_reference.py.
GENERATED = ("api", "config")
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in GENERATED]
# Files that the reader of a page makes.
READERS_FILES = {
    "configs/mine.py",
    "configs/sweeps/mine.py",
    "train.sbatch",
    "sweep.sbatch",
    "train.yaml",
}
PROGRAMS = sorted((ROOT / "experiments").glob("*.py"))

BASE = {"config", "runtime", "sharding"}
BELOW_MODEL = BASE | {"accounting", "ops", "layers"}
BELOW_TRAINING = BELOW_MODEL | {"data", "model", "checkpoint"}
# What each part of the package may import of the package, besides itself.
MAY_IMPORT = {
    # The front door, for checkers of types: at run time it imports what is asked for.
    "": {"inspect", "infer", "interop", "model", "train"},
    "config": set(),
    "runtime": {"config"},
    "sharding": {"config"},
    "pages": set(),
    "accounting": {"config"},
    "ops": {"ops.kernels", "runtime"},
    "ops.kernels": {"runtime"},
    "data": BASE,
    "layers": BASE | {"ops"},
    "model": BASE | {"ops", "layers"},
    "checkpoint": BASE | {"ops", "model"},
    "train": BELOW_TRAINING,
    "infer": BELOW_TRAINING,
    "arena": BELOW_TRAINING,
    "interop": BELOW_TRAINING | {"train", "infer"},
    "plots": BELOW_MODEL | {"infer", "pages"},
    "card": BELOW_TRAINING | {"train", "infer", "plots", "pages"},
    "inspect": BELOW_TRAINING | {"train", "infer", "interop"},
    "ablation.statistics": {"config"},
    "ablation": BELOW_TRAINING | {"train", "infer", "plots", "card", "pages"},
    "ablation.report": BELOW_TRAINING
    | {"train", "infer", "plots", "card", "pages", "ablation", "ablation.statistics"},
    "aot": BELOW_TRAINING | {"train", "infer"},
}
# The values that kernels take; the ops that choose a kernel stand above it.
KERNELS_MAY_IMPORT = {f"lightning_jax.ops.{name}" for name in ("activation", "mask", "routing")}
# Every message about an unknown name ends in the same "did you mean", that of ops too.
OPS_MAY_IMPORT = {"lightning_jax.config.errors"}
# Libraries that only these parts may import; jax is the other way round.
ONLY_IN = {
    "flax": {"layers", "model", "checkpoint", "interop"},
    "grain": {"data", "checkpoint"},
    "ml_collections": {"runtime"},
    "optax": {"train"},
    "orbax": {"checkpoint"},
}
WITHOUT_JAX = {"config", "accounting", "data"}
OPS_LIBRARIES = {"jax", "numpy"}

MAX_FILE, MAX_FUNCTION, MAX_PROGRAM = 400, 60, 60


def module_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in SOURCES}


def part_of(module):
    """The room of a module: `lightning_jax.ops.kernels.cpu.x` -> `ops.kernels`, `data.x` -> `data`.

    A folder inside a room is part of it unless it has floors of its own.
    """
    names = module.split(".")[1:]
    inner = ".".join(names[:2])
    return inner if inner in MAY_IMPORT else ".".join(names[:1])


def imports(path):
    """Full names of all modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import; write the full name"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def edge_allowed(source, target):
    part = part_of(source)
    allowed = MAY_IMPORT[part] | {part}
    if part == "ops.kernels" and target in KERNELS_MAY_IMPORT:
        return True
    if part == "ops" and target in OPS_MAY_IMPORT:
        return True
    return part_of(target) in allowed


def label(path):
    return str(path.relative_to(ROOT))


def test_every_part_has_a_floor():
    unknown = {part_of(module) for module in MODULES} - set(MAY_IMPORT)
    assert not unknown, f"give {sorted(unknown)} a line in MAY_IMPORT"


def test_the_floors_have_no_cycle():
    done = set()
    while len(done) < len(MAY_IMPORT):
        parts = {part for part, below in MAY_IMPORT.items() if below <= done}
        assert parts - done, f"cycle among {sorted(set(MAY_IMPORT) - done)}"
        done |= parts
    assert "infer" not in MAY_IMPORT["train"] and "train" not in MAY_IMPORT["infer"]


def documented_rooms():
    """Room and names of its files, from the rows of the floors table."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| F\d \| `([\w.]+)` \|([^|]*)\|", text, re.MULTILINE)
    return [(room, sorted(re.findall(r"`(\w+)`", files))) for room, files in rows]


def test_the_floors_table_names_all_rooms_and_files():
    found = {part_of(module): set() for module in MODULES if part_of(module)}
    for module in MODULES:
        part = part_of(module)
        inside = module.removeprefix(f"{PACKAGE}.{part}.").split(".")[0]
        if part and module != f"{PACKAGE}.{part}":
            found[part].add(inside)
    assert dict(documented_rooms()) == {room: sorted(files) for room, files in found.items()}


def test_rooms_of_the_floors_table_import_those_above():
    rooms = [room for room, _ in documented_rooms()]
    for index, room in enumerate(rooms):
        below = MAY_IMPORT[room] & set(rooms[index + 1 :])
        assert not below, f"{room} imports {sorted(below)}, which stand below it"


def exists(name):
    """Whether a path, a module or a name in a module is there, with or without the package."""
    path = name if "/" in name else name.replace(".", "/")
    for root in (ROOT, ROOT / PACKAGE):
        if (root / path).exists() or (root / f"{path}.py").exists():
            return True
        module = (root / path).parent.with_suffix(".py")
        if path != name and module.exists():
            pattern = rf"^(?:def |class )?{name.split('.')[-1]}\b"
            return re.search(pattern, module.read_text(), re.MULTILINE) is not None
    return False


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_paths_in_the_docs_exist(page):
    places = {path.name for path in ROOT.iterdir()} | {part_of(name) for name in MODULES}
    quoted = re.findall(r"`([\w./-]+)`", page.read_text())
    names = [name for name in quoted if re.split(r"[./]", name)[0] in places and name[:1] != "."]
    names = [name for name in names if not name.endswith((".html", ".json", ".jsonl"))]
    fields = re.findall(r"^\| `([\w.]+)`", (ROOT / "docs" / "config.md").read_text(), re.MULTILINE)
    known = {*READERS_FILES, *fields, "data.sources"}
    names = [name for name in names if name.removeprefix("config.") not in known]
    assert not [name for name in names if not exists(name)]


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_run_down(path):
    module, bad = module_of(path), []
    part = part_of(module)
    for target in imports(path):
        library = target.split(".")[0]
        if library == PACKAGE:
            if not edge_allowed(module, target):
                bad.append(target)
        elif (
            library in ("benchmarks", "configs", "experiments", "tests", "notebooks")
            or (library in ONLY_IN and part not in ONLY_IN[library])
            or (library == "jax" and part in WITHOUT_JAX)
            or (part in ("ops", "ops.kernels") and not library_of_ops(library))
        ):
            bad.append(target)
    assert not bad, f"{label(path)} ({part or 'the package'}) may not import {bad}"


def library_of_ops(library):
    return library in OPS_LIBRARIES or library in sys.stdlib_module_names


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        ("lightning_jax.ops.attention", "lightning_jax.ops.kernels.cpu.banded", True),
        ("lightning_jax.ops.kernels.cpu.banded", "lightning_jax.ops.mask", True),
        ("lightning_jax.ops.kernels.cpu.banded", "lightning_jax.ops.attention", False),
        ("lightning_jax.ops.loss", "lightning_jax.config", False),
        ("lightning_jax.ops.loss", "lightning_jax.config.errors", True),
        ("lightning_jax.ops.loss", "lightning_jax.config.fields", False),
        ("lightning_jax.model", "lightning_jax.checkpoint", False),
        ("lightning_jax.train.loop", "lightning_jax.infer.engine", False),
        ("lightning_jax.data.packing", "lightning_jax.model", False),
        ("lightning_jax.train.loop", "lightning_jax.train.step", True),
        ("lightning_jax", "lightning_jax.config", False),
    ],
)
def test_the_rule_itself(source, target, allowed):
    assert edge_allowed(source, target) == allowed


@pytest.mark.parametrize("path", PROGRAMS, ids=label)
def test_programs_are_short_and_stand_alone(path):
    lines = len(path.read_text().splitlines())
    assert lines < MAX_PROGRAM, f"{label(path)} has {lines} lines: its logic belongs in the package"
    assert not [name for name in imports(path) if name.split(".")[0] in ("experiments", "tests")]


def test_files_are_short():
    lengths = {label(path): len(path.read_text().splitlines()) for path in SOURCES + BENCHMARKS}
    long = {name: n for name, n in lengths.items() if n > MAX_FILE}
    assert not long, f"more than {MAX_FILE} lines: {long}"


def test_functions_are_short():
    long = {}
    for path in SOURCES + BENCHMARKS + PROGRAMS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                # A docstring may be as long as the contract it states.
                text = ast.get_docstring(node, clean=False) or ""
                lines = node.end_lineno - node.lineno + 1 - len(text.splitlines())
                if lines > MAX_FUNCTION:
                    long[f"{label(path)}:{node.name}"] = lines
    assert not long, f"more than {MAX_FUNCTION} lines: {long}"


def test_everything_public_has_a_docstring():
    bare = []
    for path in SOURCES + BENCHMARKS + PROGRAMS:
        tree = ast.parse(path.read_text())
        # The `main` of a program is described by the docstring of its module.
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        nodes = [node for node in tree.body if isinstance(node, kinds) and path not in PROGRAMS]
        public = [node for node in nodes if not node.name.startswith("_")]
        bare += [f"{label(path)}:{node.name}" for node in public if not ast.get_docstring(node)]
        if not ast.get_docstring(tree) and path.name != "__init__.py":
            bare.append(label(path))
    assert not bare, f"no docstring: {bare}"


def test_nothing_is_left_for_later():
    words = re.compile("|".join(["TO" + "DO", "FIX" + "ME", r"\bXX" + r"X\b", r"\bHA" + r"CK\b"]))
    folders = (
        "lightning_jax",
        "benchmarks",
        "configs",
        "experiments",
        "tests",
        "docs",
        "notebooks",
    )
    files = [path for name in (*folders, "notebooks") for path in (ROOT / name).rglob("*")]
    found = [
        f"{label(path)}:{number}"
        for path in files
        if path.suffix in (".py", ".md", ".ipynb")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if words.search(line)
    ]
    assert not found, f"do it or drop it: {found}"
