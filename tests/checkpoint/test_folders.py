"""Folders of checkpoints: numbers, digests of every file, and which of them are good."""

import json
import os

import pytest

from lightning_jax.checkpoint import folders
from lightning_jax.config.errors import UserError

FILES = {
    "meta/metadata": b'{"step": 30}',
    "params/d/abc": bytes(range(256)),
    "params/_METADATA": b"{}",
    "params/empty": b"",
    "optimizer/d/abc": b"1",
    "_CHECKPOINT_METADATA": b"{}",
}


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "30", FILES)


def make(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    folders.seal(folder)
    return folder


def test_a_step_is_a_plain_number(tmp_path):
    for name in ("0", "30", "007", "4.orbax-checkpoint-tmp", "-1", "\u0664", "damaged-5", "x"):
        (tmp_path / name).mkdir()
    assert folders.all_steps(tmp_path) == [0, 30]
    assert folders.all_steps(tmp_path / "absent") == []


def test_what_was_sealed_is_good(folder):
    folders.verify(folder, ["params", "meta", "optimizer"])
    assert folders.stored_items(folder) == {"params", "meta", "optimizer"}
    assert folders.newest_good(folder.parent) == 30
    with pytest.raises(UserError, match="^it lacks ema$"):
        folders.verify(folder, ["ema"])


# Case F13
def test_sealing_syncs_every_file_and_folder(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    folder = make(tmp_path / "30", FILES)
    parts = {str(path) for path in [folder, *folder.rglob("*")]}
    # The list is synced under the name that it has before it is whole.
    assert parts - set(synced) == {str(folder / "sha256.json")}
    assert any(".sha256.json." in name for name in synced)
    assert synced.index(str(folder / "params/d/abc")) < synced.index(str(folder / "params/d"))


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


# Case F3
@pytest.mark.parametrize("name", [name for name in FILES if FILES[name] and "/" in name])
@pytest.mark.parametrize("hurt", [_cut, _flip])
def test_every_changed_byte_is_noticed_in_the_item_that_is_read(folder, name, hurt):
    hurt(folder / name)
    item = name.split("/")[0]
    with pytest.raises(folders.Damaged, match=f"^{name} is damaged$"):
        folders.verify(folder, [item])
    folders.verify(folder, folders.stored_items(folder) - {item})
    assert folders.newest_good(folder.parent) is None


@pytest.mark.parametrize("name", [name for name in FILES if "/" in name])
def test_a_missing_file_is_noticed(folder, name):
    (folder / name).unlink()
    with pytest.raises(folders.Damaged, match=f"^{name} is missing$"):
        folders.verify(folder, [name.split("/")[0]])


def test_a_list_of_items_alone_is_enough(folder):
    """As runs wrote it that did not list what lies beside the items."""
    path = folder / "sha256.json"
    listed = json.loads(path.read_text())
    path.write_text(json.dumps({name: d for name, d in listed.items() if "/" in name}))
    _flip(folder / "_CHECKPOINT_METADATA")
    folders.verify(folder, ["params"])
    assert folders.newest_good(folder.parent) == 30


@pytest.mark.parametrize("hurt", [_cut, _flip, lambda path: path.unlink()])
def test_what_lies_beside_the_items_belongs_to_each(folder, hurt):
    hurt(folder / "_CHECKPOINT_METADATA")
    with pytest.raises(folders.Damaged, match="^_CHECKPOINT_METADATA is (damaged|missing)$"):
        folders.verify(folder, ["params"])


def test_a_foreign_file_is_noticed(folder):
    (folder / "params" / "d" / "other").write_text("x")
    with pytest.raises(folders.Damaged, match="^params/d/other is not in its sha256.json$"):
        folders.verify(folder, ["params"])
    folders.verify(folder, ["optimizer"])


# Cases E4 and F3
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "not JSON"),
        (b'{"params/d/abc": "ab', "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 1000, "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b"{}", "it lacks params"),
        (b'{"params/d/abc": NaN}', "not JSON"),
        (b'{"params/d/abc": 1}', "sha256.json is damaged"),
        (b'{"..": "ab", "params/d/abc": "ab"}', ".. is missing"),
        (b'{"params": "ab", "params/d/abc": "ab"}', "params is missing"),
        (b'{"params/../../x": "ab"}', "params/../../x is missing"),
        (b'{"params/d/abc": "ab"}', "params/_METADATA is not in its sha256.json"),
    ],
)
def test_a_damaged_list_is_one_line(folder, content, message):
    path = folder / "sha256.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        folders.verify(folder, ["params"])
    assert "\n" not in str(caught.value)
    assert folders.newest_good(folder.parent) is None


def test_the_list_of_another_checkpoint_is_noticed(folder, tmp_path):
    other = make(tmp_path / "40", {**FILES, "params/d/abc": b"other"})
    (folder / "sha256.json").write_bytes((other / "sha256.json").read_bytes())
    with pytest.raises(folders.Damaged, match="params/d/abc is damaged"):
        folders.verify(folder, ["params"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step": 40}, "by its meta it is step 40: the folder was renamed or copied"),
        ({}, "meta: lacks step"),
        ({"step": "30"}, "step = '30': must be a whole number"),
        ({"step": 30.0}, "step = 30.0: must be a whole number"),
    ],
)
def test_the_number_of_a_folder_is_its_step(folder, values, message):
    folders.check_number(folder, {"step": 30})
    with pytest.raises(UserError, match=message):
        folders.check_number(folder, values)
    (folder / "meta/metadata").write_text(json.dumps(values))
    folders.seal(folder)
    assert folders.newest_good(folder.parent) is None


def test_the_newest_good_one_may_be_an_older_one(folder, tmp_path):
    for step in (20, 10):
        files = {**FILES, "meta/metadata": json.dumps({"step": step}).encode()}
        make(tmp_path / str(step), files)
    _flip(folder / "params/d/abc")
    assert folders.newest_good(tmp_path) == 20
    _flip(tmp_path / "20" / "meta/metadata")
    assert folders.newest_good(tmp_path) == 10
