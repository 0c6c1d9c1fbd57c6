"""Each collective counts once, as what it is, over the axes that it runs over."""

import numpy as np
import pytest

from lightning_jax.aot import collectives, groups, hlo
from tests.aot.samples import MESH, PROGRAM


@pytest.fixture(scope="module")
def found():
    return {c.kind: c for c in collectives.find(hlo.parse(PROGRAM), MESH)}


def test_every_collective_once(found):
    everything = collectives.find(hlo.parse(PROGRAM), MESH)
    assert (
        sorted(c.kind for c in everything)
        == sorted(found)
        == [
            "all-gather",
            "all-reduce",
            "all-to-all",
            "collective-permute",
            "reduce-scatter",
        ]
    )


@pytest.mark.parametrize(
    ("kind", "axes", "times", "is_async", "moved"),
    [
        ("all-gather", ("fsdp",), 3, True, 64 * 256 * 2),
        ("collective-permute", ("data", "fsdp"), 3, True, 32 * 128 * 2 / 2),
        ("reduce-scatter", ("data",), 3, False, 64 * 256 * 4 / 2),
        ("all-to-all", ("fsdp",), 1, False, 8 * 128 * 4 / 2),
        ("all-reduce", ("data", "fsdp"), 1, False, (8 * 128 + 1) * 4 * 2 * 3 / 4),
    ],
)
def test_kinds_axes_and_bytes(found, kind, axes, times, is_async, moved):
    collective = found[kind]
    assert (collective.axes, collective.times, collective.is_async) == (axes, times, is_async)
    assert collective.moved_bytes == moved
    assert collective.is_open == (kind == "all-to-all")


def test_what_runs_between_start_and_end(found):
    names = [op.name for _, op in found["all-gather"].between]
    assert "fusion.2" in names and "async-collective-done" not in names
    assert found["collective-permute"].between == ()
    assert found["all-gather"].source == "jit(step)/while/body/gather"


def test_a_transfer_that_ends_in_the_next_turn_runs_to_the_end_of_this_one():
    text = PROGRAM.replace(', custom_call_target="AsyncCollectiveDone"', "")
    gathers = [c for c in collectives.find(hlo.parse(text), MESH) if c.kind == "all-gather"]
    between = [op.name for _, op in gathers[0].between]
    assert between[-1] == "tuple.2" and "fusion.4" in between


MEETING = '_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="ALL_REDUCE"'
SLICES = f"""\
ENTRY %main (x: f32[64,128]) -> f32[64,128] {{
  %x = f32[64,128]{{1,0:T(8,128)}} parameter(0)
  %token = token[] after-all()
  %send = (f32[64,128]{{1,0:T(8,128)}}, u32[], token[]) send(%x, %token), channel_id=2, is_host_transfer=true, frontend_attributes={{{MEETING}}}
  %recv = (f32[64,128]{{1,0:T(8,128)}}, u32[], token[]) recv(%token), channel_id=1, is_host_transfer=true, frontend_attributes={{{MEETING}}}
  %work = f32[64,128]{{1,0:T(8,128)}} negate(%x)
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (f32[64,128]{{1,0:T(8,128)}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %out = f32[64,128]{{1,0:T(8,128)}} get-tuple-element(%recv-done), index=0
}}
"""  # noqa: E501


def test_slices_meet_in_their_hosts():
    (found,) = collectives.find(hlo.parse(SLICES), MESH, slices=2)
    assert (found.kind, found.axes, found.across_slices) == ("all-reduce", ("replica",), True)
    assert found.moved_bytes == 64 * 128 * 4
    assert [op.name for _, op in found.between] == ["recv", "work", "send-done"]


def op(attributes):
    return hlo.Op("x", "all-reduce", (), (), attributes, False)


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (", replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups={}, to_apply=%add", [[0, 1, 2, 3]]),
        (", replica_groups=[2,2]<=[4], to_apply=%add", [[0, 1], [2, 3]]),
        (", replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1", [[0, 1, 2, 3]]),
        (", replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        (", replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        (", replica_groups=mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        (", source_target_pairs={{0,1},{1,0}}, x=1", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_all_their_forms(attributes, expected):
    np.testing.assert_array_equal(groups.groups_of(op(attributes), 4), expected)


def test_no_groups_are_an_error():
    with pytest.raises(ValueError, match="all-reduce x has no groups"):
        groups.groups_of(op(", to_apply=%add"), 4)


@pytest.mark.parametrize(
    ("members", "axes"),
    [
        ([[0, 1]], ("tensor",)),
        ([[0, 2]], ("expert",)),
        ([[0, 4]], ("data",)),
        ([[0, 3]], ("expert", "tensor")),
        ([[0, 0]], ()),
        ([[0, 0], [1, 5]], ("data",)),
    ],
)
def test_axes_of_a_mesh(members, axes):
    mesh = {"data": 2, "expert": 2, "tensor": 2}
    assert groups.axes_of(np.array(members), mesh) == axes
