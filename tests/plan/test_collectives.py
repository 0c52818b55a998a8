"""Collectives read from HLO text: written by hand in each backend's manner, and compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from flax_switch.config import MeshConfig
from flax_switch.parallel.mesh import create_mesh
from flax_switch.plan.collectives import Collective, collectives

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={()->f32[]}, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%state), index=1
  %exchange = bf16[8,128]{1,0:T(8,128)(2,1)} all-to-all(%x), channel_id=3, replica_groups=[4,2]<=[4,2], dimensions={0}
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%i, %exchange)
}

%outer_body (outer: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %outer = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[8,128]{1,0}) while(%outer), condition=%less, body=%inner_body, backend_config={"known_trip_count":{"n":"3"}}
}

%less (c: (s32[], bf16[8,128])) -> pred[] {
  %c = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%searching (s: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %s = (s32[], bf16[8,128]{1,0}) parameter(0)
  %y = bf16[8,128]{1,0} get-tuple-element(%s), index=1
  %total = bf16[8,128]{1,0} all-reduce(%y), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %j = s32[] get-tuple-element(%s), index=0
  ROOT %again = (s32[], bf16[8,128]{1,0}) tuple(%j, %total)
}

%sent (p: f32[16,4]) -> f32[16,4] {
  %p = f32[16,4]{1,0} parameter(0)
  ROOT %a2a = f32[16,4]{1,0} all-to-all(%p), channel_id=5, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

%fused (f: f32[4,4]) -> f32[16,4] {
  %f = f32[4,4]{1,0} parameter(0)
  ROOT %begun = f32[16,4]{1,0} all-gather(%f), channel_id=10, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%fused.1 (g: f32[4,4]) -> f32[16,4] {
  %g = f32[4,4]{1,0} parameter(0)
  ROOT %ended = f32[16,4]{1,0} all-gather(%g), channel_id=10, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (r: f32[16,4]) -> f32[4,4] {
  %r = f32[16,4]{1,0} parameter(0)
  %part = f32[16,4]{1,0} all-reduce(%r), channel_id=8, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %k = u32[] constant(4)
  %l = u32[] constant(0)
  ROOT %kept = f32[4,4]{1,0} dynamic-slice(%part, %k, %l), dynamic_slice_sizes={4,4}
}

ENTRY %main (w: f32[4,4], q: f32[16,4], z: (s32[], bf16[8,128])) -> f32[] {
  %w = f32[4,4]{1,0} parameter(0)
  %q = f32[16,4]{1,0} parameter(1)
  %z = (s32[], bf16[8,128]{1,0}) parameter(2)
  %gather = (f32[4,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}, metadata={op_name="jit(step)/gather"}
  %gathered = f32[16,4]{1,0} all-gather-done(%gather)
  %two = (f32[4,4]{1,0}, f32[4,4]{1,0}) all-to-all(%w, %w), channel_id=2, replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %both = f32[] all-reduce-start(%w), replica_groups={}, to_apply=%add
  %done = f32[] all-reduce-done(%both)
  %start = ((f32[16,4]{1,0}), f32[16,4]{1,0}, u32[]) async-start(%q), calls=%sent
  %end = f32[16,4]{1,0} async-done(%start)
  %scattered = f32[4,4]{1,0} reduce-scatter(%q), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, to_apply=%add
  %step = f32[16,4]{1,0} fusion(%w), kind=kCustom, calls=%fused
  %last = f32[16,4]{1,0} fusion(%w), kind=kCustom, calls=%fused.1
  %kept_part = f32[4,4]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %shift = f32[4,4]{1,0} collective-permute(%w), channel_id=7, source_target_pairs={{0,1},{1,0}}
  %outer_loop = (s32[], bf16[8,128]{1,0}) while(%z), condition=%less, body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}
  %search = (s32[], bf16[8,128]{1,0}) while(%outer_loop), condition=%less, body=%searching
  ROOT %out = f32[] constant(0)
}
"""  # noqa: E501 - the lines are as long as XLA prints them


@pytest.fixture(scope="module")
def read() -> dict[str, Collective]:
    return {c.name: c for c in collectives(TEXT)}


def test_every_collective_is_found_once(read):
    assert sorted(read) == ["a2a", "begun", "both", "exchange", "gather", "part", "scattered", "shift", "total", "two"]
    assert len(collectives(TEXT)) == len(read)
    assert read["gather"].op_name == "jit(step)/gather"


@pytest.mark.parametrize(
    ("name", "kind", "bytes_", "wire"),
    [
        ("exchange", "all-to-all", 2048, 1024),
        ("a2a", "all-to-all", 256, 192),
        ("two", "all-to-all", 128, 64),
        ("gather", "all-gather", 256, 192),  # the gathered array's
        ("scattered", "reduce-scatter", 256, 192),  # the array's before it is scattered
        ("part", "reduce-scatter", 256, 192),  # an all-reduce of which a TPU keeps a slice
        ("total", "all-reduce", 2048, 2 * 1536),
        ("shift", "collective-permute", 64, 64),
    ],
)
def test_bytes_are_those_of_one_device_and_the_wire_spares_its_own_part(read, name, kind, bytes_, wire):
    assert (read[name].kind, read[name].bytes, read[name].wire_bytes) == (kind, bytes_, wire)


def test_groups_are_read_in_both_notations(read):
    assert read["a2a"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert read["gather"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert read["exchange"].groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert read["both"].groups == () and read["both"].group_size == 8


def test_loops_multiply_and_unknown_lengths_are_unknown(read):
    assert read["exchange"].count == 15  # nested loops of 5 and 3
    assert read["total"].count is None
    assert read["a2a"].count == read["gather"].count == 1


def test_a_program_compiled_here_is_read_as_it_was_written():
    mesh = create_mesh(MeshConfig(data=2, expert=4))

    def body(x):
        exchange = lambda y, _: (jax.lax.all_to_all(y, "expert", 0, 1, tiled=True).reshape(x.shape), None)  # noqa: E731
        return jax.lax.psum(jax.lax.scan(exchange, x, None, length=3)[0], "data")

    spec = P(("expert", "data"))
    f = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=P("expert"), check_vma=False))
    found = collectives(f.lower(jnp.zeros((64, 4), jnp.float32)).compile().as_text())
    exchange, total = sorted(found, key=lambda c: c.kind, reverse=True)
    assert (exchange.kind, exchange.bytes, exchange.count) == ("all-to-all", 8 * 4 * 4, 3)
    assert (total.kind, total.bytes, total.count) == ("all-reduce", 8 * 4 * 4, 1)
    devices = mesh.device_ids[..., 0]  # [data, expert]
    assert sorted(exchange.groups) == sorted(map(tuple, devices.tolist()))
    assert sorted(total.groups) == sorted(map(tuple, devices.T.tolist()))
