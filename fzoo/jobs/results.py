"""What a batch job writes: whole shards in a folder beside its output, which are put together at the end.

A shard is an .npz of the rows of its images, renamed when it is whole, and JSON lines of those that could not be read.
Whatever the output's format, a job that was killed finds its whole shards, and one shard at a time is in memory.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np

from fzoo.files import one_line

try:
    import fcntl
except ImportError:  # Windows: two jobs at once on one output are not noticed
    fcntl = None


#: What is known of the rows before there are any: for each name the shape and dtype of one image's.
Shapes = Mapping[str, jax.ShapeDtypeStruct]


#: The array of names of images.
IMAGES = "images"


def check_out(out: str | os.PathLike, tapped: bool) -> Path:
    """The output's path.

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
        what = "the outputs of layers" if tapped else "classes"
        raise ValueError(f"{path}: a name that ends in {', '.join(endings)} expected, for {what}")
    if path.suffix == ".parquet":
        pyarrow()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory, the name of a file expected")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no such directory: {path.parent}")
    return path


def parts_of(out: Path) -> Path:
    """The folder of the shards of an output."""
    return out.with_name(f"{out.name}.parts")


class Shards:
    """The folder of a job's shards, "OUT.parts", and what the job is.

    Args:
        out: the output, from `check_out`.
        job: what decides the results; kept as JSON in the folder, and compared with what is there.
        restart: remove the shards of another job instead of raising.
        process: the number of this process, which has its shards for itself.

    Raises:
        ValueError: the folder is another job's.
        OSError: another process has this job, or the folder can't be made.

    Attributes:
        size: how many images a shard has: that of the job that is there already, or the one asked for.
    """

    def __init__(self, out: Path, job: Mapping[str, Any], size: int, *, restart: bool = False, process: int = 0):
        self.out, self.folder = out, parts_of(out)
        self.errors = out.with_name(f"{out.name}.errors.jsonl")
        self.folder.mkdir(exist_ok=True)
        self._lock = lock(self.folder / f"lock-{process}")
        if self._lock is None:
            raise BlockingIOError(errno.EAGAIN, f"another process is at work on {out}")
        try:
            self.size = self._begin(dict(job), size, restart)
        except BaseException:
            self.close()
            raise

    def _begin(self, job: dict[str, Any], size: int, restart: bool) -> int:
        """Compare with the job that is there, or write down this one."""
        manifest, known = self.folder / "job.json", size
        if any(self.folder.glob("*.npz")):
            try:
                found = json.loads(manifest.read_text(encoding="utf-8"))
                known = int(found.pop("shard_size"))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                found = {}
            if found == job:
                return known
            if not restart:
                other = ", ".join(sorted(key for key in {*found, *job} if found.get(key) != job.get(key)))
                raise ValueError(
                    f"{self.folder} holds results of another job (other: {other}): --restart (restart=True) removes "
                    "them, or give another name to write"
                )
            for path in self.folder.iterdir():
                if not path.name.startswith("lock-"):
                    path.unlink()
        with self._writing(), whole(manifest) as file:
            file.write(json.dumps({**job, "shard_size": size}, indent=1).encode())
        return size

    def path(self, number: int) -> Path:
        """Where a shard is, if it is whole."""
        return self.folder / f"{number:08}.npz"

    def write(self, number: int, names: Sequence[str], rows: Mapping[str, np.ndarray], failed: Iterable[Failure]):
        """Write a shard; it appears under its name when it is whole, and its errors before it."""
        with self._writing():
            with whole(self.path(number).with_suffix(".jsonl")) as file:
                file.writelines(json.dumps({"image": name, "error": error}).encode() + b"\n" for name, error in failed)
            with whole(self.path(number)) as file:
                np.savez(file, allow_pickle=False, **{IMAGES: np.array(names, np.str_)}, **rows)

    def join(self, count: int, shapes: Shapes, labels: Sequence[tuple[str, str]] | None) -> tuple[int, int] | None:
        """Put `count` shards together and remove them; that of several processes which is the last does it.

        Returns:
            (rows, images that could not be read), or None where shards are missing, or another process is at it.
        """
        parts = [self.path(number) for number in range(count)]
        if not all(part.exists() for part in parts):
            return None
        try:
            joining = lock(self.folder / "lock-join")
        except FileNotFoundError:  # another process has joined them meanwhile
            return None
        if joining is None:
            return None
        try:
            if not all(part.exists() for part in parts):
                return None
            with self._writing():
                rows, failed = self._join(parts, shapes, labels)
            # The description goes last, or what is left would be nobody's; and no shard is there without its errors.
            for part in parts:
                part.unlink()
                part.with_suffix(".jsonl").unlink()
            shutil.rmtree(self.folder, ignore_errors=True)
            return rows, failed
        finally:
            os.close(joining)

    def _join(self, parts: Sequence[Path], shapes: Shapes, labels: Any) -> tuple[int, int]:
        """Write the errors and the output; (rows, images that could not be read)."""
        failed, joined = 0, self.folder / f"joined{self.out.suffix}"
        with whole(self.folder / "errors", self.errors) as file:
            for part in parts:
                lines = part.with_suffix(".jsonl").read_bytes()
                failed += lines.count(b"\n")
                file.write(lines)
        if not failed:
            self.errors.unlink()
        rows = sum(len(names) for names in each(parts, IMAGES))
        if rows:
            with unfinished(joined):
                (LAYERS if labels is None else CLASSES)[self.out.suffix](joined, parts, rows, shapes, labels)
                with joined.open("rb+") as file:
                    os.fsync(file.fileno())
                joined.replace(self.out)
        return rows, failed

    def close(self) -> None:
        """Let another process have the job."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One kind of error, whatever the formats' libraries raise where a disk is full, and what to do about it."""
        try:
            yield
        except (OSError, RuntimeError) as e:
            reason = os.strerror(e.errno) if isinstance(e, OSError) and e.errno else one_line(e)
            raise OSError(
                f"{self.out} can't be written: {reason}; what was computed is kept in {self.folder}, and the same "
                "command goes on from there"
            ) from e


