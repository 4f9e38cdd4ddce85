"""What a batch job costs beside `predict`: images a second, and memory for few and for many images.

    python benchmarks/jobs.py --weights mobilenet_v2.h5

The speed is that of `run_job` on files of uncompressed pixels at the network's size, so that decoding is not the limit,
over that of `predict` on the same pixels as one array of uint8, with the same batches; the two take turns, in one
process, and the medians count. Both are compiled before. The memory is the peak of a process of its own for each
number of images, PNG of 64 x 48 pixels, from the start of Python to the end of the job.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import fzoo
from fzoo.bench.worker import memory


def make_images(folder: Path, count: int, shape: tuple[int, int, int], ending: str) -> None:
    """Make images of noise, so that no two files are the same and none is compressed well."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(folder / f"{i:06}{ending}")


def speed(name: str, weights: str | None, count: int, turns: int, folder: Path) -> None:
    """Print images a second of both."""
    module, variables = fzoo.load(name, weights=weights)
    labels = [("-", str(i)) for i in range(1000)]
    make_images(folder / "large", count, module.example_shape, ".bmp")
    pixels = np.stack([fzoo.load_image(path) for path in sorted((folder / "large").iterdir())])
    speeds: dict[str, list[float]] = {"predict": [], "job": []}
    report = None
    for turn in range(turns + 1):  # the first compiles
        start = time.perf_counter()
        np.asarray(fzoo.predict(module, variables, pixels, preprocess=name))
        middle = time.perf_counter()
        report = fzoo.run_job(module, variables, [folder / "large"], folder / "x.jsonl", labels=labels, preprocess=name)
        end = time.perf_counter()
        if turn:
            speeds["predict"].append(count / (middle - start))
            speeds["job"].append(count / (end - middle))
    medians = {what: statistics.median(found) for what, found in speeds.items()}
    print(f"{name}, {count} images: predict {medians['predict']:.1f} images/s, job {medians['job']:.1f} images/s, "
          f"{medians['job'] / medians['predict']:.3f} of it (from call to return)\n  {report}", flush=True)  # fmt: skip


def peak(name: str, weights: str | None, folder: Path) -> None:
    """Run the process for one number of images: it prints its peak in MiB."""
    module, variables = fzoo.load(name, weights=weights)
    labels = [("-", str(i)) for i in range(1000)]
    report = fzoo.run_job(module, variables, [folder], f"{folder}.jsonl", labels=labels, preprocess=name)
    print(json.dumps({"peak": memory()["peak_mib"], "report": str(report)}))


def main() -> None:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="MobileNetV2")
    parser.add_argument("--weights", help="a Keras file; random weights if left out")
    parser.add_argument("--images", type=int, default=1024, help="of the speed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="*", default=[200, 5000], help="of images, for the memory")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.model, options.weights, options.peak)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        speed(options.model, options.weights, options.images, options.turns, folder)
        for count in options.counts:
            make_images(folder / str(count), count, (48, 64, 3), ".png")
            command = [sys.executable, __file__, "--model", options.model, "--peak", str(folder / str(count))]
            command += ["--weights", options.weights] if options.weights else []
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{options.model}, {count} images: peak {found['peak']:.0f} MiB\n  {found['report']}", flush=True)


if __name__ == "__main__":
    main()
