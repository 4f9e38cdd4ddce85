"""The formats of a job's output: how each is written from shards, and how its rows are read again."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np

from fzoo.files import check_parent, write_rows

#: What is known of the rows before there are any: for each name the shape and dtype of one image's.
Shapes = Mapping[str, jax.ShapeDtypeStruct]


#: The array of names of images.
IMAGES = "images"


#: Of memory; see `write_npz`.
NAMES_BYTES = 1 << 30


def check_out(out: str | os.PathLike, tapped: bool) -> Path:
    """Return the output's path.

    Args:
        out: the path.
        tapped: whether it is for the outputs of layers, or for the likeliest classes.

    Raises:
        ValueError: a name whose ending is no format for that.
        ModuleNotFoundError: pyarrow is not installed, for .parquet.
        FileNotFoundError, IsADirectoryError: no file can be there.
    """
    path, endings = Path(out), LAYERS if tapped else CLASSES
    if path.suffix not in endings:
        contents = "the outputs of layers" if tapped else "classes"
        raise ValueError(f"{path}: a name that ends in {', '.join(endings)} expected, for {contents}")
    if path.suffix == ".parquet":
        pyarrow()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, the name of a file expected")
    check_parent(path)
    return path


def encode_names(names: Sequence[str]) -> np.ndarray:
    """Return names as a shard has them: bytes of JSON, where one long name takes no room for all others."""
    return np.frombuffer(json.dumps(list(names)).encode(), np.uint8)


def decode_names(array: np.ndarray) -> list[str]:
    """Return the names of a shard."""
    return json.loads(array.tobytes())


def arrays_of(parts: Iterable[Path], name: str) -> Iterator[Any]:
    """Yield one array of each shard that has rows, or the list of its names."""
    for part in parts:
        with np.load(part) as arrays:
            if names := decode_names(arrays[IMAGES]):
                yield names if name == IMAGES else arrays[name]


def label_rows(
    names: Iterable[str], rows: Mapping[str, np.ndarray], labels: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """Yield (image, [(WordNet ID, label, probability), ...]) of each row."""
    if names:
        for name, indices, p in zip(names, rows["classes"].tolist(), rows["probabilities"].tolist(), strict=True):
            yield name, [(*labels[i], value) for i, value in zip(indices, p, strict=True)]


def predictions(
    parts: Iterable[Path], labels: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """Yield `label_rows` of all rows of shards."""
    for part in parts:
        with np.load(part) as arrays:
            yield from label_rows(decode_names(arrays[IMAGES]), arrays, labels)


def as_object(image: str, classes: Sequence[tuple[str, str, float]]) -> str:
    """Write a row as an object of JSON, on one line."""
    keys = ("wnid", "label", "probability")
    return json.dumps({"image": image, "predictions": [dict(zip(keys, row, strict=True)) for row in classes]})


def write_jsonl(
    path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Sequence[tuple[str, str]]
) -> None:
    """Write an object a line, with the image and its predictions."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(as_object(*row) + "\n" for row in predictions(parts, labels))


def write_csv(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Sequence[tuple[str, str]]) -> None:
    """Write a line for each prediction, the likeliest of an image first."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        write_rows(file, [("image", "wnid", "label", "probability")])
        for image, classes in predictions(parts, labels):
            write_rows(file, [(image, wnid, label, f"{p:.9g}") for wnid, label, p in classes])


def write_class_parquet(
    path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Sequence[tuple[str, str]]
) -> None:
    """Write a row for each prediction, as in a .csv; a row group for each shard."""
    pa, parquet = pyarrow()
    text = pa.string()
    schema = pa.schema([("image", text), ("wnid", text), ("label", text), ("probability", pa.float32())])
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            rows = [(printable(image), *row) for image, classes in predictions([part], labels) for row in classes]
            if rows:
                columns = [
                    pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.types, strict=True)
                ]
                writer.write_table(pa.table(columns, schema=schema))


def write_layer_parquet(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: None) -> None:
    """Write a column for each layer, of lists of fixed size; the shape is the column's metadata."""
    pa, parquet = pyarrow()
    fields = [pa.field("image", pa.string())]
    for name, aval in shapes.items():
        kind = pa.list_(pa.from_numpy_dtype(aval.dtype), int(np.prod(aval.shape)))
        fields.append(pa.field(name, kind, metadata={"shape": json.dumps(aval.shape)}))
    schema = pa.schema(fields)
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            for names in arrays_of([part], IMAGES):
                columns = [pa.array(map(printable, names), pa.string())]
                for name, field in zip(shapes, fields[1:], strict=True):
                    (array,) = arrays_of([part], name)
                    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), type=field.type))
                writer.write_table(pa.table(columns, schema=schema))


