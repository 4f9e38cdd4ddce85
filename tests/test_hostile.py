"""Weights files from strangers: whatever is in one, loading ends in weights or in one line, in little memory and time.

Files are loaded in a process of its own, with a limit on memory and on time, so that a crash or a hang of the HDF5
library is an outcome as any other. `FZOO_FUZZ=100000 pytest -m slow tests/test_hostile.py -k mutated` tries that many.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import jax
import numpy as np
import pytest

import fzoo
from fzoo.layers.classifier import Classifier
from fzoo.layers.keras import Layers
from fzoo.weights.files import MAX_NAMES, MAX_UNPACKED
from fzoo.weights.mapping import slots

#: What loading may take beyond what it took for good files, of which a process loads `WARM` first; the files have
#: 50 kB. Seconds are far more than a busy machine needs.
MEMORY, SECONDS, WARM = 512 << 20, 30, 5

#: Files of a run, and of a slow one, unless `FZOO_FUZZ` says another number.
MUTATIONS, MANY_MUTATIONS = 200, 4000

#: A run is split for the processes of pytest; not by a divisor of the number of layouts, 7, which take turns.
PARTS = 4


class Tiny(Classifier):
    """A few arrays of each kind that files have: numbered and named layers, a reshape, an integer, a Sequential."""

    min_size = 8

    def backbone(self, k: Layers, x: Any) -> Any:
        x = k.normalization(x)
        x = k.conv2d(x, 4, 3, name="conv_a")
        x = k.conv2d(x, 5, 1, use_bias=False)
        x = k.depthwise_conv2d(x, 3)
        return k.sequential(x, lambda k, x: k.conv2d(k.batch_norm(x, name="inner_bn"), 3, 1, name="inner"), name="seq")


def tiny() -> Tiny:
    return Tiny(include_top=False, input_shape=(8, 8, 3))


def tiny_variables() -> dict[str, Any]:
    """All of them random, so that an array's bytes can be found in a file."""
    rng, variables = np.random.default_rng(0), {}
    for slot in (slot for layer in slots(tiny()).values() for slot in layer):
        at = variables
        for key in slot.path[:-1]:
            at = at.setdefault(key, {})
        random = rng.integers(1 << 20, 1 << 30, slot.shape) if slot.array == "count" else rng.normal(size=slot.shape)
        at[slot.path[-1]] = np.asarray(random, slot.dtype)
    return variables


# -- the process that loads --------------------------------------------------------------------------------------------


def serve() -> None:
    """Load the files whose paths come in, one a line; answer with what came of each, as JSON."""
    module, expected = tiny(), leaves(tiny_variables())
    for number, line in enumerate(sys.stdin, 1):
        path = line.rstrip("\n")
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # its default action ends the process, in the middle of C, too
        try:
            loaded = leaves(fzoo.load_keras_weights(module, path))
        except BaseException as e:
            answer = {"error": type(e).__name__, "line": str(e), "documented": isinstance(e, (ValueError, OSError))}
        else:
            same_tree = loaded.keys() == expected.keys() and all(
                (loaded[k].shape, loaded[k].dtype) == (v.shape, v.dtype) for k, v in expected.items()
            )
            answer = {"whole": same_tree, "equal": all(loaded[k].tobytes() == v.tobytes() for k, v in expected.items())}
        answer = look_inside(module, path) or answer
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer["files"] = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        print(json.dumps(answer), flush=True)
        if number == WARM and os.path.exists("/proc/self/statm"):  # by now JAX has its threads, and what they need
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def look_inside(module: Tiny, path: str) -> dict[str, Any] | None:
    """Do what else is done with a file: load a part, read each array; what is raised, if it is not what is promised."""
    try:
        with contextlib.suppress(ValueError, OSError):
            fzoo.load_keras_weights(module, path, partial=True)
        with contextlib.suppress(ValueError, OSError), fzoo.open_weights(path) as arrays:
            for array in arrays.values():
                with contextlib.suppress(ValueError):
                    assert np.asarray(array).shape == array.shape
    except BaseException as e:
        return {"error": type(e).__name__, "line": str(e), "documented": False}
    return None


def leaves(tree: Any) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


