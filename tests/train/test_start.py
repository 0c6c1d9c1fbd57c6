"""All that a run depends on is compared before anything is written, and weights make a folder."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest

from configs import base
from lightning_jax import model as lm
from lightning_jax.checkpoint import load_run, read_meta
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, to_dict
from lightning_jax.train import loop
from lightning_jax.train.plan import Plan
from lightning_jax.train.resolve import resolve
from lightning_jax.train.start import look, write_start
from lightning_jax.train.workdir import claim
from tests.tiny import WORDS, tiny_config, tiny_run, write_corpus
from tests.train.test_workdir import save

CONFIG = tiny_run("corpus.jsonl", model__vocab_size=272, model__moe__bias_update_rate=0.1)
ORIGIN = {"path": "elsewhere"}


def write_texts(folder, count=12):
    """Writes text files with different words; returns their glob."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.txt").write_text(" ".join(WORDS[number % 7 :]) + f" {number}")
    return str(folder / "*.txt")


def run_of(records, texts, **changes):
    """A run over a record file `a` and text files `b`, of which the second stage reads more."""
    config = tiny_run(records, **changes)
    sources = tuple(
        dataclasses.replace(source, path=path)
        for source, path in zip(config.data.sources, (records, texts), strict=True)
    )
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))


@pytest.fixture
def config(tmp_path):
    return run_of(write_corpus(tmp_path / "text"), write_texts(tmp_path / "text" / "more"))


def begin(config, path, steps=3, **options):
    """What a session writes before its first step, and a checkpoint as if it had run."""
    with claim(path) as claimed:
        start = look(config, claimed.path, **options)
        start.write(claimed)
    if steps is not None:
        save(path, steps, start.resolved.config)
    return start


def files(path):
    """Everything under a folder: names, contents and times of change."""
    return {
        str(file.relative_to(path)): (file.stat().st_mtime_ns, file.is_file() and file.read_bytes())
        for file in sorted(path.rglob("*"))
    }


def refused(config, path, message, **options):
    """The run is refused with one line, and everything is as before."""
    before = files(path.parent)
    with pytest.raises(UserError, match=message) as error, claim(path) as claimed:
        look(config, claimed.path, **options)
    assert "\n" not in str(error.value)
    assert {**files(path.parent), path.name: 0} == {**before, path.name: 0}


def record(path):
    return json.loads((path / "run.json").read_text())


def test_a_session_is_recorded_with_config_and_tokenizer(tmp_path, config):
    path = tmp_path / "run"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bpe:270"))
    start = begin(config, path, steps=None)
    assert {file.name for file in path.iterdir()} == {"config.json", "run.json", "tokenizer.json"}
    written = build(RunConfig, json.loads((path / "config.json").read_text()))
    assert written == start.resolved.config == start.plan.config
    assert written.model.vocab_size == 272
    assert record(path)["data"] == start.data == start.sources.fingerprint()
    assert record(path)["tokenizer"] == start.resolved.digest
    save(path, 6, written)
    later = dataclasses.replace(config, log_every=5)
    assert begin(later, path, None).changed == [("log_every", 1, 5)]
    first, second = record(path)["sessions"]
    assert (first["first_step"], first["checkpoint"], first["changed"]) == (1, None, {})
    assert (second["first_step"], second["checkpoint"]) == (7, 6)
    assert second["changed"] == {"log_every": [1, 5]}
    assert json.loads((path / "config.json").read_text())["log_every"] == 5


def test_a_source_that_no_stage_takes_is_said_to_be_evaluated_only(tmp_path, config, caplog):
    stages = [dataclasses.replace(stage, mixture=(("a", 1.0),)) for stage in config.stages]
    with caplog.at_level(logging.WARNING), claim(tmp_path / "run") as claimed:
        look(dataclasses.replace(config, stages=tuple(stages)), claimed.path)
    assert "data.sources.b: no stage trains on it" in caplog.text
    assert "stages.decay.mixture.b = 0.1 would" in caplog.text


