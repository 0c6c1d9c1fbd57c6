"""Every JSON file of a run's folder, damaged in every way: one line of error, or numbers."""

import dataclasses
import json
import math
import shutil
import subprocess

import pytest

from lightning_jax.ablation.report.curves import curves
from lightning_jax.ablation.report.provenance import provenance
from lightning_jax.ablation.results import Run, run_row
from lightning_jax.checkpoint import (
    Checkpointer,
    all_steps,
    checkpoints_dir,
    folders,
    load_run,
    read_meta,
)
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.interop.convert import describe, is_run
from lightning_jax.train import loop
from lightning_jax.train.metrics import MetricsWriter, read_rows
from lightning_jax.train.plan import Plan
from tests.ablation.fake_runs import write_run
from tests.tiny import tiny_run, write_corpus
from tests.train.damage import damaged

pytestmark = pytest.mark.usefixtures("one_device")

RUN = Run("arm", 0)
# Random changes of each file, besides those of `damage.BROKEN`.
COUNTS = pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.slow)])


class Reached(Exception):
    """A training has read its folder and would begin."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep's folder with one finished run, whose checkpoint has no arrays: (folder, config)."""
    root = tmp_path_factory.mktemp("sweep")
    config = tiny_run(write_corpus(root / "corpus"), model__vocab_size=272)
    workdir = RUN.folder(root)
    write_run(config, workdir)
    plan = Plan.of(config)
    with Checkpointer(workdir, keep=1) as checkpointer:
        end = plan.total_steps
        checkpointer.save(end, {}, None, to_dict(plan.meta(end)))
    return root, config


@pytest.fixture
def root(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def require_finite(value):
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for entry in value:
            require_finite(entry)
    assert not isinstance(value, float) or math.isfinite(value)


def check(reader, name):
    """Calls a reader: it may raise a UserError of one line that names the file."""
    try:
        require_finite(reader())
    except Reached:
        pass
    except UserError as error:
        text = str(error)
        # A readable config that differs is compared with that of "this workdir".
        known = (name, "this workdir", "bits_per_byte is not finite")
        assert any(words in text for words in known), text[:200]
        assert "\n" not in text and len(text) < 2000, text


def documents(path, count):
    """The file damaged; of a file with one row per line also single rows."""
    content = path.read_bytes()
    if path.suffix != ".jsonl":
        return damaged(json.loads(content), count, seed=count)
    first, *rest = content.splitlines(keepends=True)
    rows = [line + b"\n" for line in damaged(json.loads(first), count, seed=count)]
    return [content[:-9], *rows, *(row + b"".join(rest) for row in rows)]


@pytest.fixture
def train(whole, root, monkeypatch):
    """A function that trains in the folder up to its first step."""

    def reached(*args, **options):
        raise Reached

    monkeypatch.setattr(loop, "open_session", reached)
    return lambda: loop.run(whole[1], RUN.folder(root))


# Case E4
@COUNTS
@pytest.mark.parametrize("name", ["config.json", "run.json", "metrics.jsonl", "evaluation.json"])
def test_a_damaged_file_is_one_line_or_finite(root, train, name, count):
    workdir = RUN.folder(root)
    readers = {
        "config.json": [
            train,
            lambda: is_run(workdir),
            lambda: describe(workdir),
            lambda: run_row(RUN, workdir),
        ],
        "run.json": [train, lambda: provenance([RUN], root)],
        "metrics.jsonl": [
            lambda: read_rows(workdir / name),
            lambda: MetricsWriter(workdir, resume_step=3).__exit__(),
            lambda: run_row(RUN, workdir),
            lambda: curves([RUN], root),
        ],
        "evaluation.json": [lambda: run_row(RUN, workdir)],
    }
    texts = {path: path.read_bytes() for path in workdir.glob("*.json*")}
    for content in documents(workdir / name, count):
        for reader in readers[name]:
            for path, text in texts.items():
                path.write_bytes(text)
            (workdir / name).write_bytes(content)
            check(reader, name)


# Case E4
@COUNTS
def test_a_damaged_meta_is_one_line_or_another_run(root, train, count):
    workdir = RUN.folder(root)
    [folder] = [path for path in checkpoints_dir(workdir).iterdir()]
    path = folder / "meta" / "metadata"
    for content in documents(path, count):
        path.write_bytes(content)
        (folder / "sha256.json").unlink()
        folders.seal(folder)  # As if it had been saved so.
        for reader in (lambda: read_meta(workdir), lambda: describe(workdir), train):
            check(reader, "checkpoints")


# Case E4
@COUNTS
def test_a_damaged_list_of_digests_is_one_line(root, train, count):
    workdir = RUN.folder(root)
    [folder] = [path for path in checkpoints_dir(workdir).iterdir()]
    path = folder / "sha256.json"
    listed = json.loads(path.read_text())
    for content in documents(path, count):
        path.write_bytes(content)
        for reader in (lambda: read_meta(workdir), lambda: load_run(workdir), train):
            check(reader, "checkpoints")
    path.write_text(json.dumps(listed))
    assert read_meta(workdir).step == int(folder.name)


# Case A9
@pytest.mark.slow
def test_training_goes_on_from_the_good_checkpoint_that_is_named(tmp_path):
    config = tiny_run(write_corpus(tmp_path / "corpus"), checkpoint_every=4, keep_checkpoints=2)
    workdir = tmp_path / "a run"
    loop.run(config, workdir)
    folder = checkpoints_dir(workdir)
    steps, rows = all_steps(folder), read_rows(workdir / "metrics.jsonl")
    good, newest = steps[-2:]
    path = max((folder / str(newest) / "params").rglob("*"), key=lambda path: path.stat().st_size)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=f"; checkpoint {good} is good: to train on") as caught:
        loop.run(config, workdir)
    assert read_rows(workdir / "metrics.jsonl") == rows
    subprocess.run(str(caught.value).split("first run ")[1], shell=True, check=True)
    loop.run(config, workdir)
    assert all_steps(folder) == steps and (workdir / f"damaged-{newest}").is_dir()
    again = read_rows(workdir / "metrics.jsonl")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
