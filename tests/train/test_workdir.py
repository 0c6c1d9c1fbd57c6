"""The folder of a run: one process has it, nothing is left of a refusal, and what it holds."""

import dataclasses
import errno
import json
import os

import jax
import numpy as np
import pytest

from lightning_jax.checkpoint import Checkpointer
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.runtime import lock
from lightning_jax.runtime.files import write_json
from lightning_jax.train import workdir as folder
from lightning_jax.train.plan import Plan
from lightning_jax.train.workdir import Past, claim
from tests.tiny import tiny_run

CONFIG = tiny_run("corpus.jsonl", model__vocab_size=272)


def save(path, steps, config=CONFIG):
    """Saves a checkpoint with the run's description and one number."""
    with Checkpointer(path, keep=9) as checkpointer:
        meta = to_dict(Plan.of(config).meta(steps))
        checkpointer.save(steps, {"params": {"w": np.ones(1)}}, None, meta)


def test_a_claim_makes_the_folder_and_an_unused_one_leaves_nothing(tmp_path):
    with claim(tmp_path / "some" / "run") as claimed:
        assert claimed.path.is_absolute() and claimed.writes
        assert [path.name for path in claimed.path.iterdir()] == [folder.LOCK]
        with claim(claimed) as same:
            assert same is claimed
    assert not list(tmp_path.iterdir())
    with pytest.raises(KeyError), claim(tmp_path / "some" / "run"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_was_written_or_was_there_before_stays(tmp_path):
    (tmp_path / "there").mkdir()
    with claim(tmp_path / "there" / "run"):
        pass
    with claim(tmp_path / "there"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with claim(tmp_path / "there" / "run") as claimed:
        (claimed.path / "file").write_text("")
    assert (tmp_path / "there" / "run" / "file").exists()
    assert not (tmp_path / "there" / "run" / folder.LOCK).exists()


def test_the_second_one_is_one_line(tmp_path):
    with claim(tmp_path), pytest.raises(UserError) as error, claim(tmp_path):
        pytest.fail("claimed twice")
    who = f"workdir = {str(tmp_path)!r}: in use by process {os.getpid()} on "
    assert str(error.value).startswith(who)


def test_a_folder_that_a_refused_command_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    hold, calls = lock.hold, []

    def vanish(path, what):
        calls.append(path)
        if len(calls) == 1:
            path.parent.rmdir()
        return hold(path, what)

    monkeypatch.setattr(lock, "hold", vanish)
    with claim(tmp_path / "new" / "run") as claimed:
        assert claimed.path.is_dir() and len(calls) == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "Read-only file system"),
        (errno.EACCES, "Permission denied"),
        (errno.ENOENT, "No such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, number, reason):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.os, "pwrite", refuse)
    message = rf"workdir = '.*run': cannot be written \({reason}\)$"
    with pytest.raises(UserError, match=message), claim(tmp_path / "new" / "run"):
        pytest.fail("claimed")
    assert not list(tmp_path.iterdir())


def test_a_file_and_no_folder_at_all_are_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"workdir = '.*': cannot be written \("), claim(path):
            pass
    with pytest.raises(UserError, match="workdir = '': must be a folder"), claim(""):
        pass
    with pytest.raises(UserError, match="a local or mounted folder"), claim("gs://bucket/run"):
        pass
    assert (tmp_path / "file").read_text() == "in the way"


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with claim(tmp_path / "run") as claimed:
        assert claimed.writes
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with claim(tmp_path / "run") as other:
            assert not other.writes and other.path == claimed.path
        assert (tmp_path / "run" / folder.LOCK).exists()
    with claim(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_an_empty_folder_takes_any_run(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        past = Past.read(path)
        assert past.saved is None and past.config is None and not past.has_trained
    # Of a run that took no step, and may have failed at it, nothing depends on its config.
    write_json(tmp_path / "config.json", to_dict(CONFIG))
    (tmp_path / "metrics.jsonl").touch()
    assert Past.read(tmp_path).config is None


# Case A4: also a config.json that says something else.
@pytest.mark.parametrize("config", [None, dataclasses.replace(CONFIG, seed=7)])
def test_the_newest_checkpoints_own_config_counts(tmp_path, config):
    save(tmp_path, 3)
    if config:
        write_json(tmp_path / "config.json", to_dict(config))
    past = Past.read(tmp_path)
    assert past.config == to_dict(CONFIG) and past.saved.step == past.steps == 3
    assert past.has_trained
    save(tmp_path, 6, dataclasses.replace(CONFIG, log_every=5))
    assert Past.read(tmp_path).config["log_every"] == 5


def test_without_a_checkpoint_the_config_of_logged_steps_counts(tmp_path):
    write_json(tmp_path / "config.json", to_dict(CONFIG))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    past = Past.read(tmp_path)
    assert past.config == to_dict(CONFIG) and past.saved is None and past.has_trained
    write_json(tmp_path / "config.json", {"stages": {}})
    with pytest.raises(UserError, match="config.json: config field seed is missing"):
        Past.read(tmp_path)


def test_weights_from_elsewhere_have_not_trained(tmp_path):
    save(tmp_path, 0)
    past = Past.read(tmp_path)
    assert past.config == to_dict(CONFIG) and past.saved.step == 0 and not past.has_trained


@pytest.mark.parametrize(
    "content", ['{"model_type": "llama"}', "{}", "[]", "", "{", "\x00", '{"stages": 1e999}']
)
@pytest.mark.parametrize("steps", [None, 3])
def test_the_config_of_another_program_stays_and_the_advice_works(tmp_path, content, steps):
    if steps:
        save(tmp_path, steps)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json: .*, or move the file away$"):
        Past.read(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "other.json")
    assert (Past.read(tmp_path).config is not None) == bool(steps)


def test_the_metrics_of_another_program_stay_and_the_advice_works(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match="metrics.jsonl: belongs to no checkpoint and no config"):
        Past.read(tmp_path)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "other.jsonl")
    assert Past.read(tmp_path).config is None


def test_a_damaged_record_is_one_line(tmp_path):
    save(tmp_path, 3)
    (tmp_path / "run.json").write_text(json.dumps([]))
    with pytest.raises(UserError, match="run.json: .*move the file away"):
        Past.read(tmp_path)
