"""What fine-tuning gives: the head alone, the two phases, and random weights, with equal budgets.

    python benchmarks/finetune.py photographs --weights mobilenet_v2.h5
    python benchmarks/finetune.py digits --batch-size 8 --weights mobilenet_v2.h5

Photographs: those that scikit-learn and scikit-image bundle are the classes; their images are random square parts,
turned, mirrored and of changed light, for training from the upper half of each photograph, for testing from the lower.
Digits: scikit-learn's, those that `fzoo demo` trains on and holds out. Needs both libraries, and Keras's weights of
MobileNetV2 (downloaded if left out). Images are 96 x 96.

A network of random weights is tested twice: as it is, and with BN's statistics of the test images, in shuffled
batches. Its own lag behind after so few steps (Keras's momentum here is 0.999), so the second figure is the fair one.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageEnhance

import fzoo
from fzoo import Phase
from fzoo.apps.demo import load_digits
from fzoo.training.results import Finetuned

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field", "immunohistochemistry", "retina")
TEXTURES = ("brick", "grass", "gravel")


def photographs() -> dict[str, Image.Image]:
    """Return the photographs by name, RGB."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    found = {name: Image.fromarray(getattr(data, name)()).convert("RGB") for name in PHOTOGRAPHS + TEXTURES}
    bundle = load_sample_images()
    for path, image in zip(bundle.filenames, bundle.images, strict=True):
        found[Path(path).stem] = Image.fromarray(image)
    return found


def part(image: Image.Image, rng: np.random.Generator, side: int) -> Image.Image:
    """Draw a random part of a photograph, enlarged or reduced, turned, mirrored, brighter or darker."""
    length = int(rng.uniform(0.25, 0.9) * min(image.size))
    left, top = (int(rng.integers(0, n - length + 1)) for n in image.size)
    piece = image.crop((left, top, left + length, top + length)).rotate(90 * int(rng.integers(4)))
    piece = piece.resize((side, side), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        piece = piece.convert("L").convert("RGB")  # colour alone must not tell
    return ImageEnhance.Brightness(piece).enhance(rng.uniform(0.5, 1.5))


def make_digits(folder: Path, train: int, test: int, side: int = 96) -> None:
    """Write the data set: train/ and val/, a folder for each digit."""
    digits = load_digits()
    for split, count, images, labels in (
        ("train", train, digits.train_images, digits.train_labels),
        ("val", test, digits.test_images, digits.test_labels),
    ):
        for digit in range(10):
            (folder / split / str(digit)).mkdir(parents=True)
            for i, image in enumerate(images[labels == digit][:count]):
                large = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
                large.save(folder / split / str(digit) / f"{i:03d}.png")


def make_photographs(folder: Path, train: int, test: int, side: int = 96, seed: int = 0) -> None:
    """Write the data set: train/ and val/, a folder for each photograph."""
    rng = np.random.default_rng(seed)
    for name, image in photographs().items():
        half = image.height // 2
        for split, count, box in (
            ("train", train, (0, 0, image.width, half)),
            ("val", test, (0, half, image.width, image.height)),
        ):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                part(image.crop(box), rng, side).save(folder / split / name / f"{i:03d}.png")


def in_training_mode(found: Finetuned, folder: Path) -> float:
    """Measure the accuracy on val/ with each batch's own statistics."""
    paths = sorted(folder.glob("val/*/*.png"))
    pixels = np.stack([fzoo.load_image(path) for path in paths])
    labels = np.array([found.class_names.index(path.parent.name) for path in paths])
    images, right = fzoo.preprocess_input(pixels, "MobileNetV2"), 0
    apply = jax.jit(lambda x: found.module.apply(found.variables, x, train=True, mutable=["batch_stats"])[0])
    for chosen in np.array_split(np.random.default_rng(0).permutation(len(labels)), max(1, len(labels) // 48)):
        right += int((np.asarray(apply(images[chosen])).argmax(1) == labels[chosen]).sum())
    return right / len(labels)


def main() -> None:
    """Print a line for each way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=("photographs", "digits"))
    parser.add_argument("--weights", default="imagenet")
    parser.add_argument("--train", type=int, default=12)
    parser.add_argument("--test", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="*", help="names of the rows; all if left out")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    epochs = arguments.epochs
    head = (Phase(epochs, trains="head", learning_rate=3e-3),)
    second: dict[str, Any] = {
        "photographs": {"trains": "top", "learning_rate": 3e-4},
        # Further from ImageNet's: more of the network adapts, more slowly.
        "digits": {"from_layer": "block_6_expand", "learning_rate": 1e-4},
    }
    two = (
        Phase(epochs // 2, trains="head", learning_rate=3e-3),
        Phase(epochs - epochs // 2, schedule="cosine", **second[arguments.data]),
    )
    everything = (Phase(epochs, trains="all", learning_rate=1e-3, batch_statistics=True),)
    ways: dict[str, dict[str, Any]] = {
        "head alone": {"phases": head},
        "head, no features kept": {"phases": head, "cache_features": False},
        "head, then top": {"phases": two},
        "random weights": {"phases": everything, "weights": None},
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make = {"photographs": make_photographs, "digits": make_digits}[arguments.data]
        make(Path(folder), arguments.train, arguments.test)
        for name in arguments.ways or ways:
            for seed in range(arguments.seeds):
                start = time.perf_counter()
                options = {"weights": arguments.weights, "size": 96, "crop": None, "seed": seed, **ways[name]}
                found = fzoo.finetune(folder, "MobileNetV2", batch_size=arguments.batch_size, **options)
                assert found.evaluation is not None
                row = {"way": name, "seed": seed, "top1": found.evaluation.top1}
                row["seconds"] = round(time.perf_counter() - start, 1)
                if options["weights"] is None:
                    row["top1_batch_statistics"] = in_training_mode(found, Path(folder))
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
