"""Where the time of a network goes on this machine's CPU: each convolution, and what OpenVINO takes for it."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fzoo.bench.engines import OPENVINO, Missing, get, openvino_request
from fzoo.inference.export import export
from fzoo.inference.optimize import Tuned, tune_network
from fzoo.inference.tuning import TunedConvolution, in_words
from fzoo.layers.classifier import Classifier
from fzoo.types import DTypeLike, Variables

#: Calls of OpenVINO, of which the least time of each of its layers counts.
CALLS = 20


@dataclasses.dataclass(frozen=True)
class Explained:
    """What a distinct convolution of a network takes.

    Attributes:
        choice: its forms, with their times.
        seconds: of OpenVINO for a call of it, the mean of its layers; None where OpenVINO is not there, or has put the
            layer into another.
        kernel: what OpenVINO calls the way in which it computes the first of them; "" for None.
    """

    choice: TunedConvolution
    seconds: float | None
    kernel: str

    def cells(self) -> tuple[str, ...]:
        """Return a row of the table with `HEADERS`."""
        choice = self.choice
        theirs = ("-", "-", "-")
        if self.seconds is not None:
            gflops = choice.convolution.flops / self.seconds / 1e9
            theirs = f"{1e3 * self.seconds:.2f}", f"{gflops:.0f}", self.kernel
        ours = choice.seconds[choice.form]
        return (
            choice.layers_in_short,
            in_words(choice.convolution),
            choice.form,
            f"{1e3 * ours:.2f}",
            f"{choice.gflops(choice.form):.0f}",
            *theirs,
        )


HEADERS = ("layers", "convolution", "form", "ms", "GFLOP/s", "OpenVINO, ms", "GFLOP/s", "kernel")


def explain_model(
    module: Classifier,
    variables: Variables,
    images: Any,
    dtype: DTypeLike,
    progress: Callable[[str], None] = lambda line: None,
) -> tuple[Tuned, list[Explained]]:
    """Tune a network, and ask OpenVINO for the times of its layers, on as many images together.

    Args:
        module, variables, images, dtype, progress: as for `fzoo.tune`.

    Returns:
        (what was found, each distinct convolution).

    Raises:
        ValueError: as for `fzoo.tune`.
    """
    tuned = tune_network(module, variables, images, dtype, progress=progress)
    progress("OpenVINO")
    shape = (tuned.images, *images.shape[1:])
    theirs = time_openvino(module, variables, shape, OPENVINO[np.dtype(dtype).name])
    prepared, rows = tuned.network[0].prepared, []
    folded = dict(prepared.gone) if prepared else {}  # OpenVINO calls a convolution as the BN that it folds into it
    for choice in tuned.tuning.convolutions:
        names = [folded.get(layer, layer) for layer in choice.layers]
        known = [theirs[name] for name in names if name in theirs]
        seconds = sum(time.seconds for time in known) / len(known) if known else None
        rows.append(Explained(choice, seconds, known[0].kernel if known else ""))
    return tuned, rows


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """What OpenVINO says of one of its layers."""

    seconds: float
    kernel: str


def time_openvino(
    module: Classifier, variables: Variables, shape: tuple[int, ...], precision: str
) -> dict[str, LayerTime]:
    """Return what OpenVINO takes for each layer of a network with a kernel.

    Nothing where it is not installed, or computes in no such precision on this processor.

    Args:
        module, variables: the network.
        shape: of its images.
        precision: "f32" or "bf16".
    """
    try:
        with warnings.catch_warnings():  # it starts a process, which computes nothing
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            get("openvino")
        get("onnx")
    except ModuleNotFoundError:
        return {}
    with tempfile.TemporaryDirectory(prefix="fzoo-explain-") as folder:
        path = Path(folder, "network.onnx")
        export(module, variables, path, batch_size=shape[0])
        try:
            request = openvino_request(str(path), shape, precision, PERF_COUNT=True)
        except Missing:
            return {}
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    fastest: dict[str, LayerTime] = {}
    for _ in range(CALLS):
        request.infer([images])
        for layer, time in layer_times(request.profiling_info):
            if layer not in fastest or time.seconds < fastest[layer].seconds:
                fastest[layer] = time
    return fastest


def layer_times(nodes: Iterable[Any]) -> Iterable[tuple[str, LayerTime]]:
    """Yield (Keras layer, time) of those nodes of OpenVINO's that are convolutions or products and took any time."""
    for node in nodes:
        seconds = node.real_time.total_seconds()
        if seconds and node.node_type in ("Convolution", "GroupConvolution", "FullyConnected", "MatMul"):
            parts = node.node_name.split(":")[-1].split("/")
            yield "/".join(parts[:-1]), LayerTime(seconds, node.exec_type)
