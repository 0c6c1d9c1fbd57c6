"""What is done with a state beside steps, with recorders in place of files and of the model."""

import dataclasses
import signal
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import to_dict
from lightning_jax.train import skipped
from lightning_jax.train.interruption import Interrupted, Stopped, Watch
from lightning_jax.train.plan import Plan
from lightning_jax.train.progress import Throughput
from lightning_jax.train.session import Session
from lightning_jax.train.signals import StopRequest
from lightning_jax.train.step import TrainState
from tests.tiny import tiny_run

STATE = TrainState(
    step=jnp.int32(9),
    bad_steps=jnp.int32(1),
    params={"w": jnp.asarray([1.0, -3.0])},
    ema={},
    optimizer={"mu": jnp.zeros(2)},
    router={"top_p": jnp.float32(0.5)},
    controller={},
)
ROUTER = {"histogram": jnp.ones((1, 2, 5)), "mean_experts": jnp.ones((1, 2))}
READ = {"0": {"a": (100, 1.5)}, "1": {"a": (80, 1.0)}}
METRICS = {
    "loss": jnp.float32(2.0),
    "bad_steps": jnp.int32(0),
    "router": ROUTER,
    "data": READ,
}


class Recorder:
    """Takes any method call and keeps `(name, arguments)`."""

    def __init__(self, **results):
        self.calls, self._results = [], results

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, *args, *kwargs.items()))
            return self._results.get(name)

        return call

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


def session_of(
    start=0, fresh=True, sampler=None, program=None, restored=None, logged=(), **changes
):
    results = {"a": {"bits_per_byte": 1.5}}
    evaluations = []

    def evaluator(params, router, **how):
        evaluations.append((params, how))
        return results

    made = Session(
        plan=Plan.of(tiny_run("unread", model__vocab_size=64, **changes)),
        sources=SimpleNamespace(train={"a": range(5)}),
        tokenizer="tokenizer",
        mesh=None,
        program=program,
        evaluator=evaluator,
        checkpointer=Recorder(restore=restored),
        start=start,
        fresh=fresh,
        logged=logged,
        lost=0,
        writer=Recorder(),
        progress=Recorder(),
        throughput=Throughput(),
        watch=Watch(StopRequest()),
        trace=None,
        sampler=sampler,
    )
    return made, evaluations


def test_every_step_moves_the_bar_and_due_ones_are_written():
    session, _ = session_of(log_every=4, histogram_every=8)
    for step in range(1, 11):
        session.report(step, METRICS, STATE, None)
    assert [call[0] for call in session.progress.of("advance")] == list(range(1, 11))
    rows = [row for (row,) in session.writer.of("write")]
    # Every fourth, and the ends of both stages.
    assert [(row["step"], row["stage"]) for row in rows] == [
        (4, "stable"),
        (6, "stable"),
        (8, "decay"),
        (10, "decay"),
    ]
    assert [row["tokens"] for row in rows] == [512, 768, 1024, 1280]
    assert rows[0]["data"] == {"a": {"tokens": 180, "epochs": 0.5}}
    assert rows[0]["loss"] == 2.0 and rows[0]["mean_experts"] == [1.0, 1.0]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    names = [call[0] for call in session.writer.of("histogram")]
    assert names == ["router/histogram", "router/mean_experts", "params/absmax"]
    assert session.writer.of("histogram")[-1] == ("params/absmax", [3.0], 8)


def test_a_loss_that_is_not_finite_saves_the_state_before_it_and_stops():
    session, _ = session_of()
    bad = {**METRICS, "loss": jnp.float32(np.nan), "bad_steps": jnp.int32(1)}
    with pytest.raises(
        UserError, match="not finite at step 7 .stage 'decay', seed 0.*checkpoint 7"
    ):
        session.report(7, bad, STATE, "batches")
    [(step, items, batches, meta)] = session.checkpointer.of("save")
    assert (step, batches, meta["step"], meta["stage"]) == (7, "batches", 7, "decay")
    progress = items["progress"]
    assert int(progress["step"]) == 7 and int(progress["bad_steps"]) == 0
    assert session.checkpointer.calls[-1][0] == "wait"
    assert not session.writer.calls and not session.progress.calls


