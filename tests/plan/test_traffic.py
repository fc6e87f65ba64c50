"""Bytes that a compiled program moves, against hand arithmetic on programs small enough to read."""

import pytest

from dsv3_jax.plan import hlo, traffic

MESH = {"pipe": 1, "replica": 2, "node": 2, "gpu": 4, "tensor": 2}  # 32 devices, 8 per node


def program(*lines: str, computations: str = "") -> hlo.Program:
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"{computations}\nENTRY %main (x: f32[64]) -> f32[64] {{\n{body}\n}}\n")


def collectives(found: hlo.Program, *, trips: int = 0) -> list[traffic.Collective]:
    return traffic.collectives(found, MESH, devices_per_host=8, dynamic_trips=lambda _: trips)


X = "%x = f32[64]{0} parameter(0)"  # 256 bytes
ALL_GATHER = "%g = f32[512]{0} all-gather(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (ALL_GATHER, "all-gather", 2048 * 7 // 8),
        ("%g = (f32[64]{0}, f32[512]{0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}", "all-gather",
         2048 * 7 // 8),
        ("%g = f32[64]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add", "all-reduce", 2 * 256 // 2),
        ("%g = (f32[64]{0}, f32[8]{0}) all-reduce-start(%x, %y), replica_groups={{0,1}}, to_apply=%add", "all-reduce",
         2 * (256 + 32) // 2),
        ("%g = f32[16]{0} reduce-scatter(%x), replica_groups={{0,2,4,6}}, to_apply=%add", "reduce-scatter", 64 * 3),
        ("%g = (f32[64]{0}, f32[64]{0}) all-to-all(%x, %y), replica_groups={{0,8}}", "all-to-all", 512 // 2),
        ("%g = f32[64]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}", "collective-permute", 256),
    ],
)  # fmt: skip
def test_device_sends_what_the_collective_needs_at_least(line, kind, sent):
    (found,) = collectives(program(X, line))
    assert (found.kind, found.sent_bytes, found.num_runs) == (kind, sent, 1)


def test_second_half_of_a_collective_sends_nothing():
    start = "%s = (f32[64]{0}, f32[512]{0}) all-gather-start(%x), replica_groups={{0,1,2,3,4,5,6,7}}"
    (found,) = collectives(program(X, start, "%g = f32[512]{0} all-gather-done(%s)"))
    assert found.num_runs == 1


@pytest.mark.parametrize(
    ("groups", "axes", "hosts"),
    [
        ("replica_groups={{0,1},{2,3}}", ("tensor",), 1),
        ("replica_groups=[16,2]<=[32]", ("tensor",), 1),
        ("replica_groups=[8,4]<=[4,4,2]T(0,2,1)", ("gpu",), 1),
        ("replica_groups=[2,16]<=[32]", ("node", "gpu", "tensor"), 2),
        ("replica_groups=[16,2]<=[2,2,8]T(0,2,1)", ("node",), 2),
        ("replica_groups=mesh['replica'=2,'node'=2,'gpu'=4,'tensor'=2] {'gpu','tensor'}", ("gpu", "tensor"), 1),
        ("replica_groups=mesh['replica'=2,'node'=2,'gpu'=4,'tensor'=2] {'replica'}", ("replica",), 2),
        ("replica_groups={}", ("replica", "node", "gpu", "tensor"), 4),
    ],
)
def test_groups_name_the_axes_that_their_devices_differ_in(groups, axes, hosts):
    (found,) = collectives(program(X, f"%g = f32[64]{{0}} all-reduce(%x), {groups}, to_apply=%add"))
    assert (found.axes, found.group_hosts) == (axes, hosts)


def test_permutation_is_along_the_axis_of_its_first_pair():
    (found,) = collectives(program(X, "%g = f32[64]{0} collective-permute(%x), source_target_pairs={{0,2},{2,4}}"))
    assert found.axes == ("gpu",)


def test_part_of_an_axis_is_refused_rather_than_miscounted():
    line = "%g = f32[64]{0} all-reduce(%x), replica_groups=mesh['gpu'=32] {'gpu':(1)2}, to_apply=%add"
    with pytest.raises(ValueError, match="part of an axis"):
        collectives(program(X, line))


LOOP = """
%body (s: (s32[], f32[64])) -> (s32[], f32[64]) {
  %s = (s32[], f32[64]{0}) parameter(0)
  %y = f32[64]{0} get-tuple-element(%s), index=1
  %r = f32[64]{0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[64]{0}) tuple(%y, %r)
}
"""


@pytest.mark.parametrize(("attribute", "runs"), [('{"known_trip_count":{"n":"58"}}', 58), ("{}", 3)])
def test_loop_sends_in_every_round(attribute, runs):
    line = f"%w = (s32[], f32[64]{{0}}) while(%x), condition=%c, body=%body, backend_config={attribute}"
    (found,) = collectives(program(X, line, computations=LOOP), trips=3)
    assert (found.num_runs, found.sent_bytes) == (runs, runs * 256)


BRANCHES = """
%none (y: f32[64]) -> f32[64] {
  ROOT %y = f32[64]{0} parameter(0)
}

%both (z: f32[64]) -> f32[64] {
  %z = f32[64]{0} parameter(0)
  ROOT %r = f32[64]{0} all-reduce(%z), replica_groups={{0,1}}, to_apply=%add
}
"""


def test_of_a_conditional_the_costliest_branch_counts():
    line = "%w = f32[64]{0} conditional(%p, %x, %x), branch_computations={%none, %both}"
    (found,) = collectives(program(X, line, computations=BRANCHES))
    assert found.sent_bytes == 256


FUSIONS = """
%slices (a: f32[1024,64], i: s32[]) -> f32[1,64] {
  %a = f32[1024,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,64]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={1,64}
}

%updates (b: f32[1024,64], u: f32[1,64], j: s32[]) -> f32[1024,64] {
  %b = f32[1024,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  %nil = s32[] constant(0)
  ROOT %v = f32[1024,64]{1,0} dynamic-update-slice(%b, %u, %j, %nil)
}

%scatters (c: f32[1024,64], w: f32[1,64], k: s32[]) -> f32[1024,64] {
  %c = f32[1024,64]{1,0} parameter(0)
  %w = f32[1,64]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %index = s32[1]{0} bitcast(%k)
  ROOT %s = f32[1024,64]{1,0} scatter(%c, %index, %w), update_window_dims={1}, to_apply=%add
}
"""


@pytest.mark.parametrize(
    ("line", "touched"),
    [
        ("%y = f32[64]{0} add(%x, %x)", 256 + 256),
        ("%y = f32[64]{0} custom-call(%x, %x2)", 3 * 256),
        ("%y = f32[1,64]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slices", 256 + 256),
        ("%y = f32[1024,64]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%updates", 256 + 4 + 256),
        ("%y = f32[1024,64]{1,0} fusion(%stack, %row, %i), kind=kInput, calls=%scatters", 256 + 4 + 256),
        ("%y = f32[1024,64]{1,0} scatter(%stack, %i, %row), to_apply=%add", 256 + 4 + 256),
        ("%y = f32[64]{0} bitcast(%x)", 0),
        ("%y = (f32[64]{0}, f32[64]{0}) tuple(%x, %x2)", 0),
    ],
)
def test_kernel_reads_its_operands_and_slices_alone_and_writes_its_result(line, touched):
    given = [
        X,
        "%x2 = f32[64]{0} parameter(1)",
        "%stack = f32[1024,64]{1,0} parameter(2)",
        "%row = f32[1,64]{1,0} parameter(3)",
        "%i = s32[] parameter(4)",
    ]
    slack = 4 if "calls=" in line else 0  # the index of the slice
    found = traffic.memory_bytes(program(*given, line, computations=FUSIONS), lambda _: 0)
    assert touched <= found <= touched + slack
