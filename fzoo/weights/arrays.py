"""The arrays of a file of weights, read when they are asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import h5py
import jax.numpy as jnp
import numpy as np

from fzoo.errors import unknown
from fzoo.files import one_line
from fzoo.types import DTypeLike
from fzoo.weights.files import open_layers
from fzoo.weights.formats import open_safetensors

File = TypeVar("File")

#: Makes what reads an array: (its name in errors, how it is read, of what).
Reader = Callable[[str, Callable[[Any], np.ndarray], Any], Callable[[], np.ndarray]]

#: The dtypes of safetensors, by the names that its files have for them.
SAFETENSORS: Mapping[str, DTypeLike] = MappingProxyType(
    {
        **{"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_},
        **{f"{letter}{bits}": f"{letter.lower()}{bits // 8}" for letter in "IU" for bits in (8, 16, 32, 64)},
    }
)


class FileArray:
    """An array of an open file: `np.asarray(array)` or `array[...]` reads its values, each time from the file.

    Attributes:
        path: of the array in the file.
        shape: of the array.
        dtype: of its values.
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: DTypeLike, read: Callable[[], np.ndarray]):
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self._read = read

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return int(np.prod(self.shape, dtype=object))

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        """Read the values.

        Raises:
            ValueError: the file is closed or damaged.
        """
        if copy is False:
            raise ValueError(f"{self.path} is in a file, copy=False given: reading makes a copy")
        values = self._read()
        return values if dtype is None else values.astype(dtype, copy=False)

    def __getitem__(self, key: Any) -> Any:
        """Read the values, and take those at `key`."""
        return np.asarray(self)[key]

    def __len__(self) -> int:
        """Return the length of the first axis."""
        if not self.shape:
            raise TypeError("len() of an array without axes")
        return self.shape[0]

    def __repr__(self) -> str:
        """Write its path, shape and dtype."""
        return f"FileArray({self.path!r}, shape={self.shape}, dtype={self.dtype.name})"


class FileArrays(Mapping[str, FileArray]):
    """The arrays of an open file by their paths; the name of a missing one gets the nearest in its KeyError."""

    def __init__(self, arrays: Mapping[str, FileArray]):
        self._arrays = arrays

    def __getitem__(self, path: str) -> FileArray:
        """Return the array at a path."""
        if path not in self._arrays:
            raise KeyError(unknown("array", path, self._arrays))
        return self._arrays[path]

    def __iter__(self) -> Iterator[str]:
        """Yield the paths, in the order of the file's layers."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._arrays)

    def __repr__(self) -> str:
        """Write how many there are."""
        return f"FileArrays({len(self)} arrays)"


@contextlib.contextmanager
def keras_arrays(path: Path) -> Iterator[FileArrays]:
    """Open the arrays of a Keras file; raises as `open_layers`."""
    with entered(open_layers(path), path) as (contents, reader):
        try:
            arrays = {
                name: FileArray(name, array.shape, dtype_of(array), reader(name, read_dataset, array))
                for name, array in contents.all_arrays().items()
            }
        except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as e:
            raise ValueError(f"{path} is not a readable Keras weights file: {one_line(e)}") from e
        yield FileArrays(arrays)


@contextlib.contextmanager
def safetensors_arrays(path: Path) -> Iterator[FileArrays]:
    """Open the arrays of a safetensors file; raises as `open_safetensors`."""
    with entered(open_safetensors(path), path) as (file, reader):
        arrays = {}
        for name in file.keys():  # noqa: SIM118
            at = file.get_slice(name)
            if at.get_dtype() not in SAFETENSORS:
                raise ValueError(f"{path}: {name} is of {at.get_dtype()}, one of {', '.join(SAFETENSORS)} expected")
            dtype = SAFETENSORS[at.get_dtype()]
            arrays[name] = FileArray(name, tuple(at.get_shape()), dtype, reader(name, file.get_tensor, name))
        yield FileArrays(arrays)


@contextlib.contextmanager
def entered(file: contextlib.AbstractContextManager[File], path: str | os.PathLike) -> Iterator[tuple[File, Reader]]:
    """Enter a file, which does not see what its user raises; with it, what makes the reader of an array.

    `reader(name, read, array)` reads by `read(array)` while the file is open, and says what is wrong in one line.
    """
    is_open = True

    def reader(name: str, read: Callable[[Any], np.ndarray], array: Any) -> Callable[[], np.ndarray]:
        def values() -> np.ndarray:
            if not is_open:
                raise ValueError(f"{path} is closed: {name} can be read inside of `with fzoo.open_weights(path)` alone")
            try:
                return read(array)
            except Exception as e:  # h5py and safetensors report damage as any class
                raise ValueError(f"{path}: {name} can't be read: {one_line(e)}") from e

        return values

    inside = file.__enter__()
    try:
        yield inside, reader
    finally:
        is_open = False
        file.__exit__(None, None, None)


def dtype_of(array: h5py.Dataset) -> np.dtype:
    """Return the dtype of an array of HDF5; Keras's bfloat16 are two bytes without a type there."""
    return np.dtype(jnp.bfloat16) if array.dtype == "V2" else array.dtype


def read_dataset(array: h5py.Dataset) -> np.ndarray:
    """Read an array of HDF5.

    Raises:
        ValueError: it has no numbers, or a shape, but no values.
    """
    if array.dtype.kind not in "fiub" and array.dtype != "V2":
        raise ValueError(f"it is {array.dtype!s:.60}, numbers expected")
    if array.id.get_storage_size() < array.nbytes:  # HDF5 would make up zeros
        raise ValueError("it has a shape, but its values were never written")
    return np.asarray(array[()]).view(dtype_of(array))
