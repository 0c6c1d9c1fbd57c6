"""Bytes of a program from the compiler's own statements."""

from lightning_jax.aot import hlo, memory
from tests.aot.samples import ASSIGNMENT, PROGRAM


def test_bytes_of_an_assignment():
    found = memory.held(ASSIGNMENT, 1000)
    assert found == {
        "arguments": 8192 + 393216,
        "outputs": 4608 + 8192,
        "aliased": 8192,
        "temporaries": 262144,
        "program": 1000,
        "peak": 8192 + 393216 + 4608 + 262144 + 1000,
    }
    # No program was made: it did not fit.
    without = memory.held(ASSIGNMENT, None)
    assert without["program"] is None and without["peak"] == found["peak"] - 1000


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
