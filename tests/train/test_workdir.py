"""The folder of a run: what it records, and which other runs it refuses to resume as."""

import dataclasses
import json
import sys

import jax
import pytest

from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build, to_dict
from lightning_jax.train import workdir as folder
from lightning_jax.train.plan import Plan
from tests.tiny import tiny_run

CONFIG = tiny_run("corpus.jsonl", model__vocab_size=272)
STEPS = [segment.end_step for segment in Plan.of(CONFIG).segments]


def changed(path, value):
    """The config with one dotted field set; None removes an entry of a mapping."""
    values = to_dict(CONFIG)
    *parents, last = path.split(".")
    target = values
    for name in parents:
        target = target[name]
    target[last] = value
    return build(RunConfig, values)


@pytest.fixture
def path(tmp_path):
    folder.record(tmp_path, CONFIG, {"data": {"a": {"fingerprint": "0"}}})
    return tmp_path


def test_prepare_makes_the_folder_and_leaves_nothing_in_it(tmp_path):
    made = folder.prepare(tmp_path / "some" / "run")
    assert made.is_dir() and made.is_absolute() and not list(made.iterdir())
    assert folder.prepare(made) == made
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"workdir = '.*file': cannot be written \(File exists\)"):
        folder.prepare(tmp_path / "file")


def test_record_says_what_was_asked_for_and_with_what(path):
    recorded = json.loads((path / "config.json").read_text())
    assert build(RunConfig, recorded) == CONFIG
    about = json.loads((path / "run.json").read_text())
    assert about["command"] == sys.argv and about["versions"]["jax"] == jax.__version__
    assert about["data"] == {"a": {"fingerprint": "0"}}
    assert about["git_commit"] is None or len(about["git_commit"]) >= 40


def test_no_checkpoint_is_none(tmp_path):
    assert folder.newest_checkpoint(tmp_path) is None


def test_a_folder_without_a_run_takes_any(tmp_path):
    folder.check_resumable(tmp_path, CONFIG, None)


# The steps of the checkpoint to resume from: none before any checkpoint, one in the first
# stage, at its end, in the second stage, at the end of the run.
CASES = (None, 1, STEPS[0], STEPS[0] + 1, STEPS[1])
ALWAYS, NEVER = (True,) * 5, (False,) * 5
SECOND = (False, False, False, True, True)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("seed", 7, ALWAYS),
        ("model.unit", "G", ALWAYS),
        ("model.vocab_size", 288, ALWAYS),
        ("model.moe.z_weight", 0.5, ALWAYS),
        ("optimizer.clip_norm", 2.0, ALWAYS),
        ("data.packing", "first_fit", ALWAYS),
        ("data.sources.a.path", "other.jsonl", ALWAYS),
        ("stages.stable.learning_rate", 0.5, ALWAYS),
        ("stages.stable.mixture.a", 0.5, ALWAYS),
        ("stages.decay.learning_rate", 0.5, SECOND),
        ("stages.decay.batch_size", 8, SECOND),
        ("log_every", 50, NEVER),
        ("checkpoint_every", 50, NEVER),
        ("eval_tokens", 50, NEVER),
        ("sample_prompt", "class ", NEVER),
        ("mesh.fsdp", 2, NEVER),
    ],
)
def test_what_a_resumed_run_may_change(path, field, value, refused):
    other = changed(field, value)
    for steps, refuse in zip(CASES, refused, strict=True):
        saved = None if steps is None else Plan.of(CONFIG).meta(steps)
        if not refuse:
            folder.check_resumable(path, other, saved)
            continue
        with pytest.raises(UserError) as error:
            folder.check_resumable(path, other, saved)
        assert str(error.value).startswith(f"{field} = {value!r}: this workdir's run has ")
        assert "\n" not in str(error.value)


def test_stages_that_have_not_begun_come_and_go(path):
    stable, decay = CONFIG.stages
    end = Plan.of(CONFIG).meta(STEPS[0])
    more = dataclasses.replace(decay, name="more")
    for stages in ((stable,), (stable, more), (stable, more, decay)):
        folder.check_resumable(path, dataclasses.replace(CONFIG, stages=stages), end)
    finished = Plan.of(CONFIG).meta(STEPS[1])
    folder.check_resumable(
        path, dataclasses.replace(CONFIG, stages=(stable, decay, more)), finished
    )
    for stages in ((stable,), (stable, more), (decay, stable), (stable, more, decay)):
        with pytest.raises(UserError, match=r"stages = \[.*\]: .* has \['stable', 'decay'\]"):
            folder.check_resumable(path, dataclasses.replace(CONFIG, stages=stages), finished)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("model.unit", "G", True),
        ("data.tokenizer", "bpe:300", True),
        ("seed", 7, False),
        ("optimizer.clip_norm", 2.0, False),
        ("data.packing", "first_fit", False),
        ("stages.stable.learning_rate", 0.5, False),
    ],
)
def test_weights_from_elsewhere_fix_model_and_tokenizer_alone(path, field, value, refused):
    saved = Plan.of(CONFIG).meta(0)
    if not refused:
        folder.check_resumable(path, changed(field, value), saved)
        return
    with pytest.raises(UserError, match=f"^{field} = "):
        folder.check_resumable(path, changed(field, value), saved)