class Loader:
    """A process that loads, begun anew where a file ended it."""

    def __init__(self, good: Path):
        self.good, self.process = good, None

    def load(self, path: Path) -> dict[str, Any]:
        """What came of a file; {"died": the exit status} where the process did not survive it."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONFAULTHANDLER": "1", "MALLOC_ARENA_MAX": "2"},
                text=True,
            )
            for _ in range(WARM):
                self.first = self.ask(self.good)
                assert self.first and self.first["equal"], self.first
        answer = self.ask(path)
        if answer is None:
            status = self.process.wait()
            self.close()
            return {"died": status}
        return answer

    def ask(self, path: Path) -> Any:
        """The answer, or None."""
        assert self.process and self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], 4 * SECONDS)[0]:
            self.process.kill()
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def close(self) -> None:
        if self.process:
            with contextlib.suppress(BrokenPipeError):
                self.process.__exit__(None, None, None)
            self.process = None


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Path]:
    """The same weights in each layout, and as other writers keep them."""
    folder, variables = tmp_path_factory.mktemp("originals"), tiny_variables()
    files = {name: folder / name for name in ("legacy.h5", "keras3.weights.h5")}
    for path in files.values():
        fzoo.save_keras_weights(tiny(), variables, path)
    files["stored.keras"] = rezipped(folder / "stored.keras", files["keras3.weights.h5"].read_bytes())
    files["deflated.keras"] = rezipped(folder / "deflated.keras", files["keras3.weights.h5"].read_bytes(), True)
    for name, options in {"latest.h5": {"libver": "latest"}, "chunked.h5": {}, "words.h5": {}}.items():
        files[name] = folder / name
        with h5py.File(files["legacy.h5"], "r") as old, h5py.File(files[name], "w", **options) as new:
            copied(old, new, chunks=name == "chunked.h5" or None, words=name == "words.h5")
    return files


def copied(old: Any, new: Any, chunks: bool | None, words: bool) -> None:
    """A group written again; `words`: names of variable length, which is what h5py makes of Keras's lists."""
    for key, value in old.attrs.items():
        text = words and isinstance(value, np.ndarray) and value.dtype.kind == "S"
        new.attrs[key] = [name.decode() for name in value] if text and len(value) else value
    for key, item in old.items():
        if isinstance(item, h5py.Group):
            copied(item, new.create_group(key), chunks, words)
        else:
            new.create_dataset(key, data=item[()], chunks=chunks if item.shape else None)


def rezipped(path: Path, h5: bytes, deflated: bool = False) -> Path:
    """An archive as Keras makes it, but for the time of day, so that a seed gives the same files again."""
    method = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), "{}", method)
        archive.writestr(zipfile.ZipInfo("model.weights.h5"), h5, method)
    return path


@pytest.fixture(scope="module")
def loader(originals) -> Iterator[Loader]:
    loader = Loader(originals["legacy.h5"])
    yield loader
    loader.close()


def assert_refused(answer: dict[str, Any], path: Path, message: str = "") -> None:
    assert "error" in answer, answer
    assert complaint(answer, path) is None, answer
    assert re.search(message, answer["line"]), answer["line"]


def complaint(answer: dict[str, Any], path: Path) -> str | None:
    """What is wrong with an error, if anything is."""
    if not answer["documented"]:
        return f"{answer['error']} is not documented: {answer['line']}"
    if str(path) not in answer["line"] or not answer["line"].isprintable() or len(answer["line"]) > 30_000:
        return f"not one line that names the file: {answer['line'][:300]!r}"
    return None


# -- files made by hand ------------------------------------------------------------------------------------------------

#: Where a layout has the kernel of conv_a, 3 x 3 x 3 x 4.
KERNEL = {"legacy.h5": "conv_a/conv_a/kernel", "keras3.weights.h5": "layers/conv2d/vars/0"}
KERNEL["stored.keras"] = KERNEL["keras3.weights.h5"]


def make(originals: dict[str, Path], layout: str, folder: Path, edit: Callable[[h5py.File, str], None]) -> Path:
    """A file of a layout, edited by h5py."""
    path = folder / layout
    inner = folder / "inner.h5"
    inner.write_bytes(originals["keras3.weights.h5" if layout == "stored.keras" else layout].read_bytes())
    with h5py.File(inner, "r+") as file:
        edit(file, KERNEL.get(layout, KERNEL["legacy.h5"]))
    if layout == "stored.keras":
        return rezipped(path, inner.read_bytes())
    return inner.rename(path)


def instead(**dataset: Any) -> Callable[[h5py.File, str], None]:
    """The kernel as another dataset."""

    def edit(file, kernel):
        del file[kernel]
        file.create_dataset(kernel, **dataset)

    return edit


def linked(link: Any) -> Callable[[h5py.File, str], None]:
    def edit(file, kernel):
        del file[kernel]
        file[kernel] = link

    return edit


def virtual(source: str, unlimited: bool) -> Callable[[h5py.File, str], None]:
    """HDF5 opens the sources of one without a limit as soon as its shape is asked for."""

    def edit(file, kernel):
        del file[kernel]
        shape, end = (3, 3, 3, 4), h5py.h5s.UNLIMITED if unlimited else 3
        most = (None, 3, 3, 4) if unlimited else shape
        layout = h5py.VirtualLayout(shape, "f", maxshape=most)
        layout[0:end] = h5py.VirtualSource(source, "d", shape, maxshape=most)[0:end]
        file.create_virtual_dataset(kernel, layout)

    return edit


