"""Files of variables that are not Keras's: safetensors, and Orbax checkpoints.

Both keep the tree of variables as it is, under its own names, so no mapping is needed: a file fits a network if it has
the same tree with the same shapes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fzoo.files import check_parent, missing, one_line, replacing
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.types import MutableVariables, Variables
from fzoo.weights.files import KEY
from fzoo.weights.mapping import arrays_of, check_shapes, lookup

#: Between the keys of a path in a safetensors file: "params.conv1_conv.kernel".
SEPARATOR = "."


def load_safetensors(module: Classifier, path: str | os.PathLike) -> MutableVariables:
    """Read a network's variables from a safetensors file, strictly.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ModuleNotFoundError: safetensors is not installed.
        ValueError: a damaged file, or one of another network.
    """
    path = Path(path)
    with open_safetensors(path) as file:
        names = file.keys()
        flat = {name: file.get_tensor(name) for name in names}
    variables: MutableVariables = {}
    known = {SEPARATOR.join(keys): keys for keys in arrays_of(module)}
    for name, value in flat.items():
        *above, last = known.get(name) or name.split(SEPARATOR)  # a layer's own name may have a dot
        at: Any = variables
        for key in above:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise ValueError(f"{path} has no tree of variables: {name} lies below an array")
        if isinstance(at.get(last), dict):
            raise ValueError(f"{path} has no tree of variables: arrays lie below {name}")
        at[last] = value
    return checked(module, variables, path)


def described_safetensors(path: str | os.PathLike) -> str | None:
    """Read what fzoo wrote of the network into a safetensors file, JSON; raises as `load_safetensors`."""
    with open_safetensors(Path(path)) as file:
        return (file.metadata() or {}).get(KEY)


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; raises as `load_safetensors`."""
    safetensors()
    from safetensors import safe_open

    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, a safetensors file expected")
    if not path.exists():
        raise missing("weights file", path)
    try:
        with safe_open(path, "numpy") as file:
            yield file
    except Exception as e:  # SafetensorError is no class of the public interface; some dtypes raise KeyError
        raise ValueError(f"{path} is not a readable safetensors file: {one_line(e)}") from e


def save_safetensors(variables: Variables, path: str | os.PathLike, description: str) -> None:
    """Write variables as safetensors; the file appears under its name when it is whole."""
    flat = {
        SEPARATOR.join(str(step.key) for step in keys): np.asarray(leaf, order="C")
        for keys, leaf in jax.tree_util.tree_leaves_with_path(variables)
    }
    write_safetensors(flat, path, {"format": "flax", KEY: description})


def write_safetensors(arrays: dict[str, np.ndarray], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Write arrays, by their names, with metadata; the file appears under its name when it is whole."""
    library = safetensors()
    with replacing(path) as temporary:
        library.save_file(arrays, temporary, metadata=metadata)


def safetensors() -> ModuleType:
    """Import the library, an extra."""
    try:
        import safetensors.numpy
    except ModuleNotFoundError:
        raise ModuleNotFoundError("safetensors is not installed: pip install 'fzoo[convert]'") from None
    return safetensors.numpy


def load_orbax(module: Classifier, path: str | os.PathLike) -> MutableVariables:
    """Read a network's variables from an Orbax checkpoint, strictly.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it is no checkpoint, a damaged one, or one of another network.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if not path.is_dir():
        raise missing("checkpoint", path)
    target = trace(module).variables
    try:
        with unlogged(), ocp.StandardCheckpointer() as checkpointer:
            metadata: Any = checkpointer.metadata(path).item_metadata
            if metadata is None or not isinstance(metadata.tree, dict):
                raise ValueError("it holds no tree of arrays")
            check_shapes(module, metadata.tree)  # before anything is read
            if module.prepared:  # whose arrays are as they were made
                target = jax.tree.map(lambda leaf, there: leaf.update(dtype=there.dtype), target, metadata.tree)
            restored = checkpointer.restore(path, target)
            return jax.device_put(jax.tree.map(np.asarray, restored))  # which commits them to no device
    except Exception as e:  # Orbax and TensorStore raise many classes
        raise ValueError(f"{path} is not a checkpoint of this {type(module).__name__}: {one_line(e)}") from e


def described_orbax(path: str | os.PathLike) -> str | None:
    """Read what fzoo wrote of the network into a checkpoint, JSON; raises as `load_orbax`."""
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    try:
        with unlogged(), ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).custom_metadata
        return None if metadata is None else metadata.get(KEY)
    except Exception as e:  # Orbax and TensorStore raise many classes
        raise ValueError(f"{path} is not a readable checkpoint: {one_line(e)}") from e


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Leave out the warnings that Orbax logs of what it also raises, or gives as None."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def save_orbax(variables: Variables, path: str | os.PathLike, description: str) -> None:
    """Write variables as an Orbax checkpoint, a directory, which appears under its name when it is whole.

    Raises:
        FileExistsError: there is something at `path`.
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    if path.exists():
        raise FileExistsError(f"{path} exists: a checkpoint is a new directory")
    check_parent(path)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "checkpoint", variables, custom_metadata={KEY: description})
        (folder / "checkpoint").rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def checked(module: Classifier, variables: MutableVariables, path: Path) -> MutableVariables:
    """Put variables on the device, if they are the network's.

    Raises:
        ValueError: they are not.
    """
    expected = arrays_of(module)
    for keys, leaf in expected.items():
        value = lookup(variables, keys)
        if leaf.shape == () and isinstance(value, np.ndarray) and value.shape == (1,):  # so fzoo wrote scalars once
            lookup(variables, keys[:-1])[keys[-1]] = value.reshape(())
    try:
        check_shapes(module, variables)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from e
    for keys, leaf in expected.items():
        value = np.asarray(lookup(variables, keys))
        if value.dtype != leaf.dtype and not all(jnp.issubdtype(x.dtype, jnp.floating) for x in (value, leaf)):
            raise ValueError(f"{path}: {'/'.join(keys)} is {value.dtype}, {leaf.dtype} wanted")
        if not module.prepared:  # whose arrays are as they were made
            lookup(variables, keys[:-1])[keys[-1]] = value.astype(leaf.dtype, copy=False)
    return jax.device_put(variables)
