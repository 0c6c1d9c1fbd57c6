"""The report on a program: everything in one place, as JSON and as tables."""

import json

import numpy as np
import pytest

from lightning_jax.aot import memory, report
from lightning_jax.aot.chips import CHIPS
from lightning_jax.aot.report import Facts
from lightning_jax.aot.roofline import Network
from tests.aot.samples import ASSIGNMENT, MESH, PROGRAM

PLACES = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])


@pytest.fixture(scope="module")
def entry():
    return described(PROGRAM)


def described(text):
    facts = Facts(
        mesh=MESH,
        slices=1,
        network=Network(CHIPS["v5e"], (2, 2), PLACES),
        model_flops=1e6,
        device_flops=2e6,
        least_bytes=1e6,
        memory=memory.held(ASSIGNMENT, 1000),
    )
    found = report.describe(text, ASSIGNMENT, facts)
    shape = {"rows": 4}
    return {"shape": shape, "compile": {"wall_s": 1.0}, **found}


def test_sums_of_the_schedule(entry):
    assert entry["fits"] and entry["memory"]["hbm"] == CHIPS["v5e"].hbm
    product = 3 * 2 * 32 * 128 * 512
    assert entry["flops"] == {
        "model": 1e6,
        "device": 2e6,
        "products": product,
        "kernel_calls": 1,
    }
    assert entry["bytes"]["scheduled"] > 3 * 2 * 128 * 512 * 2
    assert entry["open_loops"] == ["jit(step)/rounds"]
    # The larger of what the model needs and what the products say.
    assert entry["roofline"]["compute_s"] == product / CHIPS["v5e"].peak


def test_only_collectives_show_a_turn_of_an_open_loop(entry):
    # A first round before the loop: what the second one moves is no part of the step.
    text = PROGRAM.replace("%sent.1 = f32[8,128]", "%sent.1 = f32[8,131072]")
    larger = described(text.replace("all-to-all.1 = f32[8,128]", "all-to-all.1 = f32[8,131072]"))
    first = larger["collectives"][0]
    assert first["in_open_loop"] and first["bytes"] == 8 * 131_072 * 4 / 2
    assert larger["bytes"] == entry["bytes"] and larger["roofline"] == entry["roofline"]


def test_collectives_by_kind_and_axes(entry):
    rows = {row["kind"]: row for row in entry["collectives"]}
    assert rows["all-gather"]["runs"] == 3 == rows["all-gather"]["asynchronous_runs"]
    assert rows["all-gather"]["bytes"] == 3 * 64 * 256 * 2
    assert 0 < rows["all-gather"]["hidden_seconds"] <= rows["all-gather"]["seconds"]
    assert rows["reduce-scatter"]["axes"] == ["data"]
    assert rows["all-to-all"]["in_open_loop"]
    closed = [row["seconds"] for row in rows.values() if not row["in_open_loop"]]
    assert entry["roofline"]["ici_s"] == pytest.approx(sum(closed))


def test_tables_and_json(entry):
    found = {"programs": {"train": entry}}
    for rows in (report.memory_rows, report.time_rows, report.collective_rows, report.buffer_rows):
        table = rows(found)
        assert len(table) > 1 and {len(row) for row in table} == {len(table[0])}
    assert json.loads(json.dumps(found)) == found
    entry["memory"]["program"] = None
    assert "-" in report.memory_rows(found)[1]
    assert any("open loop" in row[1] for row in report.collective_rows(found))


def test_a_program_without_code_does_not_fit():
    facts = Facts(
        mesh=MESH,
        slices=1,
        network=Network(CHIPS["v5e"], (2, 2), PLACES),
        model_flops=1.0,
        device_flops=1.0,
        least_bytes=1.0,
        memory=memory.held(ASSIGNMENT, None),
    )
    assert not report.describe(PROGRAM, ASSIGNMENT, facts)["fits"]