def write_npz(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: None) -> None:
    """Write an array for each layer, and `images`; one array of one shard at a time.

    NumPy's arrays of text have the longest one's width. On the disk that is compressed. Where it would take more than
    `NAMES_BYTES` of memory, and many times what the text does, the names are UTF-8 in a row, `images_utf8`, with
    `images_ends`, where each of them ends.
    """
    lengths = [(len(name), len(os.fsencode(name))) for names in arrays_of(parts, IMAGES) for name in names]
    width, ends = max(max(lengths)[0], 1), np.cumsum([size for _, size in lengths], dtype=np.int64)
    arrays: dict[str, tuple[tuple[int, ...], np.dtype, Iterator[np.ndarray]]]
    if 4 * width * count > max(NAMES_BYTES, 16 * int(ends[-1])):
        utf8 = (os.fsencode("".join(names)) for names in arrays_of(parts, IMAGES))
        arrays = {
            "images_utf8": ((int(ends[-1]),), np.dtype(np.uint8), (np.frombuffer(text, np.uint8) for text in utf8)),
            "images_ends": (ends.shape, ends.dtype, iter([ends])),
        }
    else:
        text = np.dtype((np.str_, width))
        arrays = {IMAGES: ((count,), text, (np.array(names, text) for names in arrays_of(parts, IMAGES)))}
    texts = set(arrays)
    for name, aval in shapes.items():
        arrays[name] = ((count, *aval.shape), np.dtype(aval.dtype), arrays_of(parts, name))
    with zipfile.ZipFile(path, "w") as archive:
        for name, (shape, dtype, chunks) in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # of no date: the same results are the same bytes
            member.external_attr = 0o600 << 16
            member.compress_type = zipfile.ZIP_DEFLATED if name in texts else zipfile.ZIP_STORED
            with archive.open(member, "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for array in chunks:
                    file.write(np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(-1).view(np.uint8).data)


def write_h5(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: None) -> None:
    """Write a dataset for each layer, and `images`."""
    text = sum(len(os.fsencode(name)) for names in arrays_of(parts, IMAGES) for name in names)
    rows = sum(int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize for aval in shapes.values())
    reserve(path, count * (rows + 64) + text + (len(shapes) << 12) + (1 << 16))
    with h5py.File(path, "w") as file:
        datasets = {IMAGES: file.create_dataset(IMAGES, (count,), h5py.string_dtype())}
        datasets |= {name: file.create_dataset(name, (count, *a.shape), a.dtype) for name, a in shapes.items()}
        for name, dataset in datasets.items():
            start = 0
            for array in arrays_of(parts, name):
                if name == IMAGES:  # as the bytes that they are: not every name of a file is UTF-8
                    array = np.array([os.fsencode(image) for image in array], object)
                dataset[start : start + len(array)] = array
                start += len(array)


def reserve(path: Path, size: int) -> None:
    """Raise OSError unless the disk has room for `size` bytes: a write that fails can crash HDF5, and the process."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(path).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def printable(name: str) -> str:
    """Write a name of a file as UTF-8 can have it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def pyarrow() -> tuple[Any, Any]:
    """Return (pyarrow, pyarrow.parquet).

    Raises:
        ModuleNotFoundError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("Parquet files are written by pyarrow: pip install 'fzoo[parquet]'") from e
    return pyarrow, pyarrow.parquet


def read_rows(
    path: Path, count: int, shapes: Shapes, labels: Sequence[tuple[str, str]] | None, scratch: Path
) -> Mapping[str, np.ndarray]:
    """Return the rows of an output that was written here, by name; those of layers stay on the disk.

    Args:
        path: the output.
        count: how many rows it has.
        shapes: of one row of each result.
        labels: (WordNet ID, label) of each class; None for the outputs of layers.
        scratch: a folder for what can't be read in place.

    Raises:
        ValueError, LookupError, OSError: it is something else.
    """
    if labels is not None:
        top = shapes["classes"].shape[0]
        numbers = {label: i for i, label in enumerate(map(tuple, labels))}
        pairs = ((numbers[wnid, label], p) for wnid, label, p in read_predictions(path))
        flat = np.fromiter(pairs, [("class", np.int32), ("p", np.float32)], count * top).reshape(count, top)
        return {"classes": flat["class"], "probabilities": flat["p"]}
    arrays = {name: ((count, *aval.shape), np.dtype(aval.dtype)) for name, aval in shapes.items()}
    if path.suffix == ".parquet":
        return read_layer_parquet(path, arrays, scratch)
    find_offset = find_offset_npz if path.suffix == ".npz" else find_offset_h5
    return {
        name: np.memmap(path, dtype, "r", find_offset(path, name), shape) for name, (shape, dtype) in arrays.items()
    }


def read_predictions(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yield (WordNet ID, label, probability) of each prediction."""
    if path.suffix == ".parquet":
        for batch in pyarrow()[1].ParquetFile(path).iter_batches(columns=["wnid", "label", "probability"]):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)
        return
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        if path.suffix == ".csv":
            lines = csv.reader(file)
            next(lines)
            yield from ((wnid, label, float(p)) for _, wnid, label, p in lines)
        else:
            for line in file:
                yield from (tuple(p.values()) for p in json.loads(line)["predictions"])


