"""The configuration that Keras keeps with a whole model: which layers it has, and how they are connected."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py

from fzoo.files import one_line
from fzoo.types import Json
from fzoo.weights.files import check_heaps, member
from fzoo.weights.foreign import describe_foreign

#: Bytes of a configuration; the largest of Keras's own has 1 MB.
MAX_CONFIG = 64 << 20


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What a file says of its model.

    Attributes:
        model: {"class_name": ..., "config": ...}, as Keras wrote it.
        version: Keras's, as (major, minor); (0, 0) where the file does not say.
    """

    model: Mapping[str, Json]
    version: tuple[int, int]


def read_configuration(path: str | os.PathLike) -> Configuration | None:
    """Read the configuration of the model in a file; None where the file has weights alone.

    Args:
        path: a legacy `.h5` of a whole model, a `.keras` archive, or a `.weights.h5` with a `config.json` beside it.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no file at `path`.
        ValueError: the file is damaged, or its configuration is.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a directory, {describe_foreign(path) or 'a Keras file (.h5, .keras) expected'}"
        )
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a Keras file: it is a device or a pipe")
    try:
        texts = texts_of_h5(path) if h5py.is_hdf5(path) else texts_of_archive(path)
        if texts is None:
            return None
        text, version = texts
        if len(text) > MAX_CONFIG:
            raise ValueError(f"its configuration has more than {MAX_CONFIG >> 20} MiB")
        model = json.loads(text)
    # h5py reports damage as any of these; the configuration may be nested deeper than Python goes.
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, RecursionError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path} has no configuration of a model that can be read: {one_line(e)}") from e
    if not isinstance(model, dict) or not isinstance(model.get("class_name"), str) or "config" not in model:
        raise ValueError(f"{path} has a configuration that is not that of a model")
    return Configuration(model, version_of(version))


def version_of(text: str) -> tuple[int, int]:
    """Parse (major, minor) of a version such as "2.4.0" or "2.3.0-tf"."""
    parts = [part for part in text.split(".")[:2] if part.isdigit()]
    return (int(parts[0]), int(parts[1])) if len(parts) == 2 else (0, 0)


def texts_of_h5(path: Path) -> tuple[str, str] | None:
    """Read the configuration in an h5 file, or in the `config.json` beside it, and Keras's version."""
    with h5py.File(path, "r") as file:
        if "model_config" in file.attrs:
            check_heaps(path, *file.id.get_create_plist().get_sizes())
            return text_attribute(file, "model_config"), text_attribute(file, "keras_version")
    beside = path.with_name("config.json")
    if not beside.is_file() or beside.stat().st_size > MAX_CONFIG:
        return None
    metadata = path.with_name("metadata.json")
    return beside.read_text(encoding="utf-8"), version_in(metadata.read_text("utf-8") if metadata.is_file() else "{}")


def text_attribute(file: h5py.File, name: str) -> str:
    """Read an attribute that is one text; "" where there is none."""
    if name not in file.attrs:
        return ""
    kept = file.attrs.get_id(name)  # not read yet: it may claim any shape and type
    if kept.shape != () or h5py.check_string_dtype(kept.dtype) is None:
        raise ValueError(f"{name} is not text")
    value: Any = file.attrs[name]
    return value.decode() if isinstance(value, bytes) else str(value)


def texts_of_archive(path: Path) -> tuple[str, str] | None:
    """Read the configuration in a `.keras` archive, and Keras's version."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"it is {describe_foreign(path) or 'neither an HDF5 file nor a .keras archive'}")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "config.json" not in names:
            foreign = None if "model.weights.h5" in names else describe_foreign(path)
            if foreign is not None:
                raise ValueError(f"it is {foreign}")
            return None
        read_member = functools.partial(member, archive)
        metadata = read_member("metadata.json").getvalue().decode() if "metadata.json" in names else "{}"
        return read_member("config.json").getvalue().decode(), version_in(metadata)


def version_in(metadata: str) -> str:
    """Read Keras's version from the text of a `metadata.json`."""
    fields = json.loads(metadata)
    return str(fields.get("keras_version", "")) if isinstance(fields, dict) else ""