def late(file: h5py.File, kernel: str, shape: tuple[int, ...], chunks: tuple[int, ...] | None = None) -> None:
    """A dataset of any size that takes no space."""
    del file[kernel]
    group, name = kernel.rsplit("/", 1)
    options = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    if chunks:
        options.set_chunk(chunks)
    options.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file[group].id, name.encode(), h5py.h5t.IEEE_F32LE, space, options)


def filtered(file: h5py.File, kernel: str) -> None:
    """The right shape, in one chunk whose 100 kB unpack to 100 MB."""
    del file[kernel]
    array = file.create_dataset(kernel, (3, 3, 3, 4), "f", chunks=(3, 3, 3, 4), compression="gzip")
    array.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(100 << 20), 9))


def half(file: h5py.File, kernel: str) -> None:
    """One of two chunks is there."""
    del file[kernel]
    array = file.create_dataset(kernel, (3, 3, 3, 4), "f", chunks=(3, 3, 3, 2))
    array[..., :2] = 1


def circle(file: h5py.File, kernel: str) -> None:
    """A layer that holds all layers."""
    if kernel.startswith("layers"):
        file["layers/conv2d/layers"] = file["layers"]
    else:
        file["conv_a/conv_a/kernel/".rstrip("/") + "_"] = file["conv_a"]
        file["conv_a"].attrs["weight_names"] = [b"conv_a/kernel_/conv_a/kernel_"]


class Named(str):
    """A type of values, with a name for the tests."""


#: What takes the kernel's place in each layout: (edit, what the error says).
EDITS: dict[str, tuple[Callable[[h5py.File, str], None], str]] = {
    "soft link": (linked(h5py.SoftLink("/elsewhere")), "link to elsewhere"),
    "soft link to itself": (lambda f, k: linked(h5py.SoftLink("/" + k))(f, k), "link to elsewhere"),
    "external link": (linked(h5py.ExternalLink("/etc/passwd", "/")), "link to elsewhere"),
    "external storage": (instead(shape=(3, 3, 3, 4), dtype="f", external="/etc/passwd"), "outside of the file"),
    "virtual": (virtual("/dev/zero", False), "outside of the file"),
    "virtual without a limit": (virtual("fifo", True), "outside of the file"),
    "group": (lambda f, k: f.__delitem__(k) or f.__setitem__(k + "/0", 1), "is not a dataset"),
    "type": (linked(np.dtype("f4")), "is not a dataset"),
    "compound of long names": (instead(shape=(3, 3, 3, 4), dtype=[("a\n" * 15_000, "f4")]), "in the file"),
    "circle": (circle, "nested deeper|is not a dataset"),
    "gone": (lambda f, k: f.__delitem__(k), "has no|arrays|does not fit"),
    "floats of variable length": (instead(shape=(3, 3, 3, 4), dtype=h5py.vlen_dtype("f4")), "is object"),
    "text of variable length": (instead(shape=(3, 3, 3, 4), dtype=h5py.string_dtype()), "is object"),
    "text": (instead(shape=(3, 3, 3, 4), dtype="S4"), "S4"),
    "references": (instead(shape=(3, 3, 3, 4), dtype=h5py.ref_dtype), "is object"),
    "regions": (instead(shape=(3, 3, 3, 4), dtype=h5py.regionref_dtype), "is object"),
    "compound": (instead(shape=(3, 3, 3, 4), dtype=[("a", "f4"), ("b", "i4")]), "in the file"),
    "compound of 2 bytes": (instead(shape=(3, 3, 3, 4), dtype=[("a", "u1"), ("b", "u1")]), "in the file"),
    "arrays": (instead(shape=(3, 3, 3), dtype=np.dtype(("f4", (4,)))), "in the file"),
    "complex": (instead(shape=(3, 3, 3, 4), dtype="c8"), "complex"),
    "truth": (instead(shape=(3, 3, 3, 4), dtype="?"), "bool"),
    "opaque": (instead(shape=(3, 3, 3, 4), dtype="V4"), "V4"),
    "null": (instead(data=h5py.Empty("f4")), "None in the file"),
    "scalar": (instead(data=np.float32(1)), r"\(\) in the file"),
    "32 dimensions": (lambda f, k: late(f, k, (2,) * 32), "in the file"),
    "2^60 numbers": (lambda f, k: late(f, k, (1 << 60,)), "in the file"),
    "2^60 numbers in chunks": (lambda f, k: late(f, k, (1 << 20, 1 << 20, 1 << 20), (1 << 9,) * 3), "in the file"),
    "gzip": (filtered, "is compressed"),
    "scaleoffset": (instead(shape=(3, 3, 3, 4), dtype="i4", chunks=True, scaleoffset=4), "is compressed"),
    "a filter of elsewhere": (
        instead(shape=(3, 3, 3, 4), dtype="f", chunks=True, compression=32015, allow_unknown_filter=True),
        "is compressed|filter",
    ),
    "never written": (instead(shape=(3, 3, 3, 4), dtype="f"), "never written"),
    "half written": (half, "never written"),
    "too many dimensions of nothing": (instead(shape=(0, 3, 3, 4), dtype="f"), "in the file"),
}


