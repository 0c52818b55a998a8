"""Meshes over several slices: which axis leaves a slice, and what cannot be."""

import dataclasses

import numpy as np
import pytest

from flax_switch.config import ConfigError, MeshConfig
from flax_switch.parallel.mesh import create_mesh, mesh_shape, slices_of
from flax_switch.plan.topology import compile_devices, parse_topology


@dataclasses.dataclass(frozen=True, order=True)
class Device:
    """What a mesh asks a device about."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def in_slices(slices, of_a_slice):
    """Devices whose numbers say nothing of their slice."""
    return [Device(i, i % slices) for i in range(slices * of_a_slice)]


def slice_indices(config, devices):
    return np.vectorize(lambda device: device.slice_index)(create_mesh(config, devices).devices)


def test_an_axis_over_slices_has_them_outermost_and_no_other_axis_leaves_a_slice():
    got = slice_indices(MeshConfig(data=4, expert=4, model=2, dcn_data=2), in_slices(2, 16))
    assert got.shape == (4, 4, 2)
    assert (got == np.array([0, 0, 1, 1])[:, None, None]).all()
    got = slice_indices(MeshConfig(data=2, expert=8, model=2, dcn_expert=4), in_slices(4, 8))
    assert (got == np.repeat(np.arange(4), 2)[None, :, None]).all()
    got = slice_indices(MeshConfig(data=4, expert=4, dcn_data=2, dcn_expert=2), in_slices(4, 4))
    assert (got == np.kron([[0, 1], [2, 3]], np.ones((2, 2), int))[..., None]).all()


def test_processes_and_equal_shares_stand_for_slices_where_devices_know_of_none():
    hosts = [Device(i, 0, process_index=i % 2) for i in range(8)]
    assert [[d.process_index for d in part] for part in slices_of(hosts, 2)] == [[0] * 4, [1] * 4]
    alone = [Device(i, 0) for i in range(8)]
    assert [[d.id for d in part] for part in slices_of(alone, 4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_slices_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="must be the number of slices, 4 here; it is 2"):
        create_mesh(MeshConfig(data=16, dcn_data=2), in_slices(4, 4))
    with pytest.raises(ConfigError, match="mesh.dcn_expert must divide it; they are 4 and 3"):
        MeshConfig(expert=4, dcn_expert=3)
    with pytest.raises(ConfigError, match=r"mesh.dcn_data \(3\) must divide mesh.data, which is 8"):
        mesh_shape(MeshConfig(dcn_data=3), 8)
    for name, why in (("0*v5e:4x4", "counted as in"), ("x*v5e:4x4", "counted as in"), ("2*h100:8", "Only TPUs come in slices")):
        with pytest.raises(ConfigError, match=why):
            parse_topology(name)


@pytest.mark.hardware("tpu")
def test_a_topology_of_two_slices_is_compiled_for():
    topology = parse_topology("2*v5e:4x4")
    assert topology.num_devices == 32 and topology.of_a_slice == "v5e:4x4"
    devices = compile_devices(topology)
    got = slice_indices(MeshConfig(expert=8, dcn_data=2), devices)
    assert (got == np.array([0, 0, 1, 1])[:, None, None]).all()
