"""What a folder of labelled images is: classes, or parts to train on, to validate on and to test on."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from fzoo.images.files import ends_like_image, is_hidden
from fzoo.images.recipe import Recipe
from fzoo.training.data import Arrays, Broken, Files, class_folders, read_folder, with_classes

#: Names of the parts of a data set.
PARTS = {
    "train": ("train", "training", "trn"),
    "validation": ("val", "valid", "validation", "dev", "holdout", "heldout"),
    "test": ("test", "testing", "tst"),
}


#: What stands beside these in names of folders (seg_train, training_set, test-images), and classes may be called.
BESIDE = ("data", "dataset", "folder", "image", "images", "img", "imgs", "photos", "pics", "seg", "set", "split")
CLASSES_TOO = ("train", "valid")


def part_of(name: str, alone: bool = True) -> str | None:
    """Tell which part of a data set a folder's name says: "train", "validation", "test", or None.

    Args:
        name: any case, with numbers ("train2017") and with what is usual beside it ("seg_train", "TestSet").
        alone: nothing else may stand in the name.
    """
    words = [
        next((w.removesuffix(end) for end in ("set", "data") if w.removesuffix(end) in KNOWN), w)
        for w in re.findall(r"[^\W\d_]+", name.lower())
    ]
    parts = {KNOWN[word] for word in words if word in KNOWN}
    strange = [word for word in words if word not in KNOWN and word not in BESIDE]
    return parts.pop() if len(parts) == 1 and not (alone and strange) else None


KNOWN = {word: part for part, words in PARTS.items() for word in words}


class Parts(NamedTuple):
    """Folders of the parts of a data set, each with a folder for each class; `others` beside them are not used."""

    train: Path
    validation: Path | None = None
    test: Path | None = None
    others: tuple[Path, ...] = ()


def find_parts(folder: Path) -> Parts:
    """Tell the parts of a data set by the names of its folders; what is no part, but classes, is all to train on.

    A folder that holds nothing but one folder with folders is that one: what was unpacked into a folder of its name.

    Raises:
        ValueError: names that could be parts as well as classes, or no part to train on.
    """
    folder = innermost(folder)
    inside = class_folders(folder)
    parts = {path: part for path in inside if (part := part_of(path.name))}
    loose = {path: part for path in inside if (part := part_of(path.name, alone=False))}
    if len(loose) == len(inside) and len(set(loose.values())) > 1:
        parts = loose
    others = tuple(path for path in inside if path not in parts)
    if len(set(parts.values())) < 2 and others:
        # One such name among classes may be a class: trains beside cars. With folders inside, it may be both.
        odd = [path for path in parts if class_folders(path) or path.name.lower() not in CLASSES_TOO]
        pictures = [path for path in others if holds_images(path)]
        parts = {path: part for path, part in parts.items() if path in odd}
        if parts and (pictures or "train" not in parts.values()):
            raise ValueError(
                f"{folder} holds {shown(parts)}, a part of a data set by its name, beside {shown(others)}: "
                "train/ and val/ with a folder for each class in both expected, or these folders alone"
            )
    if not parts:
        return Parts(folder)
    by_part: dict[str, list[Path]] = {part: [path for path, p in parts.items() if p == part] for part in PARTS}
    for part, paths in by_part.items():
        if len(paths) > 1:
            raise ValueError(
                f"{folder} holds {shown(paths)}, which are all to {VERBS[part]} by their names: one expected"
            )
    if not by_part["train"]:
        raise ValueError(
            f"{folder} holds {shown(parts)} and nothing to train on: train/ with a folder for each class expected"
        )
    train, validation, test = (innermost(paths[0]) if paths else None for paths in by_part.values())
    assert train is not None
    return Parts(train, validation, test, others)


VERBS = {"train": "train on", "validation": "validate on", "test": "test on"}


def innermost(folder: Path) -> Path:
    """Go down where a folder holds nothing but one folder, which holds folders."""
    for _ in range(8):
        inside = class_folders(folder)
        if len(inside) != 1 or part_of(inside[0].name) not in (None, part_of(folder.name)):
            break
        if not class_folders(inside[0]) or holds_images(folder):
            break
        folder = inside[0]
    return folder


def holds_images(folder: Path) -> bool:
    """Tell whether there are images in a folder itself."""
    return any(ends_like_image(path.name) and not is_hidden(path.name) for path in folder.iterdir())


def shown(paths: Sequence[Path] | dict[Path, str]) -> str:
    """Write names of folders, for a line."""
    names = [f"{path.name}/" for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def train_and_validation(
    folder: str | os.PathLike,
    recipe: Recipe,
    broken: Broken,
    share: float | None,
    seed: int,
    report: Callable[[str], None],
) -> tuple[Files, Files | None]:
    """Read a data set's two parts: its folders train/ and val/, or a split of its class folders by seed.

    Args:
        folder: holds train/ (and val/), under these or like names, or a folder for each class.
        share: of each class that is held out, where there is no val/; 0 for none; None where the user has others.
        seed: of that split.
        report: takes a line for what is not used.

    Raises:
        ValueError: the two have other classes, or see `read_folder` and `find_parts`.
    """
    folder = Path(folder)
    parts = find_parts(folder) if folder.is_dir() else Parts(folder)
    whole = read_folder(parts.train, recipe, broken)
    unused = list(parts.others)
    if share is None and parts.validation is not None:
        unused.insert(0, parts.validation)
    if unused:
        report(f"not used: {shown(unused)} of {folder}")
    if parts.test is not None:
        report(f"{parts.test} is left for `fzoo evaluate`")
    if share is None:
        return whole, None
    if parts.validation is not None:
        held_out = read_folder(parts.validation, recipe, broken)
        odd = sorted(set(held_out.class_names) ^ set(whole.class_names))
        if odd:
            raise ValueError(f"{parts.train} and {parts.validation} have different classes: {', '.join(odd[:5])}")
        return whole, with_classes(held_out, whole.class_names)
    return hold_out(whole, share, seed)


Indexed = TypeVar("Indexed", Files, Arrays)


def hold_out(whole: Indexed, share: float, seed: int) -> tuple[Indexed, Indexed | None]:
    """Hold out a share of each class as a set of its own, chosen by seed.

    Raises:
        ValueError: a class has one image, or the share leaves none to train on.
    """
    if not share:
        return whole, None
    rng, held = np.random.default_rng(seed), []
    for label, name in enumerate(whole.class_names):
        indices = np.flatnonzero(whole.labels == label)
        if len(indices) < 2:
            count = f"{len(indices)} image{'' if len(indices) == 1 else 's'}"
            raise ValueError(f"class {name} has {count}: none can be held out (validation_split=0: none is)")
        chosen = max(1, round(share * len(indices)))
        if chosen == len(indices):
            raise ValueError(f"validation_split={share} of the {chosen} images of class {name} leaves none to train on")
        held += rng.permutation(indices)[:chosen].tolist()
    rest = sorted(set(range(len(whole.labels))) - set(held))
    return whole.subset(rest), whole.subset(sorted(held))


def report_data(train: Files | Arrays, held_out: Files | Arrays | None, report: Callable[[str], None]) -> None:
    """Say what was found: the classes and how many images each has, what is held out, and what is in both parts."""
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    pairs = [f"{name} {count:,}" for name, count in zip(train.class_names, counts, strict=True)]
    if len(pairs) > 10:
        least, most = int(counts.argmin()), int(counts.argmax())
        pairs = [f"the fewest {pairs[least]}", f"the most {pairs[most]}"]
    held = "none held out" if held_out is None else f"{len(held_out.labels):,} held out"
    total, classes = len(train.labels), len(train.class_names)
    report(f"{total:,} images of {classes} classes to train on ({', '.join(pairs)}), {held}")
    if held_out is not None and (copies := duplicates(train, held_out)):
        example = "" if copies[0] is None else f", e.g. {copies[0][1]} is {copies[0][0]}"
        report(f"{len(copies):,} of the images held out are among those to train on, byte for byte{example}")


def duplicates(train: Files | Arrays, held_out: Files | Arrays) -> list[tuple[Path, Path] | None]:
    """Find the images held out whose bytes an image to train on has, too: (that one, this one) of files."""
    if isinstance(train, Files) and isinstance(held_out, Files):
        sizes = [Counter(map(file_size, files.paths)) for files in (train, held_out)]
        both = sizes[0].keys() & sizes[1].keys() - {None}  # files of other sizes need not be read
        known = {digest(p): p for p in train.paths if file_size(p) in both}
        return [(known[d], p) for p in held_out.paths if file_size(p) in both and (d := digest(p)) in known]
    if isinstance(train, Arrays) and isinstance(held_out, Arrays) and train.images.dtype == held_out.images.dtype:
        seen = {hashlib.sha256(image.tobytes()).digest() for image in train.images}
        return [None for image in held_out.images if hashlib.sha256(image.tobytes()).digest() in seen]
    return []


def file_size(path: Path) -> int | None:
    """Return the bytes of a file; None for what can't be asked, which is reported where it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def digest(path: Path) -> bytes | Path:
    """Return the hash of a file's bytes; the path where they can't be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return path
