"""Where the time goes: a network's stages in fzoo, beside OpenVINO's own profile of the same network.

    python benchmarks/layers.py MobileNetV2 --batch 1

A stage ends with the last layer of a size that all that follows depends on. fzoo's time for one is the difference of
two programs, up to its end and up to the one before; OpenVINO's is the sum of its layers' times, each filed under the
last layer of Keras's in its name. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

import fzoo
from fzoo.bench import engines
from fzoo.bench.runner import Worker, environment
from fzoo.inference.batches import compiled, taps
from fzoo.layers.classifier import Classifier
from fzoo.layers.graph import trace
from fzoo.layers.record import Node

TURNS = 30
LEAST = 0.04  # of all FLOPs, for a stage of its own


def stages(module: Classifier) -> list[tuple[str, list[Node]]]:
    """Return (the layer that ends it, its layers) of each stage."""
    nodes, left = trace(module).nodes, set(fzoo.layer_names(module))
    place = {node.name: i for i, node in enumerate(nodes)}
    reach = 0  # how far the layers so far are read
    last_reader = {parent: place[node.name] for node in nodes for parent in node.inputs}
    cuts: dict[tuple[int, ...], int] = {}
    for i, node in enumerate(nodes):
        if reach <= i and node.name in left and len(node.shape) == 3 and "pad" not in node.name:
            cuts[node.shape[:2]] = i
        reach = max(reach, last_reader.get(node.name, i))
    ends = sorted(cuts.values())[1:] or [len(nodes) - 1]
    starts = [0, *(end + 1 for end in ends[:-1])]
    least = LEAST * sum(node.flops for node in nodes)
    found: list[tuple[str, list[Node]]] = []
    for start, end in zip(starts, ends, strict=True):
        part = list(nodes[start : end + 1])
        # What is too small to be seen in a difference of times goes with its neighbour.
        if found and min(sum(node.flops for node in each) for each in (found[-1][1], part)) < least:
            part = found.pop()[1] + part
        found.append((nodes[end].name, part))
    return found


def fzoo_times(module: Classifier, variables: Any, images: np.ndarray, ends: list[str]) -> list[float]:
    """Measure the seconds of each stage."""
    call = compiled(taps, "cpu", np.dtype(np.float32))
    on_device = jax.device_put(images)
    best = [float("inf")] * len(ends)
    for turn in range(TURNS + 1):
        for i, end in enumerate(ends):
            start = time.perf_counter()
            jax.block_until_ready(call((module, (end,)), None, variables, on_device))
            if turn:
                best[i] = min(best[i], time.perf_counter() - start)
    return [best[0], *(later - before for before, later in itertools.pairwise(best))]


def openvino_times(path: str, images: np.ndarray, stage_of: dict[str, int], count: int) -> list[float]:
    """Measure the seconds of each stage, in the run whose sum is the least; the classifier is left out."""
    openvino: Any = engines.get("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(images.shape))
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    best: list[float] = [float("inf")]
    names = sorted(stage_of, key=len)
    for _ in range(TURNS + 1):
        request.infer([images], share_inputs=True)
        times = defaultdict(float)
        stage = 0
        for node in request.profiling_info:  # in the order of execution
            parts = set(re.split(r"[/:]", node.node_name))
            found = [stage_of[name] for name in names if any(part.startswith(name) for part in parts)]
            stage = found[-1] if found else stage
            times[stage] += node.real_time.total_seconds()
        if sum(times.values()) < sum(best):
            best = [times[i] for i in range(count)]
    return best


def convert(name: str, batch: int, size: int, path: str) -> None:
    """Write the Keras network as ONNX, in a process of its own: TensorFlow keeps its share of the cores."""
    job = engines.Job("convert", name, batch, "inference", "float32", size, path=path)
    Worker(job, environment("convert", Path(path).parent)).stop()


def main() -> None:
    """Print a table of the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    fzoo.reuse_memory()
    plain, variables = fzoo.load(arguments.model, weights=None)
    module, prepared = fzoo.optimize_for_inference(plain, variables)
    size = module.example_shape[0]
    images = np.random.default_rng(0).random((arguments.batch, size, size, 3), np.float32)
    found = stages(module)
    ours = fzoo_times(module, prepared, images, [end for end, _ in found])
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "network.onnx"))
        convert(arguments.model, arguments.batch, size, path)
        stage_of = {node.name: len(found) for node in trace(plain).nodes}
        stage_of |= {node.name: i for i, (_, nodes) in enumerate(found) for node in nodes}
        theirs = openvino_times(path, images, stage_of, len(found))
    print("| stage, up to | output | MFLOP an image | fzoo, ms | GFLOP/s | OpenVINO, ms | GFLOP/s |\n|-|-|-|-|-|-|-|")
    for (end, nodes), a, b in zip(found, ours, theirs, strict=True):
        flops = sum(node.flops for node in nodes)
        rate = [f"{1e3 * t:.2f} | {flops * arguments.batch / t / 1e9:.0f}" for t in (a, max(b, 1e-9))]
        print(f"| {end} | {' x '.join(map(str, nodes[-1].shape))} | {flops / 1e6:.0f} | {' | '.join(rate)} |")


if __name__ == "__main__":
    main()
