"""Images a second of fzoo's `predict`, beside Keras on JAX, in one run.

    python benchmarks/inference.py --out benchmarks/inference.json
    python benchmarks/inference.py --table benchmarks/inference.json

Both get the same images, float32, already preprocessed, at the model's default size. Calls alternate, so that whatever
else the machine does falls on both; the median counts. The first call, which compiles, is timed by itself.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"

import jax
import keras
import numpy as np

import fzoo


def timed(call: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def measure(name: str, batch: int, seconds: float) -> dict[str, object]:
    """Both engines on one model and batch size."""
    size = fzoo.spec(name).input_size
    images = np.random.default_rng(0).normal(size=(batch, size, size, 3)).astype(np.float32)
    module, variables = fzoo.load(name, weights=None)
    keras.utils.clear_session()
    model = getattr(keras.applications, name)(weights=None)
    calls = {
        "fzoo": lambda: fzoo.predict(module, variables, images, batch_size=batch),
        "keras": lambda: model.predict_on_batch(images),
    }
    first = {engine: timed(call) for engine, call in calls.items()}
    times: dict[str, list[float]] = {engine: [] for engine in calls}
    start = time.perf_counter()
    while len(times["keras"]) < 2 or time.perf_counter() - start < seconds:
        for engine, call in calls.items():
            times[engine].append(timed(call))
    speed = {engine: batch / statistics.median(t) for engine, t in times.items()}
    return {
        "model": name,
        "batch": batch,
        "calls": len(times["keras"]),
        **{f"{engine} images/s": round(value, 2) for engine, value in speed.items()},
        "ratio": round(speed["fzoo"] / speed["keras"], 2),
        **{f"{engine} first call s": round(value, 1) for engine, value in first.items()},
    }


def machine() -> dict[str, object]:
    """What it ran on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "device": str(jax.devices()[0]),
        "versions": {m.__name__: m.__version__ for m in (fzoo, jax, keras, np)},
    }


def table(path: Path) -> str:
    """The file of a run as a Markdown table."""
    found = json.loads(path.read_text())
    lines = ["| model | batch | fzoo, images/s | Keras on JAX, images/s | ratio | first call, s: fzoo / Keras |"]
    lines.append("|-|-|-|-|-|-|")
    for row in found["rows"]:
        first = f"{row['fzoo first call s']} / {row['keras first call s']}"
        speeds = f"{row['fzoo images/s']} | {row['keras images/s']}"
        lines.append(f"| {row['model']} | {row['batch']} | {speeds} | {row['ratio']} | {first} |")
    about = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "\n".join([*lines, "", f"{about['date']}, {about['processor']}, {about['cores']} cores; {versions}."])


def main() -> None:
    """Measure, print a line each, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=fzoo.list_models())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=8, help="for each model and batch size, both engines together")
    parser.add_argument(
        "--out", type=Path, help="the JSON file to write; what it holds of other models and batches stays"
    )
    parser.add_argument("--table", type=Path, help="print such a file as a table instead of measuring")
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    before = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    rows = []
    for name in options.models:
        for batch in options.batch:
            rows.append(measure(name, batch, options.seconds))
            print(json.dumps(rows[-1]), flush=True)
            gc.collect()
            if options.out:
                measured = {(row["model"], row["batch"]): row for row in [*before, *rows]}
                found = {"machine": machine(), "rows": [measured[key] for key in sorted(measured)]}
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
