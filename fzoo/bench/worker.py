"""The process of one engine: it loads a model, and runs it whenever the parent says so.

The parent runs this file by its path: as a part of fzoo it would bring JAX into every engine's first answer and memory.
Lines of JSON come in and each is answered by one: first the `Job`, when its first result is there; then, any number of
times, {"seconds": ...} to run for, by what every call took, or {"profile": FOLDER} to write a trace.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __name__ != "__main__":
    from fzoo.bench.engines import ENGINES, Job, Missing, Running, at_once, on_jax
else:
    sys.path.insert(0, str(Path(__file__).parent))
    from engines import ENGINES, Job, Missing, Running, at_once, on_jax

    del sys.path[0]


#: Calls in a trace.
PROFILED = 5


def start_ceiling(job: Job) -> Running:
    """Start the fastest matrix product: what the device does at best with the arithmetic of a convolution.

    In the job's dtype and precision; on a CPU, whose units for bfloat16 may be slower, the faster of that and float32.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    best, fastest = at_once(lambda: None, device.device_kind), 0.0
    for n in (512, 1024, 2048) if on_cpu else (4096, 8192):
        a = np.random.default_rng(0).standard_normal((n, n), np.float32)
        ways = [at_once(functools.partial(np.matmul, a, a), device.device_kind)] if on_cpu else []
        for dtype in {job.dtype, *(["float32"] if on_cpu else [])}:
            product, b = jax.jit(jnp.matmul), jnp.asarray(a, dtype)
            ways.append(on_jax(job, functools.partial(product, b, b)))
        for way in ways:
            way = way._replace(wait=jax.block_until_ready, flops=2 * n**3)
            way.call()
            speed = way.flops / min(timed(way.call) for _ in range(3))
            if speed > fastest:
                best, fastest = way, speed
    return best


CEILING = "ceiling"


#: Classes of layers whose output is there in any form of a network: no convolution that a BN may be folded into.
TAPPED = ("Activation", "ReLU", "Add", "MaxPooling2D")


def facts(job: Job) -> dict[str, Any]:
    """Collect what is known of a model without running it.

    Its parameters, its FLOPs for an image (three times those of the forward pass to train), for features the layer
    where half of them are done, and JAX's device.
    """
    import jax

    import fzoo
    from fzoo.layers.graph import trace

    traced = trace(fzoo.create(job.model, input_shape=(job.size, job.size, 3)))
    nodes = {node.name: node for node in traced.nodes}
    flops, done, layer = sum(node.flops for node in traced.nodes), 0, ""
    if job.task == "features":
        for node in traced.nodes:
            done += node.flops
            if done >= flops / 2 and node.kind in TAPPED:
                layer = node.name
                break
        needed, stack = set(), [layer]
        while stack:
            name = stack.pop()
            if name not in needed:
                needed.add(name)
                stack.extend(nodes[name].inputs)
        flops = sum(nodes[name].flops for name in needed)
    device = jax.devices()[0]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(traced.variables)),
        "flops": flops * (3 if job.task == "train" else 1),
        "layer": layer,
        "device": device.device_kind,
        "platform": device.platform,
    }


def convert(job: Job) -> dict[str, Any]:
    """Write the network, with random weights, to `path` as ONNX: the plain graph, as Keras has it."""
    import fzoo

    module, variables = fzoo.load(job.model, weights=None, input_shape=(job.size, job.size, 3))
    fzoo.export(module, variables, job.path, layers=[job.layer] if job.task == "features" else [])
    return {}


PREPARATIONS = {"facts": facts, "convert": convert}


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turn(running: Running, seconds: float, in_flight: int) -> dict[str, Any]:
    """Run batches for some seconds, one at least.

    Returns:
        {"times": what each took, one by one}, and where several are to be in flight, which then has half of the time,
        {"in_flight_times": [seconds for a batch]}.
    """
    if in_flight == 1:
        return {"times": one_by_one(running, seconds)}
    return {
        "times": one_by_one(running, seconds / 2),
        "in_flight_times": [with_several_in_flight(running, seconds / 2, in_flight)],
    }


def one_by_one(running: Running, seconds: float) -> list[float]:
    """Time each batch, the next begun when it was done."""
    start, times = time.perf_counter(), []
    while not times or time.perf_counter() - start < seconds:
        times.append(timed(running.call))
    return times


def with_several_in_flight(running: Running, seconds: float, in_flight: int) -> float:
    """Time a batch where the next ones are begun before it is done."""
    pending: deque[Any] = deque()
    start, count = time.perf_counter(), 0
    while count < in_flight or time.perf_counter() - start < seconds:
        pending.append(running.start())
        count += 1
        if len(pending) == in_flight:
            running.wait(pending.popleft())
    while pending:
        running.wait(pending.popleft())
    return (time.perf_counter() - start) / count


def profiled(running: Running, folder: str) -> dict[str, Any]:
    """Write a trace of some calls; returns whether the engine has one."""
    if running.profile is None:
        return {"profile": None}
    with running.profile(folder):
        for _ in range(PROFILED):
            running.call()
    return {"profile": folder}


def memory() -> dict[str, float]:
    """Return the most memory that this process has held, in MiB, and on its device, where JAX or PyTorch knows."""
    # Not ru_maxrss alone: on Linux it counts the parent, as which every process begins.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    usage = {"peak_mib": peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if "jax" in sys.modules:
        stats = sys.modules["jax"].devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            usage["device_peak_mib"] = stats["peak_bytes_in_use"] / 2**20
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_initialized():
        usage["device_peak_mib"] = sys.modules["torch"].cuda.max_memory_allocated() / 2**20
    return usage


def one_line(error: BaseException) -> str:
    """Write what an exception says, in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def main() -> None:
    """Answer on what was standard output; whatever else is printed there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")

    requests = iter(sys.stdin.readline, "")
    try:
        job = Job(**json.loads(next(requests)))
        if job.engine in PREPARATIONS:
            return answer(**PREPARATIONS[job.engine](job))
        running = start_ceiling(job) if job.engine == CEILING else ENGINES[job.engine].start(job)
        answer(first_call_s=timed(running.call), device=running.device, flops=running.flops)
        for request in map(json.loads, requests):
            if "profile" in request:
                answer(**profiled(running, request["profile"]))
            else:
                answer(**turn(running, request["seconds"], job.in_flight), **memory())
    except Missing as e:
        answer(missing=str(e))
    except Exception as e:
        answer(error=one_line(e))


if __name__ == "__main__":
    main()