@pytest.mark.parametrize("layout", KERNEL)
@pytest.mark.parametrize("trick", EDITS)
def test_arrays_that_are_none(originals, loader, tmp_path, monkeypatch, trick, layout):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")  # opening it would take forever
    edit, message = EDITS[trick]
    if trick == "virtual without a limit":
        edit = virtual(str(tmp_path / "fifo"), True)
    path = make(originals, layout, tmp_path, edit)
    assert_refused(loader.load(path), path, message)


@pytest.mark.parametrize("layout", KERNEL)
@pytest.mark.parametrize("dtype", ["f2", "f8", ">f4", "i1", "u8", ">i8", "V2"])
def test_arrays_of_other_numbers(originals, loader, tmp_path, layout, dtype):
    """The most that a type has is in none of the ways; V2 is what bfloat16 looks like."""
    values = np.full((3, 3, 3, 4), b"\x7f\x7f" if dtype == "V2" else 1e300 if dtype == "f8" else 100).astype(dtype)
    path = make(originals, layout, tmp_path, instead(data=values))
    assert loader.load(path)["whole"]


@pytest.mark.parametrize("dtype", ["u1", "f2", "f4", "f8", "i8", "u8", ">i2"])
@pytest.mark.parametrize("value", [100, -1, np.nan, np.inf])
def test_counts_of_other_numbers(originals, loader, tmp_path, dtype, value):
    if dtype[-2] in "ui" and not 0 <= value < 101:
        value = np.iinfo(dtype).max

    def edit(file, kernel):
        del file["normalization/normalization/count"]
        file["normalization/normalization/count"] = np.asarray(value, dtype)

    assert loader.load(make(originals, "legacy.h5", tmp_path, edit))["whole"]


def listed(names: Any, attribute: str = "layer_names") -> Callable[[h5py.File, str], None]:
    def edit(file, kernel):
        del file.attrs[attribute]
        file.attrs[attribute] = names

    return edit


def whole_group(names: Any) -> Callable[[h5py.File, str], None]:
    """Other names of conv_a's arrays."""

    def edit(file, kernel):
        file["conv_a"].attrs["weight_names"] = names

    return edit


#: What the names of a legacy file may be.
NAMES: dict[str, tuple[Callable[[h5py.File, str], None], str]] = {
    "up": (listed([b".."]), "has no .."),
    "up in a path": (listed([b"conv_a/../conv_a"]), "has no"),
    "absolute": (listed([b"/etc/passwd"]), "has no|not a|empty|damaged|readable"),
    "here": (listed([b"."]), "readable"),
    "nothing": (listed([b""]), "readable"),
    "lines": (listed([b"a\nb"]), "not printable"),
    "escapes": (listed([b"\x1b[2J"]), "not printable"),
    "not UTF-8": (listed([b"\xff\xfe"]), "decode|not printable"),
    "not UTF-8, of variable length": (listed(np.array([b"\xff", b"a"], h5py.string_dtype())), "not printable"),
    "long": (listed([b"a" * 60_000]), "longer than"),
    "numbers": (listed([1, 2]), "not text"),
    "compound": (listed(np.zeros(2, [("a", "f4")])), "not text"),
    "no space": (listed(h5py.Empty("S1")), "not text"),
    "arrays up": (whole_group([b"../conv_a/kernel", b"conv_a/bias"]), "has no"),
    "arrays, absolute": (whole_group([b"/conv_a/conv_a/kernel", b"conv_a/bias"]), "has no|readable"),
    "arrays, doubled": (whole_group([b"conv_a//kernel", b"conv_a/bias"]), "has no|readable"),
    "arrays with lines": (whole_group([b"conv_a/kernel\n", b"conv_a/bias"]), "not printable"),
}


@pytest.mark.parametrize("trick", NAMES)
def test_names_that_are_none(originals, loader, tmp_path, trick):
    edit, message = NAMES[trick]
    path = make(originals, "legacy.h5", tmp_path, edit)
    assert_refused(loader.load(path), path, message)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a" * 2000, np.zeros(3), h5py.Empty("S1")])
