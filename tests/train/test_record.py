"""`run.json` grows and nothing in it is overwritten, however often a run starts."""

import json
import sys

import jax
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.train import record
from lightning_jax.train.record import Record

TEXT = {"a": {"fingerprint": "0", "documents": 3}, "b": {"fingerprint": "1", "documents": 4}}


def read(path):
    return json.loads((path / "run.json").read_text())


def text(**fingerprints):
    return {name: {"fingerprint": value, "documents": 3} for name, value in fingerprints.items()}


def test_a_session_says_what_was_asked_for_and_with_what(tmp_path):
    made = Record.read(tmp_path)
    made.begin("digest", data=TEXT)
    made.add_session(1, checkpoint=None, changed={"log_every": [1, 2]})
    made.write(tmp_path)
    assert read(tmp_path)["data"] == TEXT and read(tmp_path)["tokenizer"] == "digest"
    [session] = read(tmp_path)["sessions"]
    assert session["first_step"] == 1 and session["checkpoint"] is None
    assert session["changed"] == {"log_every": [1, 2]}
    assert session["command"] == sys.argv and session["versions"]["jax"] == jax.__version__
    assert session["time"].endswith("+00:00") and session["host"]
    assert session["git_commit"] or session["git_commit_unknown"]
    assert Record.read(tmp_path).sessions == [session]


def test_origin_and_first_text_stay_and_changes_stand_beside_them(tmp_path):
    # Case A6
    made = Record.read(tmp_path)
    made.begin("digest", origin={"path": "elsewhere"})
    made.add_session(1, checkpoint=0)
    made.write(tmp_path)
    made = Record.read(tmp_path)
    made.begin("digest", data=text(a="0", b="1"), origin=made.origin)
    made.write(tmp_path)
    for first_step, fingerprint in ((11, "2"), (21, "2"), (31, "3")):
        made = Record.read(tmp_path)
        made.go_on("another", text(a=fingerprint, b="1"), first_step)
        made.add_session(first_step)
        made.write(tmp_path)
        known = Record.read(tmp_path).known_data()
        assert (known["a"]["fingerprint"], known["b"]["fingerprint"]) == (fingerprint, "1")
    after = read(tmp_path)
    assert after["origin"] == {"path": "elsewhere"} and after["tokenizer"] == "digest"
    assert after["data"] == text(a="0", b="1")
    changes = [(row["first_step"], row["fingerprint"]) for row in after["data_changes"]["a"]]
    assert changes == [(11, "2"), (31, "3")] and [*after["data_changes"]] == ["a"]
    assert [session["first_step"] for session in after["sessions"]] == [1, 11, 21, 31]


def test_what_was_not_known_is_added_with_its_step(tmp_path):
    made = Record.read(tmp_path)
    made.go_on("digest", text(a="0"), 31)
    made.write(tmp_path)
    assert read(tmp_path)["data"] == {"a": {"first_step": 31, **text(a="0")["a"]}}
    assert Record.read(tmp_path).tokenizer == "digest"


@pytest.mark.slow
def test_a_thousand_starts_keep_the_file_small(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "git_commit", lambda: ("commit", None))
    made = Record.read(tmp_path)
    made.begin("digest", data=text(a="0"))
    for start in range(1, 251):
        made.go_on("digest", text(a=str(start)), start)
        made.add_session(start)
    made.write(tmp_path)
    after = read(tmp_path)
    starts = [session["first_step"] for session in after["sessions"]]
    assert starts == [1, *range(152, 251)] and after["sessions_left_out"] == 150
    assert [row["first_step"] for row in after["data_changes"]["a"]] == [*range(231, 251)]
    assert after["data"] == text(a="0")


def test_entries_of_others_stay(tmp_path):
    (tmp_path / "run.json").write_text('{"note": "mine"}')
    made = Record.read(tmp_path)
    made.begin("digest", data=TEXT)
    made.write(tmp_path)
    assert read(tmp_path)["note"] == "mine"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"data": ',
        '{"data": []}',
        '{"data": {"a": 1}}',
        '{"data": {"a": {}}}',
        '{"data": {"a": {"fingerprint": 3}}}',
        '{"data": {"a": {"fingerprint": "0"}}, "data_changes": {"a": [{}]}}',
        '{"data_changes": []}',
        '{"origin": "x"}',
        '{"tokenizer": 1}',
        '{"sessions": {}}',
        '{"sessions": [1]}',
        '{"sessions": [{}]}',
        '{"sessions": [{"first_step": 1, "command": "x", "versions": {}, "git_commit": null}]}',
        '{"sessions_left_out": -1}',
        "[" * 5000,
    ],
)
def test_a_damaged_file_is_one_line_whose_advice_works(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run.json: .*; move the file away to begin a new record$"):
        Record.read(tmp_path)
    (tmp_path / "run.json").rename(tmp_path / "old.json")
    made = Record.read(tmp_path)
    made.go_on("digest", TEXT, 1)
    made.write(tmp_path)
    assert read(tmp_path)["data"]["a"]["fingerprint"] == "0"