# Case A1: any change of the text, of one file of records or of many files.
def test_more_streams_than_documents_are_refused_before_anything_is_written(tmp_path):
    config = run_of(
        write_corpus(tmp_path, documents=3), write_texts(tmp_path / "b"), data__streams=4
    )
    refused(
        config, tmp_path / "run", r"^data.streams = 4: must be at most 2, the documents of data"
    )
    assert not (tmp_path / "run").exists()


def halve(folder):
    lines = (folder / "corpus.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:30]))
    return "a"


def edit(folder):
    text = (folder / "corpus.jsonl").read_text()
    (folder / "corpus.jsonl").write_text(text.replace("lambda", "lambdb", 1))
    return "a"


def add(folder):
    (folder / "more" / "new.txt").write_text("new words")
    return "b"


def remove(folder):
    (folder / "more" / "3.txt").unlink()
    return "b"


def rename(folder):
    (folder / "more" / "3.txt").rename(folder / "more" / "33.txt")
    return "b"


def swap(folder):
    one, two = (folder / "more" / f"{number}.txt" for number in (3, 4))
    first, second = one.read_text(), two.read_text()
    one.write_text(second)
    two.write_text(first)
    return "b"


@pytest.mark.parametrize("change", [halve, edit, add, remove, rename, swap])
@pytest.mark.parametrize("steps", [3, 10])
def test_changed_text_is_refused_by_name_until_it_is_allowed(
    tmp_path, config, caplog, change, steps
):
    path, text = tmp_path / "run", tmp_path / "text"
    begin(config, path, steps)
    shutil.copytree(text, tmp_path / "copy")
    first = record(path)["data"]
    name = change(text)
    now = r"\d+ documents \(\d+ bytes\) and \d+ documents \(\d+ bytes\) held out"
    message = rf"^data.sources.{name}: its text has changed: {now} before, {now} now; restore it, "
    refused(config, path, message)
    # Its advice: another folder, the flag, and to restore it.
    begin(config, tmp_path / "other", None)
    with caplog.at_level(logging.WARNING):
        begin(config, path, None, allow_changed_data=True)
    assert f"data.sources.{name}: its text has changed" in caplog.text
    assert f"allowed from step {steps + 1} on" in caplog.text
    after = record(path)
    assert after["data"] == first and [*after["data_changes"]] == [name]
    assert [row["first_step"] for row in after["data_changes"][name]] == [steps + 1]
    begin(config, path, None)
    shutil.rmtree(text)
    (tmp_path / "copy").rename(text)
    refused(config, path, message)
    (path / "run.json").write_text(json.dumps({**after, "data_changes": {}}))
    begin(config, path, None)
    assert record(path)["data"] == first


def test_counts_before_and_now_are_in_the_line(tmp_path, config):
    begin(config, tmp_path / "run")
    rows = [record(tmp_path / "run")["data"]["a"]]
    halve(tmp_path / "text")
    with pytest.raises(UserError) as error:
        begin(config, tmp_path / "run")
    rows.append(begin(config, tmp_path / "other").data["a"])
    for row, when in zip(rows, ("before", "now"), strict=True):
        train = f"{row['documents']} documents ({row['bytes']} bytes)"
        held_out = f"{row['eval_documents']} documents ({row['eval_bytes']} bytes) held out"
        assert f"{train} and {held_out} {when}" in str(error.value)
    assert rows[0]["documents"] + rows[0]["eval_documents"] == 60
    assert rows[1]["documents"] + rows[1]["eval_documents"] == 30


def test_text_of_a_run_that_took_no_step_is_free(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path, None)
    halve(tmp_path / "text")
    start = begin(config, path, None)
    assert record(path)["data"] == start.data and not record(path).get("data_changes")
    # Steps that were logged, but not saved, were trained on it.
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    edit(tmp_path / "text")
    refused(config, path, "^data.sources.a: its text has changed")


def test_the_same_text_under_another_path_is_accepted(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path)
    (tmp_path / "text").rename(tmp_path / "moved")
    refused(config, path, "data.sources.a.path = '.*text/corpus.jsonl': ")
    moved = run_of(str(tmp_path / "moved" / "corpus.jsonl"), str(tmp_path / "moved/more/*.txt"))
    start = begin(moved, path, None)
    assert {field for field, _, _ in start.changed} == {
        "data.sources.a.path",
        "data.sources.b.path",
    }
    assert not record(path)["data_changes"]
    add(tmp_path / "moved")
    refused(moved, path, "^data.sources.b: its text has changed")


def test_without_its_record_a_run_goes_on_with_a_warning_unless_its_text_moved(
    tmp_path, config, caplog
):
    path = tmp_path / "run"
    begin(config, path)
    (path / "run.json").unlink()
    shutil.copytree(tmp_path / "text", tmp_path / "moved")
    moved = run_of(str(tmp_path / "moved" / "corpus.jsonl"), config.data.sources[1].path)
    refused(moved, path, "^data.sources.a: its path has changed, and run.json does not say")
    with caplog.at_level(logging.WARNING):
        start = begin(config, path, None)
    assert "data.sources.b: run.json does not say what the text was before" in caplog.text
    assert record(path)["data"]["a"] == {"first_step": 4, **start.data["a"]}
    begin(moved, path, None)


def test_a_damaged_record_beside_good_checkpoints_can_be_moved_away(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path)
    (path / "run.json").write_text("{")
    refused(config, path, "run.json: not JSON .*; move the file away to begin a new record")
    (path / "run.json").rename(path / "old.json")
    begin(config, path, None)


# Case A9
def test_a_damaged_array_is_noticed_before_anything_is_written(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path)
    save(path, 6, begin(config, path, None).resolved.config)
    params = (file for file in (path / "checkpoints/6/params").rglob("*") if file.is_file())
    largest = max(params, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    refused(config, path, "cannot restore step 6 .* is damaged; checkpoint 3 is good: .* mv ")


# Case A4
def test_without_config_json_the_checkpoints_config_counts(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path)
    (path / "config.json").unlink()
    refused(dataclasses.replace(config, seed=7), path, "^seed = 7: this workdir's run has 0; ")
    decay = dataclasses.replace(config.optimizer, weight_decay=0.5)
    refused(dataclasses.replace(config, optimizer=decay), path, "^optimizer.weight_decay = 0.5: ")
    begin(config, path, None)
    assert json.loads((path / "config.json").read_text())["seed"] == 0


# Case A3
def test_a_stage_of_the_checkpoint_that_the_config_lacks(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path, 10)
    shorter = dataclasses.replace(config, stages=config.stages[:1])
    refused(shorter, path, "checkpoint 10 belongs to stage 'decay', which the config lacks")


def test_another_vocabulary_is_another_run(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path)
    model = dataclasses.replace(config.model, vocab_size=288)
    refused(dataclasses.replace(config, model=model), path, "^model.vocab_size = 288: .* has 272")


def test_a_copied_folder_and_a_link_are_the_same_run(tmp_path, config):
    begin(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "copy")
    (tmp_path / "link").symlink_to("run")
    for name in ("elsewhere/copy", "link"):
        start = begin(config, tmp_path / name, None)
        assert start.saved.step == 3
    assert len(record(tmp_path / "run")["sessions"]) == 2


def test_the_tokenizer_of_a_run_is_compared(tmp_path, config):
    path = tmp_path / "run"
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer="bpe:270"))
    begin(config, path)
    kept = (path / "tokenizer.json").read_bytes()
    (path / "tokenizer.json").write_bytes(kept + b"\n")
    refused(config, path, "^data.tokenizer = 'bpe:270': not the tokenizer with which this workdir")
    (path / "tokenizer.json").write_bytes(kept)  # its advice
    begin(config, path, None)
    # One that is lost is trained again, from the same text to the same file.
    (path / "tokenizer.json").unlink()
    begin(config, path, None)
    assert (path / "tokenizer.json").read_bytes() == kept
    # Not where nobody knows any more which file that was.
    for name in ("tokenizer.json", "run.json"):
        (path / name).unlink()
    message = "the files of this run's tokenizer are lost, .* restore them in .*run$"
    refused(config, path, f"^data.tokenizer = 'bpe:270': {message}")
    (path / "tokenizer.json").write_bytes(kept)
    begin(config, path, None)