@pytest.mark.parametrize("layout", ["keras3.weights.h5", "stored.keras"])
def test_names_of_newer_files(originals, loader, tmp_path, layout, name):
    path = make(
        originals, layout, tmp_path, lambda file, kernel: file["layers/conv2d/vars"].attrs.__setitem__("name", name)
    )
    assert_refused(loader.load(path), path, "printable|not text")


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "\x1b", " 1\n"])
@pytest.mark.parametrize("group", ["layers", "layers/conv2d/vars"])
def test_groups_with_names_that_are_none(originals, loader, tmp_path, group, name):
    path = make(
        originals, "keras3.weights.h5", tmp_path, lambda file, kernel: file[group].move(next(iter(file[group])), name)
    )
    assert_refused(loader.load(path), path, "printable")


def test_a_million_names(originals, loader, tmp_path):
    for names in (np.full(1_000_000, b"conv_a"), np.full(MAX_NAMES + 1, b"conv_a"), ["conv_a"] * 100_000):
        with h5py.File(tmp_path / "many.h5", "w", libver="latest") as file:
            file.attrs["layer_names"] = names
            file.create_group("conv_a").attrs["weight_names"] = np.zeros(0, "S1")
        assert_refused(loader.load(tmp_path / "many.h5"), tmp_path / "many.h5", f"more than {MAX_NAMES} names")


@pytest.mark.slow
def test_many_names_of_one_group(loader, tmp_path):
    """16,000 names for one group of 2,000 names for one array."""
    path = tmp_path / "many.h5"
    with h5py.File(path, "w", libver="latest") as file:
        group = file.create_group("a0")
        group["b0"] = np.zeros(2)
        for i in range(2000):
            group[f"c{i}"] = group["b0"]
        group.attrs["weight_names"] = np.array([f"c{i}".encode() for i in range(2000)])
        for i in range(16_000):
            file[f"d{i}"] = group
        file.attrs["layer_names"] = np.array([f"d{i}".encode() for i in range(16_000)])
    assert_refused(loader.load(path), path, "lists more than")


def test_one_long_string_named_often(loader, tmp_path):
    """Names of variable length are references to a heap: 1,000 to a string of 4 MB would take 4 GB."""
    path = tmp_path / "heap.h5"
    with h5py.File(path, "w") as file:
        names = np.array(["", *["b" * 16] * 999], object)
        names[0] = "a" * (4 << 20)
        file.attrs.create("layer_names", names, dtype=h5py.string_dtype())
    data = path.read_bytes()
    # A reference is a length, the address of a heap, a number in it. All become the first.
    with h5py.File(path, "r") as file:
        assert file.attrs["layer_names"].shape == (1000,)
    start = data.index(struct.pack("<IQ", 4 << 20, data.rindex(b"GCOL")))
    path.write_bytes(data[:start] + data[start : start + 16] * 1000 + data[start + 16_000 :])
    assert_refused(loader.load(path), path, "is used more than 8 times")


@pytest.mark.parametrize("layout", ["words.h5", "keras3.weights.h5", "stored.keras"])
@pytest.mark.parametrize(("index", "size"), [(0, 0), (9, (1 << 64) - 16), (9, (1 << 64) - 32), (9, 1 << 40)])
def test_heaps_that_lead_nowhere(originals, loader, tmp_path, layout, index, size):
    """HDF5 2.0 itself follows the first two for ever."""
    inner = originals["keras3.weights.h5" if layout == "stored.keras" else layout]
    data = bytearray(inner.read_bytes())
    for heap in re.finditer(rb"GCOL", bytes(data)):
        struct.pack_into("<HHIQ", data, heap.start() + 16, index, 1, 0, size)
    path = tmp_path / layout
    if layout == "stored.keras":
        rezipped(path, bytes(data))
    else:
        path.write_bytes(data)
    assert_refused(loader.load(path), path, "heap of strings")


@pytest.mark.parametrize("layout", ["keras3.weights.h5", "stored.keras"])
def test_groups_that_hold_themselves(originals, loader, tmp_path, layout):
    """20 names for a group in itself, 8 levels deep: 2e10 groups to see."""

    def edit(file, kernel):
        for i in range(20):
            file[f"layers/conv2d_{i + 7}"] = file["layers/conv2d"]
        file["layers/conv2d/layers"] = file["layers"]

    path = make(originals, layout, tmp_path, edit)
    assert_refused(loader.load(path), path, "nested deeper|more than")


@pytest.mark.slow
def test_groups_that_hold_themselves_twice(originals, loader, tmp_path):
    """As wide as deep, so that the number is met before the depth."""

    def edit(file, kernel):
        del file["layers"]
        above = [file.create_group(f"level{i}") for i in range(8)]
        for outer, inner in itertools.pairwise(above):
            for i in range(20):
                outer[f"dense_{i}/layers"] = inner
        for i in range(20):
            above[-1][f"dense_{i}/vars/0"] = np.zeros(2)
        file["layers"] = above[0]

    path = make(originals, "keras3.weights.h5", tmp_path, edit)
    assert_refused(loader.load(path), path, "more than")