#: (name of the image, what is wrong with it)
Failure = tuple[str, str]


def lock(path: Path) -> int | None:
    """Hold a file for this process, until it is closed or the process ends; None if another one does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
    return descriptor


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """Remove a file if anything fails."""
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole(path: Path, target: Path | None = None) -> Iterator[Any]:
    """A file to write bytes to, which gets its name when it is on the disk."""
    # Several processes describe their job at the same time: each has its own.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with unfinished(temporary):
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target or path)


def each(parts: Iterable[Path], name: str) -> Iterator[np.ndarray]:
    """One array of each shard that has rows."""
    for part in parts:
        with np.load(part) as arrays:
            if len(names := arrays[IMAGES]):
                yield names if name == IMAGES else arrays[name]


def named(
    names: Iterable[str], rows: Mapping[str, np.ndarray], labels: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """(image, [(WordNet ID, label, probability), ...]) of each row."""
    if names:
        for name, indices, p in zip(names, rows["classes"].tolist(), rows["probabilities"].tolist(), strict=True):
            yield name, [(*labels[i], value) for i, value in zip(indices, p, strict=True)]


def predictions(
    parts: Iterable[Path], labels: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, list[tuple[str, str, float]]]]:
    """`named` of all rows of shards."""
    for part in parts:
        with np.load(part) as arrays:
            yield from named(arrays[IMAGES].tolist(), arrays, labels)


def as_object(image: str, found: Sequence[tuple[str, str, float]]) -> str:
    """A row as an object of JSON, on one line."""
    keys = ("wnid", "label", "probability")
    return json.dumps({"image": image, "predictions": [dict(zip(keys, row, strict=True)) for row in found]})


def write_jsonl(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Any) -> None:
    """An object a line, with the image and its predictions."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(as_object(*row) + "\n" for row in predictions(parts, labels))


