import time
import types

import jax.numpy as jnp
import pytest

from benchmarks import measure


def test_variants_take_turns_and_each_starts_a_round():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = measure.interleave(variants, rounds=3, warmup=1, min_seconds=0.0)
    # The warm-up comes first, then the rounds.
    assert calls[:3] == list("abc")
    assert calls[3:] == list("abcbcacab")
    assert {name: len(times) for name, times in found.seconds.items()} == dict.fromkeys("abc", 3)


def test_short_calls_are_repeated():
    calls = []
    measure.interleave({"a": lambda: calls.append(1)}, rounds=2, min_seconds=0.05)
    assert len(calls) > 10


def test_ratios_are_of_the_same_round():
    found = measure.Rounds({"a": [1.0, 20.0, 3.0], "b": [0.5, 10.0, 1.0]})
    assert found.ratio("a", "b") == 2.0
    assert found.median_ms("a") == 3000.0
    assert found.gflops("b", 2e9) == pytest.approx(2.0)


def test_processor_time_is_kept_apart_from_elapsed_time():
    found = measure.interleave({"sleep": lambda: time.sleep(0.02)}, rounds=2)
    assert found.median_ms("sleep") >= 20 > found.cpu_ms("sleep") >= 0
    found = measure.Rounds({}, {"a": [2.0, 4.0], "b": [1.0, 1.0]})
    assert found.cpu_ratio("a", "b") == 3.0


def test_fraction_of_the_matmul_peak():
    found = measure.Rounds({measure.PROBE: [1.0, 1.0], "a": [2.0, 2.0]}, probe_flops=8.0)
    assert found.of_peak("a", 4.0) == 0.25
    with pytest.raises(ValueError, match="no matrix product"):
        measure.Rounds({"a": [1.0]}).of_peak("a", 4.0)
    found = measure.interleave({"a": lambda: None}, rounds=1, min_seconds=0, probe=jnp.bfloat16)
    assert found.probe_flops == 2 * 1024**3 and found.of_peak("a", 1.0) > 0


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"warmup": 0}, {"variants": {}}])
def test_nothing_to_measure(bad):
    with pytest.raises(ValueError, match="at least 1"):
        measure.interleave(**{"variants": {"a": lambda: None}, **bad})


def test_rows_are_chosen_by_part_of_their_name():
    assert measure.Options().wants("anything")
    options = measure.Options(only=("float32", "decode"))
    assert options.wants("forward_float32") and not options.wants("forward_bfloat16")


def test_a_peer_that_is_absent_is_none_and_a_broken_one_is_not_hidden(tmp_path, monkeypatch):
    assert measure.peer("no_such_package.inner") is None
    assert isinstance(measure.peer("json"), types.ModuleType)
    (tmp_path / "broken_peer.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        measure.peer("broken_peer")