def test_too_many_groups(loader, tmp_path):
    path = tmp_path / "many.weights.h5"
    with h5py.File(path, "w", libver="latest") as file:
        group = file.create_group("layers")
        one = group.create_group("dense")
        for i in range(MAX_NAMES):
            group[f"dense_{i}"] = one
    assert_refused(loader.load(path), path, f"holds more than {MAX_NAMES}")


# -- archives ----------------------------------------------------------------------------------------------------------


def patched(path: Path, **fields: int) -> Path:
    """Set the fields of an archive's record of its last member, in its own header and in the directory."""
    data = bytearray(path.read_bytes())
    for start, offsets in (
        (data.rindex(b"PK\3\4"), {"flags": 6, "method": 8, "packed": 18, "size": 22}),
        (data.rindex(b"PK\1\2"), {"flags": 8, "method": 10, "packed": 20, "size": 24}),
    ):
        for field, value in fields.items():
            struct.pack_into("<H" if field in ("flags", "method") else "<I", data, start + offsets[field], value)
    path.write_bytes(data)
    return path


def archive_of(path: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", method, compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


#: Archives, of the h5 file that they should hold.
ARCHIVES: dict[str, tuple[Callable[[Path, bytes], Path], str]] = {
    "bomb": (lambda p, h: archive_of(p, ("model.weights.h5", h + bytes(80 << 20))), "unpacks to more than"),
    "bomb that says it is small": (
        lambda p, h: patched(archive_of(p, ("model.weights.h5", h + bytes(600 << 20))), size=len(h)),
        "damaged",
    ),
    "bomb of bzip2": (
        lambda p, h: archive_of(p, ("model.weights.h5", bytes(80 << 20)), method=zipfile.ZIP_BZIP2),
        "deflate",
    ),
    "lzma": (lambda p, h: archive_of(p, ("model.weights.h5", h), method=zipfile.ZIP_LZMA), "deflate"),
    "unknown compression": (lambda p, h: patched(archive_of(p, ("model.weights.h5", h)), method=77), "deflate"),
    "too large": (
        lambda p, h: patched(archive_of(p, ("model.weights.h5", h)), size=0xFFFFFFF0),
        f"unpacks to more than {MAX_UNPACKED >> 30} GiB|damaged",
    ),
    "longer than said": (lambda p, h: patched(rezipped(p, h), size=len(h) - 9, packed=len(h) - 9), "damaged"),
    "shorter than said": (lambda p, h: patched(rezipped(p, h, True), size=len(h) + 9), "damaged"),
    "sizes that differ": (lambda p, h: patched(rezipped(p, h), size=len(h) + 4096), "damaged"),
    "twice": (lambda p, h: archive_of(p, ("model.weights.h5", h), ("model.weights.h5", h)), "has 2 model"),
    "twice, by a NUL": (lambda p, h: nul(archive_of(p, ("model.weights.h5", h), ("model.weights.h5_a", h))), "has 2"),
    "encrypted": (lambda p, h: patched(rezipped(p, h), flags=1), "encrypted"),
    "up": (lambda p, h: archive_of(p, ("../model.weights.h5", h)), "a zip that holds"),
    "absolute": (lambda p, h: archive_of(p, ("/model.weights.h5", h)), "a zip that holds"),
    "in itself": (lambda p, h: archive_of(p, ("model.weights.h5", rezipped(p, h).read_bytes())), "readable"),
    "no HDF5": (lambda p, h: archive_of(p, ("model.weights.h5", b"text")), "readable"),
    "empty": (lambda p, h: archive_of(p, ("model.weights.h5", b"")), "readable"),
    "pickle": (lambda p, h: archive_of(p, ("model.weights.npz", b"\x80\x04."), ("config.json", b"{}")), "has no model"),
    "other name in its header": (lambda p, h: renamed(rezipped(p, h)), "damaged"),
    "other bytes": (lambda p, h: flipped(rezipped(p, h), h), "damaged"),
}


def nul(path: Path) -> Path:
    path.write_bytes(path.read_bytes().replace(b"model.weights.h5_a", b"model.weights.h5\0a"))
    return path


def renamed(path: Path) -> Path:
    path.write_bytes(path.read_bytes().replace(b"model.weights.h5", b"other.weights.h5", 1))
    return path


def flipped(path: Path, h5: bytes) -> Path:
    """One bit of the weights, which only the archive's checksum tells."""
    data = bytearray(path.read_bytes())
    kernel = tiny_variables()["params"]["conv_a"]["kernel"].tobytes()
    data[data.index(kernel)] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("trick", ARCHIVES)
def test_archives(originals, loader, tmp_path, trick):
    make_it, message = ARCHIVES[trick]
    path = make_it(tmp_path / "a.keras", originals["keras3.weights.h5"].read_bytes())
    assert_refused(loader.load(path), path, message)


def test_what_is_no_file(loader, tmp_path):
    os.mkfifo(tmp_path / "pipe.h5")
    (tmp_path / "circle.h5").symlink_to(tmp_path / "circle.h5")
    (tmp_path / "empty.h5").write_bytes(b"")
    for path in (tmp_path / "pipe.h5", Path("/dev/zero"), tmp_path, tmp_path / "circle.h5", tmp_path / "empty.h5"):
        assert_refused(loader.load(path), path)


# -- good files, changed at random -------------------------------------------------------------------------------------


def raw_bytes(data: bytes) -> np.ndarray:
    """Which bytes of a file are the values of an array."""
    raw = np.zeros(len(data), bool)
    for value in jax.tree.leaves(tiny_variables()):
        start = data.find(value.tobytes())
        if start >= 0:
            raw[start : start + value.nbytes] = True
    return raw


#: Numbers that sizes and addresses are easily taken wrong for.
NUMBERS = [0, 1, 2, 7, 8, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 63) - 1]