def test_the_tokenizer_of_somebody_else_stays(tmp_path, config):
    path = tmp_path / "run"
    path.mkdir()
    (path / "tokenizer.json").write_text("mine")
    refused(config, path, "^data.tokenizer = 'bytes': is not .*run/tokenizer.json; move that file")
    (path / "tokenizer.json").rename(path / "other.json")
    begin(config, path, None)


# Case A13: a tokenizer is trained before the vocabulary is known, and not kept.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(data__tokenizer="bpe:270", model__vocab_size=260), "model.vocab_size = 260: the tok"),
        (dict(data__tokenizer="bpe:9000"), "BPE vocab_size = 9000: must be at most"),
        (dict(data__tokenizer="none.json"), "data.tokenizer = 'none.json': no such file"),
        (dict(data__sources=base.named(a=base.source("none.jsonl"))), "data.sources.a.path = 'non"),
    ],
)
def test_a_refused_run_leaves_no_trace_and_refuses_no_next_try(tmp_path, changes, message):
    config = tiny_config(**changes)
    if "data__sources" not in changes:
        corpus = write_corpus(tmp_path / "text")
        config.data.sources = base.named(a=base.source(corpus))
    mixture = base.named(a=1.0)
    config.stages = base.named(only=base.stage(tokens=64, mixture=mixture, seq_len=32))
    path = tmp_path / "new" / "run"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        loop.run(build(RunConfig, config), path, keep_compiled=True)
    assert sorted(tmp_path.rglob("*")) == before
    begin(tiny_run(write_corpus(tmp_path / "next"), data__tokenizer="bpe:280"), path, None)


