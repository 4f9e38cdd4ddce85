"""Meshes of devices: 8 virtual ones in a process of its own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fzoo import devices

EIGHT = {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}


def run(script, *args, **env):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_eight_devices():
    """Which part is where, and that what is there stays."""
    script = """
import jax, numpy as np
from fzoo import devices
for count, given in ((8, None), (4, 4), (2, jax.devices()[3:5])):
    mesh = devices.mesh(given)
    x = np.arange(16.0).reshape(16, 1)
    tree = devices.replicate({"x": x}, mesh)
    assert devices.replicate(tree, mesh) is tree
    assert [s.data.shape for s in tree["x"].addressable_shards] == [(16, 1)] * count
    for part, where in zip(devices.shard((x,), mesh)[0].addressable_shards, mesh.devices, strict=True):
        start = part.index[0].start or 0
        assert part.device == where and part.data.shape == (16 // count, 1)
        np.testing.assert_array_equal(part.data, x[start : start + 16 // count])
print(mesh.devices.tolist())
"""
    assert run(script, **EIGHT) == "[CpuDevice(id=3), CpuDevice(id=4)]\n"


def test_one_device():
    mesh = devices.mesh()
    assert mesh.axis_names == ("batch",) and list(mesh.devices) == jax.local_devices()
    np.testing.assert_array_equal(devices.shard(np.arange(3), mesh), np.arange(3))


@pytest.mark.parametrize("count", [0, 1 << 20, []])
def test_devices_that_are_not_there(count):
    with pytest.raises(ValueError, match=r"asked for, 1 to|at least one"):
        devices.mesh(count)


@pytest.mark.parametrize("where", ["", "host:1", "host,0,1", "host:1,1,1", "host:1,-1,2", "host:1,0"])
def test_a_place_that_is_none(where):
    with pytest.raises(ValueError, match="HOST:PORT,PROCESS,COUNT expected"):
        devices.start_distributed(where)


def test_no_cluster_manager():
    script = """
from fzoo import devices
try:
    devices.start_distributed()
except ValueError as e:
    print(e)
"""
    assert "HOST:PORT,PROCESS,COUNT says it" in run(script, JAX_PLATFORMS="cpu")