def changed_bytes(data: bytes, raw: np.ndarray, rng: np.random.Generator) -> tuple[bytes, str]:
    """Other bytes, and what was done."""
    how = rng.choice(["bits", "bytes", "number", "address", "zeros", "ones", "noise", "swap", "repeat", "cut", "grow"])
    meta, out = np.flatnonzero(~raw), bytearray(data)
    used = meta[np.frombuffer(data, np.uint8)[meta] != 0]  # most metadata of HDF5 are zeros that nothing reads

    def place(length: int = 1) -> int:
        where = rng.choice([0, 1, 1, 2, 2, 2])
        at = int(rng.integers(len(data)) if where == 0 else rng.choice(meta if where == 1 else used))
        return max(0, min(at, len(data) - length))

    length = int(min(len(data) // 2, rng.choice([1, 2, 4, 8, 16, 64, 512, 4096])))
    for _ in range(int(rng.choice([1, 1, 1, 2, 8]))):
        at, other = place(length), place(length)
        if how == "bits":
            out[at] ^= 1 << int(rng.integers(8))
        elif how == "bytes":
            out[at] = int(rng.integers(256))
        elif how in ("number", "address"):
            width, at = int(rng.choice([1, 2, 4, 8])), place(8)
            number = int(rng.choice(NUMBERS)) if how == "number" else int(rng.integers(len(data) + 64))
            out[at : at + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, "little")
        elif how in ("zeros", "ones", "noise"):
            block = {"zeros": bytes(length), "ones": b"\xff" * length}.get(str(how)) or rng.bytes(length)
            out[at : at + length] = block
        elif how == "swap":
            out[at : at + length], out[other : other + length] = out[other : other + length], out[at : at + length]
        elif how == "repeat":
            out[at : at + length] = out[other : other + length]
        elif how == "cut":
            del out[at : None if rng.integers(2) else at + length]
        else:
            out[at:at] = rng.bytes(length)
    return bytes(out), str(how)


DTYPES = ["f8", "f2", ">f4", "i4", "u1", ">i8", "?", "c8", "S4", "V2", "V4", [("a", "f4")], ("f4", (2,))]


def changed_content(file: h5py.File, rng: np.random.Generator) -> str:
    """Change groups, arrays, attributes or links of a file by h5py; what was done."""
    groups: list[str] = ["/"]
    arrays: list[str] = []
    file.visititems(lambda name, item: (groups if isinstance(item, h5py.Group) else arrays).append(name))
    group, array = str(rng.choice(groups)), str(rng.choice(arrays))
    named = [name for name in groups if len(file[name].attrs)]
    holder = file[str(rng.choice(named))]
    attribute = str(rng.choice(list(holder.attrs)))
    how = str(
        rng.choice(
            ["attribute", "no attribute", "rename", "delete", "shape", "type", "soft", "hard", "external", "filter"]
        )
    )
    value = file[array][()]
    if how == "attribute":
        values: list[Any] = [1, "x", b"\xff", np.zeros(3), ["a", "b"], [b"a", b"b"], h5py.Empty("f4"), "a\nb", [], ""]
        old = holder.attrs[attribute]
        if isinstance(old, np.ndarray) and old.ndim == 1 and len(old):
            values += [old[::-1], old[:-1], [*old, old[0]], rng.permutation(old), old.reshape(1, -1), old[0]]
        del holder.attrs[attribute]
        holder.attrs[attribute] = values[int(rng.integers(len(values)))]
    elif how == "no attribute":
        del holder.attrs[attribute]
    elif how == "rename" and group != "/":
        file.move(group if rng.integers(2) else array, f"{group}_{rng.integers(3)}x{rng.choice(['', '/y', chr(10)])}")
    elif how == "delete":
        del file[array if group == "/" or rng.integers(2) else group]
    elif how == "shape":
        shape = [*value.shape]
        change = int(rng.integers(4))
        shape = [shape[::-1], [*shape, 1], [n + 1 for n in shape], [value.size]][change]
        del file[array]
        file[array] = np.resize(value, shape)
    elif how == "type":
        dtype = DTYPES[int(rng.integers(len(DTYPES)))]
        del file[array]
        file.create_dataset(array, value.shape, np.dtype(dtype))
    elif how == "soft":
        del file[array]
        file[array] = h5py.SoftLink(f"/{rng.choice(arrays)}")
    elif how == "hard":
        name = rng.choice(["layers", "vars", "model_weights", "9", "dense_3"])
        file[f"{group}/{name}"] = file[str(rng.choice(groups))]
    elif how == "external":
        del file[array]
        file[array] = h5py.ExternalLink("/etc/passwd", "/")
    elif value.ndim:
        del file[array]
        file.create_dataset(array, data=value, compression="gzip", shuffle=bool(rng.integers(2)))
    return how


def mutated(originals: dict[str, Path], cache: dict[str, Any], folder: Path, seed: int, i: int) -> dict[str, Any]:
    """Mutation number `i` of a run: the file, and what is known of it."""
    rng = np.random.default_rng([seed, i])
    layout = list(originals)[i % len(originals)]
    data, raw = cache[layout]
    path = folder / layout
    if rng.random() < 0.75:
        new, how = changed_bytes(data, raw, rng)
        same_length = len(new) == len(data)
        differ = np.frombuffer(new, np.uint8) != np.frombuffer(data, np.uint8) if same_length else np.ones(1, bool)
        known = {"only_values": bool(same_length and not (differ & ~raw).any()), "bytes": True}
        known["values"] = bool(same_length and (differ & raw).any())
        path.write_bytes(new)
    else:
        how = "refused by h5py"
        inner = io.BytesIO(cache["keras3.weights.h5"][0] if path.suffix == ".keras" else data)
        with h5py.File(inner, "r+") as file, contextlib.suppress(ValueError, OSError, KeyError, TypeError):
            how = changed_content(file, rng)
        if path.suffix == ".keras":
            rezipped(path, inner.getvalue(), layout == "deflated.keras")
        else:
            path.write_bytes(inner.getvalue())
        known = {"only_values": False, "bytes": False, "values": False}
    return {**known, "how": how, "layout": layout, "path": path}


def verdict(answer: dict[str, Any], case: dict[str, Any]) -> str:
    """The name of an outcome, "WRONG: ..." for one that must not be."""
    if "died" in answer:
        return f"DIED: {answer['died']}"
    if "error" in answer:
        wrong = complaint(answer, case["path"])
        return f"WRONG: {wrong}" if wrong else "refused"
    if not answer["whole"]:
        return "WRONG: not the network's tree"
    if answer["equal"]:
        return "equal"
    if case["only_values"] and case["path"].suffix != ".keras":
        return "other values, as changed"
    if case["bytes"] and case["path"].suffix == ".keras":
        return "WRONG: other values, in spite of the archive's checksum"
    # Metadata of HDF5 have no checksum in the format that Keras writes: an address may lead to other numbers.
    return "other values"


def run(originals: dict[str, Path], loader: Loader, folder: Path, seed: int, numbers: range) -> list[tuple[int, str]]:
    """Each mutation's outcome; the list of those that must not be has the number, for `mutated`."""
    cache = {name: (path.read_bytes(), raw_bytes(path.read_bytes())) for name, path in originals.items()}
    outcomes = []
    for i in numbers:
        case = mutated(originals, cache, folder, seed, i)
        answer = loader.load(case["path"])
        result = verdict(answer, case)
        if "files" in answer and answer["files"] > loader.first["files"]:
            result = "WRONG: a file was left open"
        outcomes.append((i, f"{case['layout']}, {case['how']}: {result}"))
    return outcomes


def test_mutated_files(originals, loader, tmp_path):
    assert_none_wrong(originals, loader, tmp_path, range(MUTATIONS))


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(PARTS))
def test_many_mutated_files(originals, loader, tmp_path, part):
    count = int(os.environ.get("FZOO_FUZZ", MANY_MUTATIONS))
    assert_none_wrong(originals, loader, tmp_path, range(part, count, PARTS))


def assert_none_wrong(originals: dict[str, Path], loader: Loader, folder: Path, numbers: range) -> None:
    outcomes = run(originals, loader, folder, int(os.environ.get("FZOO_FUZZ_SEED", 0)), numbers)
    for result, times in Counter(outcome.split(": ", 1)[1] for _, outcome in outcomes).items():
        print(f"{times:7} {result}")
    wrong = [f"{i}: {outcome}" for i, outcome in outcomes if "WRONG" in outcome or "DIED" in outcome]
    assert not wrong, "\n".join(wrong[:50])


if __name__ == "__main__":
    serve()