def test_a_mesh_that_does_not_fit_leaves_no_trace(tmp_path, config):
    mesh = dataclasses.replace(config.mesh, fsdp=3, data=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="^mesh = .* its product must be the 8 devices"):
        loop.run(dataclasses.replace(config, mesh=mesh), tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_start_refuses_no_other_tokenizer(tmp_path, config):
    """Whatever a run that took no step has left is its own, and is replaced."""
    for tokenizer in ("bpe:270", "bpe:280", "bytes"):
        data = dataclasses.replace(config.data, tokenizer=tokenizer)
        begin(dataclasses.replace(config, data=data, seed=1), tmp_path / "run", None)
        kept = (tmp_path / "run" / "tokenizer.json").exists()
        assert kept == (tokenizer != "bytes")


def test_a_folder_in_use_is_left_as_it_is(tmp_path, config):
    path = tmp_path / "run"
    begin(config, path)
    with claim(path):
        before = files(tmp_path)
        with pytest.raises(UserError, match="in use by process"):
            loop.run(config, path)
        assert files(tmp_path) == before
        read_meta(path)  # Readers are not locked out.


@pytest.fixture(scope="module")
def weights():
    params = jax.tree.map(
        lambda leaf: np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype),
        lm.abstract_params(CONFIG.model),
    )
    router = lm.init_router(CONFIG.model)
    return params, dataclasses.replace(router, top_p=np.float32(0.75))


def test_the_folder_holds_the_weights_as_checkpoint_0(weights, tmp_path):
    write_start(tmp_path / "run", CONFIG, *weights, origin=ORIGIN)
    run = load_run(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, (run.params, run.router), weights)
    assert read_meta(tmp_path / "run") == run.meta == Plan.of(CONFIG).meta(0)
    assert (run.meta.step, run.meta.tokens, run.meta.stage) == (0, 0, "stable")
    about = record(tmp_path / "run")
    assert about["origin"] == ORIGIN and [s["checkpoint"] for s in about["sessions"]] == [0]
    assert not (tmp_path / "run" / "lock").exists()
    message = "has checkpoints already; give the weights another one"
    with pytest.raises(UserError, match=message):
        write_start(tmp_path / "run", CONFIG, *weights, origin=ORIGIN)
    write_start(tmp_path / "another", CONFIG, *weights, origin=ORIGIN)