def test_skipping_goes_on_after_a_loss_that_is_not_finite():
    session, _ = session_of(optimizer__on_nan="skip")
    session.report(
        1, {**METRICS, "loss": jnp.float32(np.nan), "bad_steps": jnp.int32(1)}, STATE, None
    )
    [(row,)] = session.writer.of("write")
    assert row["loss"] is None and row["bad_steps"] == 1 and not session.checkpointer.calls


# Case D2
def test_many_skipped_steps_in_a_row_end_the_run_and_save_the_state(monkeypatch):
    monkeypatch.setattr(skipped, "MOST_IN_A_ROW", 3)
    session, _ = session_of(optimizer__on_nan="skip")
    nan = jnp.float32(np.nan)
    # One good step among five: never three in a row. The counter goes on from the checkpoint.
    for step, (loss, bad_steps) in enumerate([(nan, 8), (nan, 9), (2.0, 9), (2.0, 10), (nan, 11)]):
        metrics = {**METRICS, "loss": jnp.float32(loss), "bad_steps": jnp.int32(bad_steps)}
        session.report(step + 1, metrics, STATE, "batches")
    assert not session.checkpointer.calls
    with pytest.raises(UserError, match="3 steps in a row up to step 6 .*checkpoint 9, but"):
        session.report(6, {**METRICS, "loss": nan, "bad_steps": jnp.int32(12)}, STATE, "batches")
    [(step, items, batches, meta)] = session.checkpointer.of("save")
    # The device was ahead: its state is the one that belongs to the data's position.
    assert (step, batches, meta["step"]) == (9, "batches", 9)
    assert int(items["progress"]["step"]) == 9 and int(items["progress"]["bad_steps"]) == 1
    assert session.checkpointer.calls[-1][0] == "wait"


# Case D1
def test_a_sample_of_a_model_that_is_not_finite_ends_no_training():
    def sampler(*_):
        raise UserError("generation: logits are not finite")

    session, _ = session_of(sampler=sampler, sample_tokens=8)
    session.evaluate(session.plan.segments[0], STATE, max_tokens=0)
    assert session.writer.of("sample")[0][0] == "no sample: generation: logits are not finite"


def test_evaluation_takes_the_average_and_the_segment_and_writes_a_sample():
    asked = []

    def sampler(config, params, router, tokenizer, rope_base_global):
        asked.append((params, tokenizer, rope_base_global))
        return "a text"

    session, evaluations = session_of(sampler=sampler, sample_tokens=8)
    decay = session.plan.segments[1]
    row = {"bits_per_byte": 1.5, "skipped_steps": 1}
    assert session.evaluate(decay, STATE, max_tokens=64) == {"a": row}
    [(params, how)] = evaluations
    assert params is STATE.params and how.pop("before_document") and how.pop("before_batch")
    shape = dict(seq_len=32, batch_size=2, rope_base_global=50_000.0)
    assert how == dict(**shape, weights="params", max_tokens=64, recall=False)
    assert asked == [(STATE.params, "tokenizer", 50_000.0)]
    assert session.writer.of("sample") == [("a text", 9)]
    skipped = "1 of 9 steps skipped: their loss or gradient was not finite"
    assert session.progress.of("note") == [("held out: a 1.500 bits/byte",), (skipped,)]

    averaged = dataclasses.replace(STATE, ema={"w": jnp.zeros(2)})
    session.evaluate(decay, averaged, max_tokens=64, recall=True)
    assert evaluations[1][0] is averaged.ema and asked[1][0] is averaged.ema
    assert evaluations[1][1]["weights"] == "ema" and evaluations[1][1]["recall"]


def test_no_sample_without_its_length():
    session, _ = session_of(sampler=lambda *_: pytest.fail("sampled"), sample_tokens=0)
    session.evaluate(session.plan.segments[0], STATE, max_tokens=0)
    assert not session.writer.calls


def test_saves_say_where_in_the_run_they_are():
    session, _ = session_of()
    session.save(6, STATE, "batches")
    [(step, items, batches, meta)] = session.checkpointer.of("save")
    assert (step, batches) == (6, "batches") and meta == to_dict(session.plan.meta(6))
    assert set(items) == {"params", "router", "optimizer", "progress"}


