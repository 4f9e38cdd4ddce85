"""What runs on the device, in a process of its own: it reads its work, and says in lines of JSON what it found."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

from fzoo.bench import engines, worker
from fzoo.bench.engines import Job

from .cases import key

#: How far an output may be from float32 on the CPU, over the largest magnitude, before it counts as wrong: rounding of
#: products alone, through networks of up to a hundred layers.
LIMITS = {"float32, highest": 2e-3, "float32": 5e-2, "bfloat16": 0.3}

#: Seconds of a case's calls.
SECONDS = 0.8


def say(**fields: Any) -> None:
    """Write a line to the parent."""
    print(json.dumps(fields), flush=True)


def phase_errors(families: list[str], small: bool, threads: int) -> None:
    """Compare each family on the device with float32 on the CPU."""
    import jax
    import numpy as np
    from networks import SMALL, images_for, small_options  # pyright: ignore[reportMissingImports]
    from stored import small_network  # pyright: ignore[reportMissingImports]

    import fzoo
    from fzoo.layers.graph import trace

    device, cpu = jax.devices()[0], jax.local_devices(backend="cpu")[0]
    say(device=device.device_kind, platform=device.platform)
    ways = [("float32", "default"), ("bfloat16", "default")]
    if not small:
        ways.insert(0, ("float32", "highest"))

    def compare(name: str, odd: bool) -> Iterator[dict[str, Any]]:
        module, variables = small_network(name)
        if odd:  # another size, without the top, whose kernels may be of the size
            side = SMALL[name][0] + 17
            options = {**small_options(name), "input_shape": (side, side + 10, 3), "include_top": False}
            del options["classes"]
            module = fzoo.create(name, pooling="avg", **options)
            shapes = trace(module).variables
            variables = {
                kind: {layer: variables[kind].get(layer, arrays) for layer, arrays in tree.items()}
                for kind, tree in shapes.items()
            }
            if name.startswith("ConvNeXt"):  # whose last normalisation has another name without the top
                source = small_network(name)[1]["params"]
                for layer in variables["params"]:
                    if layer not in source:
                        variables["params"][layer] = source[f"{fzoo.create(name).prefix}_head_layernorm"]
        images = images_for(module, 3)
        with jax.default_matmul_precision("highest"):
            truth = np.asarray(fzoo.predict(module, jax.device_put(variables, cpu), images), np.float32)
        for dtype, precision in ways:
            for form in ("plain", "optimized") if precision == "default" and not odd and not small else ("plain",):
                row = {"family": name, "size": "x".join(map(str, module.example_shape[:2])), "form": form}
                row |= {"dtype": dtype, "precision": precision, "error": None, "limit": None, "status": "error"}
                try:
                    net, arrays = module.clone(dtype=dtype), jax.device_put(variables, device)
                    if form == "optimized":
                        net, arrays = fzoo.optimize_for_inference(module, arrays, dtype=jax.numpy.dtype(dtype))
                    with jax.default_matmul_precision("highest" if precision == "highest" else None):
                        ours = np.asarray(fzoo.predict(net, arrays, images), np.float32)
                    error = float(np.abs(ours - truth).max() / np.abs(truth).max())
                    limit = LIMITS[f"{dtype}, {precision}" if precision == "highest" else dtype]
                    row |= {"error": float(f"{error:.3g}"), "limit": limit}
                    row["status"] = "ok" if np.isfinite(error) and error <= limit else "wrong"
                except Exception as e:
                    row["status"] = worker.one_line(e)
                yield row

    def run(what: tuple[str, bool]) -> None:
        for row in compare(*what):
            say(error=row)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, [(name, odd) for odd in (False, True) for name in families or SMALL]))


def phase_measure(jobs: list[Job], small: bool, threads: int) -> None:
    """Measure each case: those of a model are compiled together, by as many threads, and then measured one by one."""
    if jobs and jobs[0].engine.startswith("fzoo"):
        for dtype, precision in (("bfloat16", "default"), ("float32", "default"), ("float32", "highest")):
            if not small or precision == "default":
                job = dataclasses.replace(jobs[0], engine=worker.CEILING, dtype=dtype, precision=precision)
                running = worker.start_ceiling(dataclasses.replace(job, inputs="device"))
                fastest = min(worker.timed(running.call) for _ in range(10))
                say(ceiling=f"{dtype} {precision}", gflop_s=running.flops / fastest / 1e9)

    def prepared(job: Job) -> tuple[Any, float] | BaseException:
        say(begin=key(job))
        try:
            running = engines.ENGINES[job.engine].start(job)
            return running, worker.timed(running.call)
        except Exception as e:
            return e

    left = list(jobs)
    while left:
        model, count = left[0].model, 0
        while (
            count < min(len(left), threads if left[0].engine.startswith("fzoo") else 1) and left[count].model == model
        ):
            count += 1
        group, left = left[:count], left[count:]
        if count == 1:
            ready = [prepared(group[0])]
        else:
            with concurrent.futures.ThreadPoolExecutor(count) as pool:
                ready = list(pool.map(prepared, group))
        for job, found in zip(group, ready, strict=True):
            say(measuring=key(job))
            if isinstance(found, BaseException):
                status = "missing" if isinstance(found, engines.Missing) else "error"
                reason = str(found) if status == "missing" else worker.one_line(found)
                say(case=key(job), status=status, reason=reason)
                continue
            running, first = found
            try:
                turns = worker.turn(running, 0.3 if small else SECONDS, job.in_flight)
                say(case=key(job), device=running.device, first_call_s=first, **turns, **worker.memory())
            except Exception as e:
                say(case=key(job), status="error", reason=worker.one_line(e))
        ready.clear()
