"""The devices that a batch is spread over: JAX's SPMD on a mesh."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from fzoo.ops.platforms import traced_for as traced_for

#: The axis of `mesh`, along which the images of a batch lie.
BATCH = "batch"


#: Seconds that a process which is done waits for the others: their shares may take days longer.
PATIENCE = 7 * 24 * 3600


def mesh(devices: int | Sequence[Any] | None = None) -> Mesh:
    """Put devices in a row, as a mesh whose only axis is "batch".

    Args:
        devices: how many of this process's, or which; all of this process's by default. `jax.devices()` are those of
            all processes.

    Raises:
        ValueError: fewer than one, or more than there are; of several platforms.
    """
    local = jax.local_devices()
    if isinstance(devices, int) and not 1 <= devices <= len(local):
        raise ValueError(f"{devices} devices asked for, 1 to {len(local)} expected: {local[0].device_kind}")
    row = local if devices is None else local[:devices] if isinstance(devices, int) else list(devices)
    if not row:
        raise ValueError("no devices given: a mesh has at least one")
    if len(platforms := sorted({device.platform for device in row})) > 1:
        raise ValueError(f"devices of {' and '.join(platforms)} given, those of one platform expected")
    return Mesh(np.array(row), (BATCH,))


def replicate(tree: PyTree, mesh: Mesh | AbstractMesh) -> PyTree:
    """Put arrays on every device of the mesh; what is there already is not touched."""
    sharding = NamedSharding(mesh, PartitionSpec())
    if all(getattr(leaf, "sharding", None) == sharding for leaf in jax.tree.leaves(tree)):
        return tree
    return jax.device_put(tree, sharding)


def committed_to(tree: PyTree) -> Sharding | None:
    """Return where the first array of a tree lies that is committed to its devices; None if JAX is free to choose."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    return next((array.sharding for array in arrays if array.committed), None)


def device_of(tree: PyTree) -> Any:
    """Return a device on which JAX computes with these arrays: theirs, or the default one."""
    sharding = committed_to(tree)
    return next(iter(jnp.zeros(()).devices() if sharding is None else sharding.device_set))


def beside(tree: PyTree, others: PyTree) -> PyTree:
    """Put arrays whole where others are: committed to the same devices if these are, otherwise to none."""
    sharding = committed_to(others)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.device_put(tree, sharding)


def along_batch(mesh: Mesh) -> NamedSharding:
    """Return how the arrays lie that `shard` gives: split along their first axis, over all axes of the mesh."""
    axes = mesh.axis_names
    return NamedSharding(mesh, PartitionSpec(axes[0] if len(axes) == 1 else axes))


def split_of(tree: PyTree) -> NamedSharding | None:
    """Return how arrays lie that are split along their first axis alone, over devices of this process; else None."""
    sharding = committed_to(tree)
    if not isinstance(sharding, NamedSharding) or not sharding.spec or not sharding.is_fully_addressable:
        return None
    first, *others = sharding.spec
    if first is None or any(axis is not None for axis in others) or sharding.num_devices == 1:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(first))


def parts_of(sharding: Sharding) -> int:
    """Count the parts into which a sharding splits the first axis of an array."""
    if not isinstance(sharding, NamedSharding) or not sharding.spec or sharding.spec[0] is None:
        return 1
    axes = sharding.spec[0]
    return math.prod(sharding.mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))


def lies_otherwise(tree: PyTree, mesh: Any) -> bool:
    """Tell whether an array is split, or committed to other devices than a mesh's."""
    arrays = (leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and leaf.committed)
    own = set(mesh.devices.flat)
    return any(not array.is_fully_replicated or not array.sharding.device_set <= own for array in arrays)


def shard(batch: PyTree, mesh: Mesh) -> PyTree:
    """Split arrays along their first axis, a part for each device.

    Args:
        batch: a tree of arrays (N, ...), N a multiple of the devices. On a mesh of several processes, each process's
            own part of the batch.
        mesh: from `mesh`, or with axes of any names.

    Raises:
        ValueError: N is no multiple of the devices.
    """
    sharding = along_batch(mesh)
    if mesh.is_multi_process:
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
    return jax.device_put(batch, sharding)


def start_distributed(where: str = "auto") -> tuple[int, int]:
    """Join the other processes of a run, by `jax.distributed`; before anything else of JAX is used.

    Args:
        where: "auto" where a cluster manager says it (SLURM, Open MPI, Kubernetes, Cloud TPU), else
            "HOST:PORT,PROCESS,COUNT": where process 0 listens, the number of this one (from 0), and how many there are.

    Returns:
        (the number of this process, how many there are).

    Raises:
        ValueError: neither of these, or there is no cluster manager.
        OSError: the others don't answer, or this process can't listen.
    """
    options: dict[str, Any] = {}
    if where != "auto":
        match = re.fullmatch(r"(.+:\d+),(\d+),(\d+)", where)
        if not match or int(match[2]) >= int(match[3]):
            raise ValueError(
                f"{where!r} given, auto or HOST:PORT,PROCESS,COUNT expected (of 2 processes, the first is "
                "10.0.0.1:1234,0,2, the other 10.0.0.1:1234,1,2)"
            )
        options = {"coordinator_address": match[1], "process_id": int(match[2]), "num_processes": int(match[3])}
    try:
        jax.distributed.initialize(**options, shutdown_timeout_seconds=PATIENCE)
    except (ValueError, TypeError) as e:
        raise ValueError(f"no cluster manager that JAX knows: {e} HOST:PORT,PROCESS,COUNT says it") from e
    except RuntimeError as e:
        raise OSError(f"the processes of this run can't be joined: {' '.join(str(e).split())}") from e
    return jax.process_index(), jax.process_count()


def first_alone(begin: Callable[[], None]) -> None:
    """Have process 0 begin what the others then find begun; where it fails, none of them goes on.

    Raises:
        OSError: it failed, in the other processes; in process 0, what `begin` raised.
    """
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            begin()
        except Exception as e:  # the others wait for its end
            error = e
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        failed = bool(multihost_utils.broadcast_one_to_all(np.bool_(error is not None)))
        if failed and error is None:
            raise OSError("process 0 could not begin, and says why: the others end with it")
    if error is not None:
        raise error
