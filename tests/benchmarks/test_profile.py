"""Profiles: how spans become time, how operations are named, and a real trace."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile
from benchmarks.measure import Options


def test_the_innermost_span_of_a_thread_counts():
    spans = [(0, 10, "outer"), (2, 5, "inner"), (3, 4, "innermost"), (5, 6, "next")]
    assert profile.elapsed_by_name([spans]) == {
        "outer": 6, "inner": 2, "innermost": 1, "next": 1,
    }  # fmt: skip


def test_threads_share_a_moment_and_gaps_are_waiting():
    threads = [[(0, 4, "a"), (8, 10, "a")], [(2, 6, "b")], []]
    assert profile.elapsed_by_name(threads) == {"a": 2 + 1 + 2, "b": 1 + 2, profile.WAITING: 2}


def test_spans_may_touch_and_be_empty():
    assert profile.elapsed_by_name([[(0, 1, "a"), (1, 2, "a"), (2, 2, "b")]]) == {"a": 2}
    assert profile.elapsed_by_name([]) == {}


@pytest.mark.parametrize(
    ("instruction", "path", "kind"),
    [
        ("dot.1", "jit(f)/jvp(experts)/while/body/dot_general", "experts: dot_general"),
        ("dot.1", "jit(f)/transpose(jvp(experts))/while/body/mul", "backward experts: mul"),
        ("dot.1", "jit(f)/jvp(LightningLM)/units/0_L/moe/moe._route/top_k", "moe._route: top_k"),
        ("dot.1", "jit(f)/transpose(jvp())/jit(_where)/select_n", "backward select_n"),
        ("dot.1", "jit(f)/head/MD,DV->MV/dot_general", "head: dot_general"),
        ("dot.1", "jit(f)/exp", "exp"),
        ("wrapped_copy.12", "", "wrapped_copy"),
    ],
)
def test_kinds_of_work(instruction, path, kind):
    assert profile.kind_of(instruction, path) == kind


def test_paths_of_a_program():
    program = """
%products (a: f32[2,2]) -> f32[2,2] {
  ROOT %dot.1 = f32[2,2] dot(%a, %a), lhs_contracting_dims={1}
}

ENTRY %main (a: f32[2,2]) -> f32[2,2] {
  %library.1 = f32[2,2] fusion(%a), kind=kCustom, calls=%products
  %copy.1 = f32[2,2] copy(%library.1)
  ROOT %fusion.3 = f32[2,2] fusion(%copy.1), calls=%other, metadata={op_name="jit(f)/exp" id=1}
}
"""
    assert profile.paths(program) == {"library.1": profile.UNNAMED, "fusion.3": "jit(f)/exp"}


def test_a_trace_of_a_program():
    def program(x):
        with jax.named_scope("rows"):
            return jax.lax.map(lambda row: jnp.sin(row @ x), x)

    x = jnp.ones((256, 256))
    compiled = jax.jit(program).lower(x).compile()
    options = Options(profile=True)
    found = profile.profiles(options, {"ours": (compiled, lambda: compiled(x))})["profile"]["ours"]
    assert any(kind.startswith("rows") for kind in found)
    assert not any(kind.startswith("while") for kind in found)
    assert profile.REST in found and all(time >= 0 for time in found.values())
    assert profile.profiles(Options(), {}) == {}