def find_offset_npz(path: Path, name: str) -> int:
    """Return at which byte of an .npz the numbers of an array begin."""
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(f"{name}.npy").header_offset
    with path.open("rb") as file:
        file.seek(start + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # the name, and what else is known of it
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        return file.tell()


def find_offset_h5(path: Path, name: str) -> int:
    """Return at which byte of an HDF5 file the numbers of a dataset begin."""
    with h5py.File(path) as file:
        return file[name].id.get_offset()  # pyright: ignore[reportAttributeAccessIssue]


def read_layer_parquet(
    path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]], scratch: Path
) -> Mapping[str, np.ndarray]:
    """Return the columns of layers, written out again as arrays."""
    columns: dict[str, np.ndarray] = {
        name: np.lib.format.open_memmap(scratch / f"{i}.npy", "w+", dtype, shape)
        for i, (name, (shape, dtype)) in enumerate(arrays.items())
    }
    start = 0
    for batch in pyarrow()[1].ParquetFile(path).iter_batches(columns=list(arrays)):
        for name, array in columns.items():
            rows = batch.column(name).flatten().to_numpy(zero_copy_only=False)
            array[start : start + batch.num_rows] = rows.reshape(batch.num_rows, *array.shape[1:])
        start += batch.num_rows
    return columns


Writer = Callable[[Path, Sequence[Path], int, Shapes, Any], None]


#: How the likeliest classes are written, and how the outputs of layers are, by the end of the output's name.
CLASSES: dict[str, Writer] = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_class_parquet}


LAYERS: dict[str, Writer] = {".npz": write_npz, ".h5": write_h5, ".parquet": write_layer_parquet}
