"""The layout of the files that Keras writes: which layers one holds, in which order, with which arrays.

Nothing here knows a network. Three layouts are read, told apart by their content, not by their name:

- legacy h5 (`model.save_weights("x.h5")`, `model.save("x.h5")`, all that Keras published): the attribute
  `layer_names` at the root or under `model_weights` gives the order, each layer's `weight_names` that of its arrays;
- Keras 3 `.weights.h5`: layers are grouped by class (`layers/conv2d_3/vars/0`), so the order is known within a class;
- `.keras`: a zip with such an h5 as `model.weights.h5`.

`writers.py` writes the same three.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import math
import mmap
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from fzoo.files import missing, one_line
from fzoo.weights.foreign import describe_foreign

#: Under which name a file keeps what fzoo says of its network: an attribute of HDF5's root, metadata of the others.
KEY = "fzoo"


#: HDF5's limit on an object header; Keras splits a longer attribute into name0, name1, ...
HEADER_LIMIT = 64512


#: A `.keras` file is a zip; this bounds what one may unpack to (the largest published model has 1.4 GB).
MAX_UNPACKED = 8 << 30


#: What an archive may unpack to for each of its bytes: Keras does not compress, and random numbers hardly shrink.
MAX_RATIO = 100


#: How deep models may be nested in models; links in a file can make circles.
MAX_DEPTH = 8


#: How many names a list may have, and how many groups and arrays a file: a dozen times those of the largest model.
MAX_NAMES = 1 << 14


#: How many strings longer than a name a file may keep, and how often each may be used: a model's configuration is one.
MAX_TEXTS = 8


#: How long a name may be.
MAX_NAME = 1 << 10


@dataclasses.dataclass(frozen=True)
class FileLayer:
    """A layer with weights, as a file has it.

    Attributes:
        name: the layer's name in the file.
        kind: its Keras class in snake case where the file groups by class; None where its order is the network's.
        arrays: its arrays in the file's order, not read yet.
        names: what the file calls them.
        parts: the layers inside, of a model as a layer that the file keeps layer by layer; it has no arrays itself.
        listed: of such a model, as `Contents.listed`.
        mixed: its place in the file may not be the network's: see `unfolded`.
        has_name: whether `name` is the layer's own; an older `.weights.h5` has no names, and calls it as its group is
            called ("conv2d_3").
    """

    name: str
    kind: str | None
    arrays: tuple[h5py.Dataset, ...]
    names: tuple[str, ...] = ()
    parts: tuple[FileLayer, ...] = ()
    listed: tuple[str, ...] = ()
    mixed: bool = False
    has_name: bool = True

    def all_arrays(self) -> list[h5py.Dataset]:
        """Return its arrays, and those of the layers inside."""
        return [*self.arrays, *(array for part in self.parts for array in part.all_arrays())]

    def unfolded(self) -> list[FileLayer]:
        """Return the layers inside, of a model as a layer; none of an ordinary layer.

        Legacy files keep all arrays of such a model in one list, those that were trainable first. An array's name tells
        its layer ("conv1/kernel:0"), but a layer that was frozen comes after those that were not.
        """
        if self.parts:
            return list(self.parts)
        inside: dict[str, list[h5py.Dataset]] = {}
        for name, array in zip(self.names, self.arrays, strict=True):
            layer, _, _ = name.rpartition("/")
            inside.setdefault(layer.rpartition("/")[2], []).append(array)
        if len(inside) < 2:
            return []
        return [FileLayer(layer, None, tuple(arrays), mixed=True) for layer, arrays in inside.items()]

    def part(self, path: str) -> FileLayer | None:
        """Find a layer inside of this model by its path below it; None if there is none."""
        if self.parts:
            return find_layer(self.parts, path)
        prefixes = (f"{path}/", f"{self.name}/{path}/")
        below = {
            name.removeprefix(prefix): array
            for name, array in zip(self.names, self.arrays, strict=True)
            for prefix in prefixes
            if name.startswith(prefix)
        }
        return FileLayer(path, None, tuple(below.values()), tuple(below), mixed=True) if below else None


def find_layer(layers: Iterable[FileLayer], path: str) -> FileLayer | None:
    """Find a layer by its name, or one inside of a model by the names on the way ("outer/inner"); None for no layer."""
    for layer in layers:
        below = path.removeprefix(f"{layer.name}/")
        inside = layer if path == layer.name else layer.part(below) if below != path else None
        if inside is not None:
            return inside
    return None


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a Keras file holds.

    Attributes:
        layers: those with weights.
        listed: the names, or where it groups by class the classes, of all layers, those without weights too; nothing
            where the file does not list these.
        description: what fzoo wrote of the network, JSON; None in a file of Keras's.
        root: the group of the file below which the layers lie.
    """

    layers: list[FileLayer]
    listed: tuple[str, ...]
    description: str | None
    root: h5py.Group

    def all_arrays(self) -> dict[str, h5py.Dataset]:
        """Return the file's arrays by their full paths in it: those of `layers`, then what else lies below the layers.

        The latter are the arrays of layers that are built of others ("layers/bidirectional/forward_layer/vars/0"). The
        state of random numbers, which is none of a network's, is not among them, nor are the arrays of an optimizer.

        Raises:
            ValueError: an array or a link that is not read.
        """
        arrays = {array_path(array): array for layer in self.layers for array in layer.all_arrays()}
        arrays |= {path: array for path, array in arrays_below(self.root) if path not in arrays}
        for path, array in arrays.items():
            if array.shape is None:
                raise ValueError(f"{path} is no array")
        return arrays


