"""Drift gates of the planner's readers: every supported JAX's programs give the same figures, and unknown text is an error."""

import re
from pathlib import Path

import pytest

from flax_switch.plan.collectives import collectives
from flax_switch.plan.device_groups import device_groups
from flax_switch.plan.flops import program_flops
from flax_switch.plan.hlo import UnknownText, read_computations, shape_bytes
from flax_switch.plan.program import read_program, traffic

FOLDER = Path(__file__).parent / "goldens"
VERSIONS = ("0.10.2", "0.12.0.1")
ARRAY = 128 * 256 * 4  # bytes of every device's part

# Of every device, by hand: kind, times, bytes of the array, bytes sent; the same on every platform and for every version.
EXPECTED = {
    "all-to-all": [("all-to-all", 1, ARRAY, 3 * ARRAY // 4)],
    "all-to-all-in-a-loop": [("all-to-all", 3, ARRAY, 3 * ARRAY // 4)],
    "all-gather": [("all-gather", 1, 4 * ARRAY, 3 * ARRAY)],
    "all-reduce": [("all-reduce", 1, ARRAY, ARRAY)],  # of two devices: half there, half back
    "all-reduce-over-all": [("all-reduce", 1, ARRAY, 2 * ARRAY * 7 // 8)],
    "reduce-scatter": [("reduce-scatter", 1, ARRAY, 3 * ARRAY // 4)],
    "collective-permute": [("collective-permute", 1, ARRAY, ARRAY)],
    "ragged-all-to-all": [("ragged-all-to-all", 1, ARRAY, 3 * ARRAY // 4)],
    "parts-of-an-axis": [("all-reduce", 1, ARRAY, 2 * ARRAY * 3 // 4), ("all-gather", 1, 2 * ARRAY, ARRAY)],
}
GROUPS = {
    "all-reduce": {frozenset({i, i + 4}) for i in range(4)},
    "all-reduce-over-all": {frozenset(range(8))},
    "parts-of-an-axis": {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})},
}
ALONG_EXPERT = {frozenset(range(4)), frozenset(range(4, 8))}


GOLDENS = [pytest.param(file, id=file.name.removesuffix(".hlo.txt")) for file in sorted(FOLDER.glob("*.hlo.txt"))]


def spans(collective):
    return {frozenset(group) for group in collective.groups} or {frozenset(range(collective.group_size))}


@pytest.mark.parametrize("file", GOLDENS)
def test_every_version_of_jax_is_read_to_the_same_bytes(file):
    name = file.name.partition(".")[0]
    found = collectives(file.read_text())
    assert [(c.kind, c.count, c.bytes, c.wire_bytes) for c in found] == EXPECTED[name]
    if name == "collective-permute":
        assert set(found[0].groups) == {(4 * row + i, 4 * row + (i + 1) % 4) for row in range(2) for i in range(4)}
    else:
        assert spans(found[0]) == GROUPS.get(name, ALONG_EXPERT)


def test_there_is_a_golden_of_every_kind_for_every_supported_version():
    names = {file.name for file in FOLDER.glob("*.hlo.txt")}
    for name in EXPECTED:
        for platform in ("cpu", "tpu", "cuda"):
            if (name, platform) != ("ragged-all-to-all", "cpu"):  # XLA has none there
                assert {f"{name}.{platform}.jax-{version}.hlo.txt" for version in VERSIONS} <= names


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{}", ()),
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['data'=2,'expert'=4] {'expert'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['data'=2,'expert'=4] {'data'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh['data'=2,'expert'=2] {'expert','data'}", ((0, 2, 1, 3),)),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=8] {'x':(1)4}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['x'=8] {'x':(4)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['x'=4,'y'=2] {'y','x':(2)2}", ((0, 2, 1, 3), (4, 6, 5, 7))),
        ("mesh['x'=2,'y'=2] {}", ((0,), (1,), (2,), (3,))),
        ("mesh['a b'=2,'c, d'=2] {'c, d'}", ((0, 1), (2, 3))),
        ("mesh[x=2,y=2], device_ids=(0,2,1,3) {x}", ((0, 1), (2, 3))),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("maximal_mesh[device_id=5] {}", ((5,),)),
    ],
)
def test_groups_are_read_in_every_form_that_xla_writes(text, groups):
    assert device_groups(f", channel_id=1, replica_groups={text}, use_global_device_ids=true") == groups
    assert device_groups(f", replica_groups={text}") == groups


UNKNOWN_GROUPS = (
    "ring(8)",
    "mesh['x'=4] {'z'}",
    "mesh['x'=4] {'x':(3)2}",
    "mesh['x'=8] {'x':(1)4,'x':(2)2}",
    "mesh['x'=8] {'x'} stride=2",
    "mesh['x'=2,'y'=2], device_ids=(0,2,1) {'x'}",
    "mesh['x'=4], order=[1,0] {'x'}",
    "[2,4]<=[4,2]T(1,2)",
    "[2,3]<=[8]",
    "{{0,1},{2,3}}x2",
    "{{0..3}}",
    "{{}}",
)


@pytest.mark.parametrize("text", UNKNOWN_GROUPS)
def test_groups_in_an_unknown_form_are_an_error_that_quotes_them(text):
    with pytest.raises(UnknownText, match=re.escape(text)):
        device_groups(f", channel_id=1, replica_groups={text}")


def golden(name):
    return (FOLDER / f"{name}.cpu.jax-0.12.0.1.hlo.txt").read_text()


def test_a_collective_without_groups_is_an_error_and_not_one_of_all_devices():
    text = golden("all-reduce").replace("replica_groups", "device_teams")
    with pytest.raises(UnknownText, match="device_teams=mesh"):
        collectives(text)


def test_an_unknown_operation_among_devices_is_an_error():
    text = golden("all-reduce").replace("all-reduce(", "all-scan(")
    with pytest.raises(UnknownText, match=r"all-scan\("):
        collectives(text)


@pytest.mark.parametrize(
    ("old", "new", "quoted"),
    [
        ("ENTRY %", "START %", "START"),
        ("  ROOT %", "  LAST %", "LAST"),
        ("parameter(0)", "parameter 0", "parameter 0"),
        ("to_apply=%", "applied=%", "region_0"),
    ],
)
def test_a_program_in_an_unknown_form_is_an_error_that_quotes_it(old, new, quoted):
    text = golden("all-reduce")
    assert old in text
    with pytest.raises(UnknownText, match=quoted):
        collectives(text.replace(old, new))


@pytest.mark.parametrize("text", ["f32[?,3]", "quaternion[4]", "vector<4xf32>"])
def test_types_in_an_unknown_form_are_an_error(text):
    with pytest.raises(UnknownText, match=re.escape(text)):
        shape_bytes(text)
    assert shape_bytes("()") == 0 and shape_bytes("(f8e4m3fn[4], s4[8], token[])") == 8


PRODUCT = """HloModule m, num_partitions=1

ENTRY %main (a: f32[8,16], b: f32[16,4]) -> f32[8,4] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %c = f32[8,4]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


@pytest.mark.parametrize(
    ("old", "new", "quoted"),
    [
        ("lhs_contracting_dims", "left_contracting", "dot(%a, %b), left_contracting={1}"),
        ("dot(%a", "scaled-dot(%a", "scaled-dot(%a, %b)"),
        ("(%a, %b)", "(%a, %z)", "dot(%a, %z)"),
        ("dot(%a, %b), lhs_contracting_dims={1}", "convolution(%a, %b), axis_names=bf_io", "axis_names=bf_io"),
    ],
)
def test_products_in_an_unknown_form_are_an_error(old, new, quoted):
    assert program_flops(PRODUCT) == (2 * 8 * 16 * 4, True)
    with pytest.raises(UnknownText, match=re.escape(quoted)):
        program_flops(PRODUCT.replace(old, new))


def test_what_is_not_known_of_a_program_is_said_and_the_rest_is_there():
    both = golden("parts-of-an-axis")
    known = read_program(both, 8)
    assert known["unknown"] == () and [t.kind for t in known["traffic"]] == ["all-gather", "all-reduce"]
    strange = re.sub(r"(all-gather\(.*replica_groups=)mesh\[", r"\1web[", both)
    assert strange != both
    read = read_program(strange, 8)
    gather, reduce = read["traffic"]
    assert gather.bytes is None and gather.wire_bytes is None
    assert reduce == known["traffic"][1] and read["flops"] == known["flops"]
    (reason,) = read["unknown"]
    assert reason.startswith("bytes of all-gather: ") and "web['all'=8]" in reason
    assert set(traffic(strange, 8)[1]) == {"all-gather"}


def test_computations_and_their_entry_are_found():
    computations, entry = read_computations(golden("all-to-all-in-a-loop"))
    assert entry in computations and any(i.opcode == "while" for i in computations[entry])