def write_csv(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Any) -> None:
    """A line for each prediction, the likeliest of an image first."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("image", "wnid", "label", "probability"))
        for image, found in predictions(parts, labels):
            writer.writerows((image, wnid, label, f"{p:.9g}") for wnid, label, p in found)


def write_class_parquet(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Any) -> None:
    """A row for each prediction, as in a .csv; a row group for each shard."""
    pa, parquet = pyarrow()
    text = pa.string()
    schema = pa.schema([("image", text), ("wnid", text), ("label", text), ("probability", pa.float32())])
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            rows = [(printable(image), *row) for image, found in predictions([part], labels) for row in found]
            if rows:
                columns = [
                    pa.array(column, kind) for column, kind in zip(zip(*rows, strict=True), schema.types, strict=True)
                ]
                writer.write_table(pa.table(columns, schema=schema))


def write_layer_parquet(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Any) -> None:
    """A column for each layer, of lists of fixed size; the shape is the column's metadata."""
    pa, parquet = pyarrow()
    fields = [pa.field("image", pa.string())]
    for name, aval in shapes.items():
        kind = pa.list_(pa.from_numpy_dtype(aval.dtype), int(np.prod(aval.shape)))
        fields.append(pa.field(name, kind, metadata={"shape": json.dumps(aval.shape)}))
    schema = pa.schema(fields)
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts:
            for names in each([part], IMAGES):
                columns = [pa.array(map(printable, names.tolist()), pa.string())]
                for name, field in zip(shapes, fields[1:], strict=True):
                    (array,) = each([part], name)
                    columns.append(pa.FixedSizeListArray.from_arrays(pa.array(array.ravel()), type=field.type))
                writer.write_table(pa.table(columns, schema=schema))


def write_npz(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Any) -> None:
    """An array for each layer, and `images`; one array of one shard at a time."""
    text = max((names.dtype for names in each(parts, IMAGES)), key=lambda dtype: dtype.itemsize)
    arrays = {IMAGES: ((), text), **{name: (aval.shape, np.dtype(aval.dtype)) for name, aval in shapes.items()}}
    with zipfile.ZipFile(path, "w") as archive:
        for name, (shape, dtype) in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
                np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *shape)})
                for array in each(parts, name):
                    file.write(np.ascontiguousarray(array.astype(dtype, copy=False)).reshape(-1).view(np.uint8).data)


def write_h5(path: Path, parts: Sequence[Path], count: int, shapes: Shapes, labels: Any) -> None:
    """A dataset for each layer, and `images`."""
    text = sum(len(os.fsencode(name)) for names in each(parts, IMAGES) for name in names.tolist())
    rows = sum(int(np.prod(aval.shape)) * np.dtype(aval.dtype).itemsize for aval in shapes.values())
    reserve(path, count * (rows + 64) + text + (len(shapes) << 12) + (1 << 16))
    with h5py.File(path, "w") as file:
        datasets = {IMAGES: file.create_dataset(IMAGES, (count,), h5py.string_dtype())}
        datasets |= {name: file.create_dataset(name, (count, *a.shape), a.dtype) for name, a in shapes.items()}
        for name, dataset in datasets.items():
            start = 0
            for array in each(parts, name):
                if name == IMAGES:  # as the bytes that they are: not every name of a file is UTF-8
                    array = np.array([os.fsencode(each) for each in array.tolist()], object)
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
    """A name of a file as UTF-8 can have it."""
    return os.fsencode(name).decode(errors="backslashreplace")


def pyarrow() -> tuple[Any, Any]:
    """(pyarrow, pyarrow.parquet).

    Raises:
        ModuleNotFoundError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("Parquet files are written by pyarrow: pip install 'fzoo[parquet]'") from e
    return pyarrow, pyarrow.parquet


Writer = Callable[[Path, Sequence[Path], int, Shapes, Any], None]


#: How the likeliest classes are written, and how the outputs of layers are, by the end of the output's name.
CLASSES: dict[str, Writer] = {".jsonl": write_jsonl, ".csv": write_csv, ".parquet": write_class_parquet}


LAYERS: dict[str, Writer] = {".npz": write_npz, ".h5": write_h5, ".parquet": write_layer_parquet}
