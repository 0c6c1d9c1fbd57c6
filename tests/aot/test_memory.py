"""Bytes of a program from the compiler's own statements."""

from types import SimpleNamespace

from lightning_jax.aot import hlo, memory
from tests.aot.samples import ASSIGNMENT, PROGRAM


def test_a_compiled_program_counts_what_it_reuses_once():
    stats = SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=90,
        alias_size_in_bytes=80,
        temp_size_in_bytes=40,
        generated_code_size_in_bytes=7,
    )
    found = memory.of_compiled(stats)
    assert found["peak"] == 100 + 90 - 80 + 40 + 7
    assert found["program"] == 7 and found["aliased"] == 80


def test_a_program_that_does_not_fit_from_its_dump():
    found = memory.of_assignment(ASSIGNMENT)
    assert found["arguments"] == 8192 + 393216
    assert found["outputs"] == 4608
    assert found["temporaries"] == 262144
    assert found["peak"] == 8192 + 393216 + 4608 + 262144
    assert found["program"] is None


def test_the_largest_buffers_of_the_main_memory():
    found = memory.largest(ASSIGNMENT, hlo.parse(PROGRAM))
    first, second, third = found[:3]
    assert first == {
        "kind": "argument",
        "arrays": "bf16[3,128,512]",
        "bytes": 393216,
        "count": 1,
        "source": "state.params['stack']",
    }
    # Of two values in one place only the first is named; ops without a source have their name, and
    # fusions the source of what is in them.
    assert (second["arrays"], second["source"]) == ("bf16[128,512]", "fusion.1")
    assert (third["arrays"], third["source"]) == ("bf16[32,512]", "jit(step)/while/body/product")
    assert all("65536" not in str(row["bytes"]) for row in found)
    assert [row["kind"] for row in found].count("output") == 2