def test_weights_of_a_run_keep_the_tokenizer_that_it_trained(weights, tmp_path):
    config = tiny_run(write_corpus(tmp_path / "text"), data__tokenizer="bpe:270")
    begin(config, tmp_path / "run")
    kept = (tmp_path / "run" / "tokenizer.json").read_bytes()
    other = tiny_run(str(write_texts(tmp_path / "other")), data__tokenizer="bpe:270")
    other = dataclasses.replace(other, model=CONFIG.model)
    for name, source in (("up", tmp_path / "run"), ("apart", None)):
        path = tmp_path / name
        write_start(path, other, *weights, origin=ORIGIN, tokenizer_of=source)
        assert ((path / "tokenizer.json").read_bytes() == kept) == bool(source)
        begin(other, path, None)


# Case A6
def test_training_keeps_the_origin_of_the_weights(weights, tmp_path, config):
    path = tmp_path / "run"
    model = CONFIG.model
    write_start(path, dataclasses.replace(config, model=model), *weights, origin=ORIGIN)
    other = dataclasses.replace(config, model=model, seed=5)
    start = begin(other, path, None)
    assert record(path)["origin"] == ORIGIN and record(path)["data"] == start.data
    assert [session["first_step"] for session in record(path)["sessions"]] == [1, 1]
    halve(tmp_path / "text")
    begin(other, path, 3)  # Nothing was trained on the text before.
    refused(dataclasses.replace(other, seed=0), path, "^seed = 0: this workdir's run has 5")
    edit(tmp_path / "text")
    refused(other, path, "^data.sources.a: its text has changed")
    assert record(path)["origin"] == ORIGIN


# Case A13
def test_refused_weights_leave_no_trace_and_refuse_no_next_try(weights, tmp_path):
    model = dataclasses.replace(CONFIG.model, vocab_size=256)
    config = dataclasses.replace(CONFIG, model=model)
    with pytest.raises(UserError, match="model.vocab_size = 256: the tokenizer has 258 ids"):
        write_start(tmp_path / "new" / "run", config, *weights, origin=ORIGIN)
    assert not list(tmp_path.iterdir())
    corpus = write_corpus(tmp_path / "text")
    trained = resolve(tiny_run(corpus, data__tokenizer="bpe:270"))
    trained.keep(tmp_path)
    data = dataclasses.replace(CONFIG.data, tokenizer=str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="the tokenizer has 270 ids"):
        small = dataclasses.replace(config, data=data)
        write_start(tmp_path / "new" / "run", small, *weights, origin=ORIGIN)
    assert not (tmp_path / "new").exists()
    write_start(tmp_path / "new" / "run", CONFIG, *weights, origin=ORIGIN)


def test_weights_do_not_replace_another_model_or_run(weights, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="config.json: is not the config of a run; use another"):
        write_start(tmp_path, CONFIG, *weights, origin=ORIGIN)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(to_dict(CONFIG)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="has the steps of a run already; give the weights another"):
        write_start(tmp_path, CONFIG, *weights, origin=ORIGIN)
    with claim(tmp_path), pytest.raises(UserError, match="in use by process"):
        write_start(tmp_path, CONFIG, *weights, origin=ORIGIN)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="workdir = .*cannot be written"):
        write_start(tmp_path / "file", CONFIG, *weights, origin=ORIGIN)


def test_a_start_that_fails_in_the_middle_can_be_tried_again(
    weights, tmp_path, config, monkeypatch
):
    def full(*_):
        raise UserError("cannot save a checkpoint: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lightning_jax.train.start.Checkpointer.save", full)
        for name in ("run", "other"):
            with pytest.raises(UserError, match="No space left"):
                write_start(tmp_path / name, CONFIG, *weights, origin=ORIGIN)
    begin(config, tmp_path / "other")  # Weights that were not saved are not its origin.
    assert "origin" not in record(tmp_path / "other")
    write_start(tmp_path / "run", CONFIG, *weights, origin={"path": "another"})
    assert record(tmp_path / "run")["origin"] == {"path": "another"}
    assert load_run(tmp_path / "run").meta.step == 0