@contextlib.contextmanager
def open_layers(path: str | os.PathLike) -> Iterator[Contents]:
    """Yield what a Keras file holds; its arrays can be read while the context is open.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: it is not a Keras weights file, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        expected = describe_foreign(path) or "a Keras weights file (.h5, .weights.h5, .keras) expected"
        raise IsADirectoryError(f"{path} is a directory, {expected}")
    if not path.exists():
        raise missing("weights file", path)
    if not path.is_file():
        raise ValueError(f"{path} is not a readable Keras weights file: it is a device or a pipe")
    try:
        source = unpacked(path)
        with h5py.File(source, "r") as file:
            if file.userblock_size:
                raise ValueError("it begins with a block that is not HDF5's, as Keras writes none")
            heap = functools.cache(functools.partial(check_heaps, source, *file.id.get_create_plist().get_sizes()))
            root = legacy_root(file)
            layers, listed = keras3_layers(file, heap) if root is None else legacy_layers(root, heap)
            if not layers:
                raise ValueError("it holds no layers with weights")
            yield Contents(layers, listed, description_of(file), keras3_root(file)[0] if root is None else root)
    except WeightsMismatch:
        raise
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as e:
        # h5py reports damage as any of these, with a text of its own.
        raise ValueError(f"{path} is not a readable Keras weights file: {one_line(e)}") from e


class WeightsMismatch(ValueError):
    """A file does not fit a network; nothing of it was loaded.

    Attributes:
        problems: one line for each array that is missing, left over or of another shape.
    """

    def __init__(self, summary: str, problems: list[str]):
        self.problems = problems
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        super().__init__(f"{summary}: {shown}" if problems else summary)


def unpacked(path: Path) -> Path | io.BytesIO:
    """Return the h5 file: `path` itself, or what a `.keras` archive holds."""
    if h5py.is_hdf5(path):
        return path
    if not zipfile.is_zipfile(path):
        raise ValueError(f"it is {describe_foreign(path) or 'neither an HDF5 file nor a .keras archive'}")
    try:
        with zipfile.ZipFile(path) as archive:
            foreign = None if "model.weights.h5" in archive.namelist() else describe_foreign(path)
            if foreign is not None:
                raise ValueError(f"it is {foreign}")
            return member(archive, "model.weights.h5")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, struct.error, zlib.error) as e:
        raise ValueError(f"the archive is damaged ({one_line(e)})") from e


def member(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    """Read what an archive holds under a name. Neither its sizes are trusted, nor that it has the name once."""
    entries = [info for info in archive.infolist() if info.filename == name]
    if len(entries) != 1:
        raise ValueError(f"the archive has {len(entries) or 'no'} {name}")
    (info,) = entries
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack at once, whatever the size
        raise ValueError(f"{name} is compressed in another way than zip's deflate")
    if info.file_size > min(MAX_UNPACKED, MAX_RATIO * info.compress_size):
        raise ValueError(
            f"{name} unpacks to more than {MAX_UNPACKED >> 30} GiB, or {MAX_RATIO} times of what is in the archive"
        )
    content = io.BytesIO()
    with archive.open(info) as packed:
        shutil.copyfileobj(packed, content, 1 << 20)  # in pieces: `read` unpacks all before it looks at the size
    if len(content.getbuffer()) != info.file_size:
        raise ValueError(f"{name} in the archive is damaged (it is shorter than said)")
    return content


Kind = TypeVar("Kind", h5py.Group, h5py.Dataset, h5py.HLObject)


def child(group: h5py.Group, name: str, kind: type[Kind]) -> Kind:
    """Return what `group` itself holds under `name`, a path: no link elsewhere is followed, no data outside is read."""
    at: Any = group
    for part in name.split("/"):
        if not isinstance(at, h5py.Group) or at.get(part, getlink=True) is None:
            raise ValueError(f"{group.name} has no {name}")
        if not isinstance(at.get(part, getlink=True), h5py.HardLink):
            raise ValueError(f"{part} in {at.name} is a link to elsewhere, which is not followed")
        at = at[part]
    if not isinstance(at, kind):
        raise ValueError(f"{at.name} is not a {kind.__name__.lower()}")
    if isinstance(at, h5py.Dataset) and (at.is_virtual or at.external):  # before its shape, for which HDF5 goes there
        raise ValueError(f"{at.name} keeps its data outside of the file, which is not read")
    if isinstance(at, h5py.Dataset) and at.id.get_create_plist().get_nfilters():
        # A few bytes may unpack to any size, and HDF5 looks for filters that it lacks in the system's folders.
        raise ValueError(f"{at.name} is compressed or filtered, as Keras writes none; `h5repack -f NONE` undoes it")
    return at


def legacy_root(file: h5py.File) -> h5py.Group | None:
    """Find where the legacy layout begins: the root of a weights file, `model_weights` of a whole model."""
    groups = [file, *([child(file, "model_weights", h5py.Group)] if "model_weights" in file else [])]
    for group in groups:
        if "layer_names" in group.attrs or "layer_names0" in group.attrs:
            return group
    return None


def description_of(file: h5py.File) -> str | None:
    """Read what fzoo wrote of the network; None if Keras wrote this."""
    if KEY not in file.attrs:
        return None
    kept = file.attrs.get_id(KEY)  # not read yet, as in `read_names`
    if kept.shape != () or kept.dtype.kind != "S" or kept.dtype.itemsize > HEADER_LIMIT:
        raise ValueError("what it says of its network is damaged")
    text: Any = file.attrs[KEY]
    return bytes(text).decode()


def legacy_layers(root: h5py.Group, heap: Callable[[], None]) -> tuple[list[FileLayer], tuple[str, ...]]:
    """Return the layers of a legacy h5, in the order of `layer_names`, and the names of all."""
    layers, count, listed = [], 0, read_names(root, "layer_names", heap)
    for name in listed:
        group = child(root, name, h5py.Group)
        names = tuple(read_names(group, "weight_names", heap))
        count += len(names)
        if count > MAX_NAMES:
            raise ValueError(f"it lists more than {MAX_NAMES} arrays")
        if names:
            layers.append(FileLayer(name, None, tuple(child(group, n, h5py.Dataset) for n in names), names))
    return layers, complete(listed, layers)


def complete(listed: Sequence[str], layers: Sequence[FileLayer]) -> tuple[str, ...]:
    """Return a list of layers, if it has any without weights; otherwise it may leave these out, and says nothing."""
    return tuple(listed) if len(listed) > len(layers) else ()


def keras3_layers(file: h5py.File, heap: Callable[[], None]) -> tuple[list[FileLayer], tuple[str, ...]]:
    """Return the layers of a `.weights.h5`, those of each class in their order, and the classes of all."""
    root, key = keras3_root(file)
    return layers_in(root, key, heap, itertools.count())


def keras3_root(file: h5py.File) -> tuple[h5py.Group, str]:
    """Return the group of the layers in a `.weights.h5`, and its name."""
    for key in ("layers", "_layer_checkpoint_dependencies"):  # the latter up to Keras 2.13
        if key in file:
            return child(file, key, h5py.Group), key
    raise ValueError("it has neither layer_names nor layers")


def layers_in(
    root: h5py.Group, key: str, heap: Callable[[], None], seen: Iterator[int], depth: int = 0
) -> tuple[list[FileLayer], tuple[str, ...]]:
    """Return the layers that a group of a `.weights.h5` holds; a model as a layer holds a group like that itself."""
    if depth > MAX_DEPTH:
        raise ValueError(f"models in it are nested deeper than {MAX_DEPTH} times")
    layers, kinds = [], []
    for name in sorted(child_names(root, seen), key=by_number):
        group, kind = child(root, name, h5py.Group), re.sub(r"_\d+$", "", name)
        kinds.append(kind)
        own = child(group, "vars", h5py.Group) if "vars" in group else None
        names = [] if own is None else read_names(own, "name", heap)
        own_name, has_name = next(iter(names), name), bool(names)
        if key in group:
            inside, listed = layers_in(child(group, key, h5py.Group), key, heap, seen, depth + 1)
            if inside:
                layers.append(FileLayer(own_name, kind, (), parts=tuple(inside), listed=listed, has_name=has_name))
        elif own is not None and len(own):
            numbers = sorted(child_names(own, seen), key=int)
            arrays = tuple(child(own, number, h5py.Dataset) for number in numbers)
            layers.append(FileLayer(own_name, kind, arrays, tuple(numbers), has_name=has_name))
    return layers, complete(kinds, layers)


def arrays_below(root: h5py.Group) -> Iterator[tuple[str, h5py.Dataset]]:
    """Yield (path in the file, array) for all arrays below a group but the state of random numbers, depth first."""
    waiting, seen = [root], itertools.count()
    while waiting:
        group = waiting.pop()
        if len(str(group.name)) > MAX_NAME:  # a group may hold itself
            raise ValueError(f"a path in it is longer than {MAX_NAME} characters: {str(group.name)[:40]!a}...")
        inside = []
        for name in child_names(group, seen):
            item = child(group, name, h5py.HLObject)
            if isinstance(item, h5py.Dataset):
                yield array_path(item), item
            elif isinstance(item, h5py.Group) and name != "seed_generator":
                inside.append(item)
        waiting += reversed(inside)


def array_path(array: h5py.Dataset) -> str:
    """Return the full path of an array in its file, as h5py takes it: "conv1/conv1/kernel:0"."""
    return str(array.name).removeprefix("/")


def child_names(group: h5py.Group, seen: Iterator[int]) -> list[str]:
    """List what a group holds; `seen` counts it, since hard links may show the same few groups any number of times."""
    if len(group) > MAX_NAMES:
        raise ValueError(f"{group.name} holds more than {MAX_NAMES} things")
    names = []
    for name in group:
        names.append(checked_name(str(name)))
        if next(seen) > MAX_NAMES:
            raise ValueError(f"it holds more than {MAX_NAMES} groups and arrays")
    return names


def by_number(name: str) -> tuple[str, int]:
    """Return what sorts numbered names as they were given: "conv2d" before "conv2d_1" before "conv2d_10"."""
    number = re.search(r"_(\d+)$", name)
    return (name[: number.start()], int(number[1])) if number else (name, 0)


def read_names(group: h5py.Group, attribute: str, heap: Callable[[], None] = lambda: None) -> list[str]:
    """Read a list of names, which may be split over attribute0, attribute1, ...; `heap` is `check_heaps`."""
    parts = [attribute] if attribute in group.attrs else []
    while f"{attribute}{len(parts)}" in group.attrs:
        parts.append(f"{attribute}{len(parts)}")
    names: list[str] = []
    for part in parts:
        kept = group.attrs.get_id(part)  # not read yet: it may claim any shape and type
        shape = kept.shape
        if shape is None or (0 not in shape and h5py.check_string_dtype(kept.dtype) is None):
            raise ValueError(f"{part} of {group.name} is not text")
        if len(names) + math.prod(shape) > MAX_NAMES:
            raise ValueError(f"{part} of {group.name} has more than {MAX_NAMES} names")
        if 0 not in shape:
            if kept.dtype.kind == "O":  # of variable length
                heap()
            value: Any = group.attrs[part]
            names += [checked_name(name) for name in np.ravel(value)]
    return names


def check_heaps(source: Path | io.BytesIO, address_width: int, size_width: int) -> None:
    """Look at the heaps where HDF5 keeps strings of variable length, before it does.

    Many names may be the same long string, whose length HDF5 can't tell before it reads them all. And it follows the
    sizes in a heap without a look at where they lead: back, or nowhere, for ever.

    Args:
        source: the file.
        address_width, size_width: bytes of an address, and of a size in it.

    Raises:
        ValueError: such a heap, or long strings that are used many times.
    """
    header, texts = -(-(8 + size_width) // 8) * 8, []
    with contextlib.ExitStack() as stack:
        if isinstance(source, Path):
            file = stack.enter_context(open(source, "rb"))
            data: Any = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        else:
            data = source.getvalue()
        for heap in re.finditer(rb"GCOL\x01", data):
            start = at = heap.start()
            end = start + int.from_bytes(data[at + 8 : at + 8 + size_width], "little")
            if end > len(data):
                raise ValueError("a heap of strings in it is damaged")
            at += header
            while at + header <= end:
                number = data[at : at + 2]
                size = int.from_bytes(data[at + 8 : at + 8 + size_width], "little")
                step = header + -(-size // 8) * 8 if number != b"\0\0" else size
                if not 0 < step <= end - at:
                    raise ValueError("a heap of strings in it is damaged")
                if number != b"\0\0" and size > MAX_NAME:  # a reference to it is its heap's address, and its number
                    texts.append(start.to_bytes(address_width, "little") + number + b"\0\0")
                at += step
        if len(texts) > MAX_TEXTS:
            raise ValueError(f"it has more than {MAX_TEXTS} strings of more than {MAX_NAME} bytes")
        for text in texts:
            if len(list(itertools.islice(re.finditer(re.escape(text), data), MAX_TEXTS + 1))) > MAX_TEXTS:
                raise ValueError(f"a string of more than {MAX_NAME} bytes is used more than {MAX_TEXTS} times in it")


def checked_name(name: str | bytes) -> str:
    """Return a name from a file as text that can be shown.

    Raises:
        ValueError: it can't: line breaks, escapes, surrogates, or no end.
    """
    text = name.decode() if isinstance(name, bytes) else str(name)
    if len(text) > MAX_NAME or not text.isprintable():
        raise ValueError(f"a name in it is longer than {MAX_NAME} characters, or not printable: {text[:40]!a}")
    return text
