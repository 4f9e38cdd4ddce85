"""What a file is that is none of Keras's, by its first bytes, and what would do."""

from __future__ import annotations

import zipfile
from pathlib import Path

#: What would do for a model of TensorFlow's.
FROM_TENSORFLOW = 'open it in TensorFlow, and save it as Keras does: model.save("model.keras")'

#: What would do for weights of PyTorch's.
FROM_PYTORCH = (
    "its network is code, which is not in it: the state dict of a model with a tag (`fzoo list '*.*'`) is loaded by "
    "that model's name, from a file whose own ends in .pth"
)

#: How a file begins: the number of bytes before, the bytes, its kind, and the way out.
BEGINNINGS: tuple[tuple[int, bytes, str, str], ...] = (
    (
        4,
        b"TFL3",
        "a TensorFlow Lite model",
        "its weights are no longer Keras's; give the Keras file that it was made from (of Teachable Machine: Export, "
        "Tensorflow, Keras)",
    ),
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "`git lfs pull` fetches it, or download the file itself",
    ),
    (0, b"\x80\x02", "a Python pickle", FROM_PYTORCH),
    (0, b"\x80\x03", "a Python pickle", f"pickles run code, and are not read; {FROM_PYTORCH}"),
    (0, b"\x80\x04", "a Python pickle", f"pickles run code, and are not read; {FROM_PYTORCH}"),
    (0, b"\x1f\x8b", "compressed by gzip", "unpack it: gunzip"),
    (0, b"Rar!", "a RAR archive", "unpack it, and give the Keras file inside"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it, and give the Keras file inside"),
    (0, b"\x93NUMPY", "an array of NumPy", "a Keras file has all arrays of a network: model.save"),
    (0, b"%PDF", "a PDF", "give a Keras file"),
)

#: How much of a file is looked at: more than the head of a web page, and than what comes before the graph in ONNX.
HEAD = 4096


def describe_foreign(path: Path) -> str | None:
    """Say what a file or folder is that Keras did not write, and what would do; None where that is not known.

    Args:
        path: of something that is there.
    """
    if path.is_dir():
        return describe_folder(path)
    with open(path, "rb") as file:
        head = file.read(HEAD)
    for start, beginning, kind, way in BEGINNINGS:
        if head[start : start + len(beginning)] == beginning:
            return f"{kind}: {way}"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:1] == b"<" and (b"<html" in text.lower() or b"<!doctype" in text.lower()):
        return "a web page: the link leads to a page about the file; download the file itself (of GitHub: Raw)"
    if text[:1] == b"{":
        return describe_json(path, head)
    if is_onnx(path, head):
        return "an ONNX model: Keras does not read it; give the Keras file that it was made from"
    if zipfile.is_zipfile(path):
        return describe_archive(path)
    return None


def describe_folder(path: Path) -> str | None:
    """Say what a folder is."""
    if (path / "saved_model.pb").is_file():
        return f"TensorFlow's SavedModel: {FROM_TENSORFLOW}"
    if (path / "model.json").is_file():
        return describe_json(path / "model.json", b"weightsManifest")
    return None


def describe_json(path: Path, head: bytes) -> str | None:
    """Say what a file of JSON is."""
    beside = ["model.weights.bin", "weights.bin", "group1-shard1of1.bin"]
    if b"modelTopology" in head or b"weightsManifest" in head or any((path.parent / n).exists() for n in beside):
        return (
            "a TensorFlow.js model: `tensorflowjs_converter --input_format tfjs_layers_model --output_format keras "
            "model.json model.h5` makes a Keras file of it (of Teachable Machine: Export, Tensorflow, Keras)"
        )
    if b'"class_name"' in head:
        return "a model's configuration without its weights: give the file that model.save writes"
    return None


def is_onnx(path: Path, head: bytes) -> bool:
    """Tell whether a file is an ONNX model: a protocol buffer that begins with a small version, by name or producer."""
    return head[:1] == b"\x08" and (path.suffix == ".onnx" or b"onnx" in head or b"pytorch" in head)


def names_in_zip(path: Path) -> list[str]:
    """List what a zip holds, by name; nothing of a damaged one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return []


def describe_archive(path: Path) -> str | None:
    """Say what a zip is that is no `.keras` archive."""
    names = names_in_zip(path)
    last = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in last:
        return f"a PyTorch file: {FROM_PYTORCH}"
    if last & {"model.json", "model_unquant.tflite", "model.tflite"}:
        kind = "TensorFlow.js" if "model.json" in last else "TensorFlow Lite"
        return f"a zip of {kind}'s: of Teachable Machine choose Export, Tensorflow, Keras"
    if "saved_model.pb" in last:
        return f"a zip of TensorFlow's SavedModel: {FROM_TENSORFLOW}"
    if any(name.endswith(".npy") for name in last):
        return "an archive of NumPy's arrays: a Keras file is wanted, model.save writes one"
    if "keras_model.h5" in last:
        return "Teachable Machine's zip, which the command line takes as --weights: unpack it, and give keras_model.h5"
    inside = sorted(name for name in names if name.endswith((".h5", ".hdf5", ".keras")))
    if inside:
        return f"a zip that holds {inside[0]:.80}: unpack it, and give that" if inside[0].isprintable() else None
    return None
