"""Meshes of devices: the two of this process, and 8 virtual ones in a process of its own."""

import inspect
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from fzoo.inference import devices

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


def where_it_is(given, count):
    """Which part is where, and that what is there stays."""
    mesh = devices.mesh(given)
    assert mesh.axis_names == ("batch",)
    x = np.arange(16.0).reshape(16, 1)
    tree = devices.replicate({"x": x}, mesh)
    assert devices.replicate(tree, mesh) is tree
    assert [s.data.shape for s in tree["x"].addressable_shards] == [(16, 1)] * count
    (whole,) = devices.shard((x,), mesh)
    np.testing.assert_array_equal(whole, x)
    for part, where in zip(whole.addressable_shards, mesh.devices, strict=True):
        start = part.index[0].start or 0
        assert part.device == where and part.data.shape == (16 // count, 1)
        np.testing.assert_array_equal(part.data, x[start : start + 16 // count])
    return mesh.devices.tolist()


def test_two_devices():
    first, second = jax.local_devices()
    assert where_it_is(None, 2) == where_it_is(2, 2) == [first, second]
    assert where_it_is(1, 1) == [first]
    assert where_it_is([second], 1) == [second]
    assert where_it_is([second, first], 2) == [second, first]


@pytest.mark.slow
def test_eight_devices():
    script = f"""
import jax, numpy as np
from fzoo import devices
{inspect.getsource(where_it_is)}
for count, given in ((8, None), (4, 4), (2, jax.devices()[3:5])):
    found = where_it_is(given, count)
print(found)
"""
    assert run(script, **EIGHT) == "[CpuDevice(id=3), CpuDevice(id=4)]\n"


def test_one_device():
    mesh = devices.mesh(1)
    assert list(mesh.devices) == jax.local_devices()[:1]
    np.testing.assert_array_equal(devices.shard(np.arange(3), mesh), np.arange(3))


@pytest.mark.parametrize("count", [0, 1 << 20, []])
def test_devices_that_are_not_there(count):
    with pytest.raises(ValueError, match=r"asked for, 1 to|at least one"):
        devices.mesh(count)


@pytest.mark.parametrize("where", ["", "host:1", "host,0,1", "host:1,1,1", "host:1,-1,2", "host:1,0"])
def test_a_place_that_is_none(where):
    with pytest.raises(ValueError, match="HOST:PORT,PROCESS,COUNT expected"):
        devices.start_distributed(where)


@pytest.mark.slow
def test_no_cluster_manager_in_a_process():
    script = """
from fzoo import devices
try:
    devices.start_distributed()
except ValueError as e:
    print(e)
"""
    assert "HOST:PORT,PROCESS,COUNT says it" in run(script, JAX_PLATFORMS="cpu")


def test_no_cluster_manager(monkeypatch):
    def initialize(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"should be defined\. HOST:PORT,PROCESS,COUNT says it"):
        devices.start_distributed()