def test_a_first_state_is_fresh_or_begins_with_given_weights():
    program = SimpleNamespace(init=lambda: STATE, abstract_state=STATE)
    session, _ = session_of(program=program)
    assert session.first_state() is STATE and not session.checkpointer.calls

    given = {"params": {"w": jnp.ones(2)}, "router": {"top_p": jnp.float32(0.25)}}
    averaging = dataclasses.replace(STATE, ema={"w": jnp.zeros(2)})
    program = SimpleNamespace(init=lambda: averaging, abstract_state=averaging)
    session, _ = session_of(fresh=False, program=program, restored=given)
    state = session.first_state()
    [(step, wanted, verified)] = session.checkpointer.of("restore")
    assert verified == ("verified", True) and step == 0 and set(wanted) == {"params", "router"}
    assert state.params is given["params"] and state.router is given["router"]
    np.testing.assert_array_equal(state.ema["w"], given["params"]["w"])
    assert state.optimizer is STATE.optimizer


def test_a_resumed_state_is_that_of_its_checkpoint():
    items = {"params": 1, "router": 2, "optimizer": 3, "progress": dict(step=6, bad_steps=0)}
    items["progress"]["controller"] = 4
    program = SimpleNamespace(abstract_state=STATE)
    session, _ = session_of(start=6, fresh=False, program=program, restored=items)
    state = session.restore("batches")
    [(step, _, batches, verified)] = session.checkpointer.of("restore")
    assert (step, batches, verified) == (6, "batches", ("verified", True))
    assert (state.params, state.router, state.step, state.controller) == (1, 2, 6, 4)


# Case D2
@pytest.mark.parametrize(("on_nan", "bad_steps"), [("skip", 5), ("stop", 0)])
def test_skipped_steps_are_counted_across_sessions_and_stop_no_later_one(on_nan, bad_steps):
    progress = dict(step=6, bad_steps=5, controller=4)
    items = {"params": 1, "router": 2, "optimizer": 3, "progress": progress}
    program = SimpleNamespace(abstract_state=STATE)
    session, _ = session_of(6, False, program=program, restored=items, optimizer__on_nan=on_nan)
    assert session.restore("batches").bad_steps == bad_steps


@pytest.mark.parametrize(("step", "saved"), [(3, "saved step 3"), (0, "before the first step")])
def test_leaving_waits_for_the_save_and_says_by_which_signal(step, saved):
    session, _ = session_of()
    with pytest.raises(Stopped) as stopped:
        session.leave(step, Interrupted(Stopped(signal.SIGHUP)))
    assert stopped.value.code == 128 + signal.SIGHUP
    assert session.checkpointer.calls == [("wait",)]
    assert session.progress.of("note") == [(f"SIGHUP: {saved}; the same command resumes",)]


def test_leaving_for_an_error_says_which_checkpoint_has_the_state_before_it():
    session, _ = session_of()
    with pytest.raises(
        UserError, match="^a.txt: Input/output error; .* before it is checkpoint 3$"
    ):
        session.leave(3, Interrupted(UserError("a.txt: Input/output error")))
    with pytest.raises(UserError, match="^no batch; nothing was trained yet$"):
        session.leave(0, Interrupted(UserError("no batch")))
    fault = ZeroDivisionError("a fault of ours keeps its traceback")
    with pytest.raises(ZeroDivisionError) as raised:
        session.leave(3, Interrupted(fault))
    assert raised.value is fault and fault.__notes__ == ["the state before it is checkpoint 3"]


@pytest.mark.parametrize(
    ("start", "logged", "owes"),
    [
        (5, [{"step": 5, "loss": 2.0}], True),
        (5, [], True),
        (5, [{"step": 5, "loss": 2.0}, {"step": 5, "eval": {}}], False),
        (4, [{"step": 4, "loss": 2.0}], False),
        (0, [], False),
    ],
)
def test_an_evaluation_that_was_interrupted_is_owed(start, logged, owes):
    session, _ = session_of(start=start, logged=logged, eval_every=5)
    assert session.owes_evaluation() is owes
    session, _ = session_of(start=start, logged=logged, eval_every=0)
    assert not session.owes_evaluation()
