"""The search for a train step that fits, with a compiler that costs nothing."""

import dataclasses

import pytest

from lightning_jax.aot import compiling, search, topologies
from lightning_jax.aot.programs import Shape
from lightning_jax.aot.search import Space
from lightning_jax.aot.topologies import Slice
from lightning_jax.config import RunConfig
from lightning_jax.config.errors import UserError
from lightning_jax.config.fields import build
from tests.tiny import tiny_config

V5E = Slice.parse("v5e:2x2")
TWO = Space(("none", "full"))


@pytest.fixture(autouse=True)
def _versions(monkeypatch):
    monkeypatch.setattr(topologies, "versions", lambda: {"jax": "1", "libtpu": "2"})


def config(**changes):
    return build(RunConfig, tiny_config(model__vocab_size=64, **changes))


class Compiler:
    """Memory falls with micro-batches and with remat, time rises with both."""

    def __init__(self, room):
        self.room, self.tasks = room, []

    def __call__(self, task):
        self.tasks.append(task)
        stage, remat = task.config.stages[0], task.config.model.remat
        held = 100 / stage.accumulate / (4 if remat == "full" else 1)
        seconds = 1 + 0.1 * stage.accumulate + (0.33 if remat == "full" else 0)
        roofline = dict(step_s=seconds, scheduled_s=seconds, mfu=0.4, scheduled_mfu=0.3)
        return {"fits": held <= self.room, "memory": {"peak": held}, "roofline": roofline}


def names(found):
    return [(row["remat"], row["accumulate"], row.get("fits")) for row in found["candidates"]]


def run(compiler, space=TWO, cache=None, **changes):
    return search.search(config(**changes), V5E, Shape("stable"), space, run=compiler, cache=cache)


def test_the_fastest_that_fits_and_no_more_micro_batches_than_that():
    compiler = Compiler(room=30)
    found = run(compiler)
    # Batch 8. With remat one micro-batch fits; without, four.
    assert names(found) == [
        ("none", 1, False),
        ("full", 1, True),
        ("none", 2, False),
        ("none", 4, True),
    ]
    assert found["programs"]["train"]["roofline"]["scheduled_s"] == pytest.approx(1.4)
    assert not found["left_out"] and found["chips"] == 4


def test_nothing_fits():
    found = run(Compiler(room=0))
    assert found["programs"]["train"] is None and len(found["candidates"]) == 8


def test_the_number_of_compilations_is_bounded():
    compiler = Compiler(room=0)
    found = run(compiler, Space(("none", "full"), (), 3))
    assert len(compiler.tasks) == 3 == len(found["candidates"])
    assert len(found["left_out"]) == 5 and found["left_out"][0] == {
        "remat": "full",
        "accumulate": 2,
    }


def test_a_second_search_asks_the_cache(tmp_path):
    first, again = Compiler(room=30), Compiler(room=30)
    one, two = run(first, cache=tmp_path), run(again, cache=tmp_path)
    assert len(first.tasks) == 4 and not again.tasks
    assert one == two
    # Another run is another question, and what a cache answers is not counted.
    other = Compiler(room=30)
    run(other, Space(("none", "full"), (), 4), cache=tmp_path, model__moe__top_k=3)
    assert len(other.tasks) == 4
    third = Compiler(room=30)
    found = run(third, Space(("none", "full"), (4, 1, 2), 1), cache=tmp_path)
    assert not third.tasks and len(found["candidates"]) == 4


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    assert len(run(Compiler(room=30), cache=tmp_path / "file")["candidates"]) == 4


def test_refused_candidates_are_rows():
    def refuse(task):
        if task.config.model.remat == "none":
            raise UserError("a micro-batch does not divide")
        return Compiler(room=100)(task)

    found = run(refuse)
    assert found["candidates"][0]["refused"] == "a micro-batch does not divide"
    table = search.rows(found)
    assert {len(row) for row in table} == {7} and table[1][-1] == "a micro-batch does not divide"


def test_the_digest_depends_on_all_that_an_answer_does(monkeypatch):
    task = compiling.Task(config(), V5E, "train", Shape())
    changed = [
        dataclasses.replace(task, config=config(seed=1)),
        dataclasses.replace(task, topology=Slice.parse("v6e:2x2")),
        dataclasses.replace(task, topology=Slice.parse("v5e:2x2", 2)),
        dataclasses.replace(task, program="decode"),
        dataclasses.replace(task, shape=Shape(rows=3)),
    ]
    digests = {search.digest(each) for each in (task, *changed)}
    assert len(digests) == 6 and search.digest(task) in digests
    monkeypatch.setattr(topologies, "versions", lambda: {"jax": "1", "libtpu": "3"})
    assert search.digest(task) not in digests


@pytest.mark.parametrize(
    ("space", "line"),
    [
        (Space(("ful",)), "remats = 'ful': must be one of none, full"),
        (Space((), (0,)), "accumulates = 0: must be at least 1"),
        (Space(most=0), "max_compiles = 0: must be at least 1"),
    ],
)
def test_spaces_that_cannot_be(space, line):
    with pytest.raises(UserError, match=line):
        space.check()
