"""The parent: starts a process for each engine, lets them take turns, and makes a row of each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fzoo
from fzoo.bench import worker
from fzoo.bench.worker import CEILING, ENGINES, Engine, Job
from fzoo.layers import unknown
from fzoo.runtime import instruction_sets

#: Seconds of a turn, of the pause before it (in which the threads of the last one fall asleep), and for an answer.
TURN, PAUSE, PATIENCE = 0.5, 0.25, 1200.0

#: What a row is known by: of two that agree in these, the newer one counts.
KEY = ("model", "engine", "batch", "task", "dtype", "size", "device", "devices")

Row = dict[str, Any]


class NoAnswer(ChildProcessError):
    """A process gave no result; `status` is "missing" where its engine has none to give, or "error"."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class Worker:
    """A process, in a session of its own: Ctrl-C reaches the parent alone, and all that it started can be stopped."""

    def __init__(self, job: Job, env: dict[str, str]):
        self.job = job
        self.times: list[float] = []
        self.last: dict[str, Any] = {}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=env,
            start_new_session=True,
        )
        try:
            self.first = self.ask(json.dumps(dataclasses.asdict(job)))
        except BaseException:
            self.stop()
            raise
        self.first_answer_s = time.perf_counter() - start

    def ask(self, request: str) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            NoAnswer: the engine can't do it, or its process has died or is stuck.
        """
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None and answers is not None
        try:
            print(request, file=requests, flush=True)
            if not select.select([answers], [], [], PATIENCE)[0]:
                raise NoAnswer("error", f"no answer within {PATIENCE:.0f} s")
            line = answers.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise NoAnswer("error", self._death())
        answer = json.loads(line)
        for status in ("missing", "error"):
            if status in answer:
                raise NoAnswer(status, answer[status])
        return answer

    def turn(self, seconds: float) -> None:
        """Let it run for some seconds, a call at least."""
        self.last = self.ask(str(seconds))
        self.times += self.last["times"]

    def _death(self) -> str:
        code = self.process.wait()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()[:300]}" for line in reversed(said) if line.strip()), "")
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}{last}"

    def stop(self) -> None:
        """Kill it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in filter(None, (self.process.stdin, self.process.stdout, self._errors)):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def bench(
    models: Sequence[str] = (),
    *,
    engines: Sequence[str] = (),
    batches: Sequence[int] = (1, 16),
    task: str = "inference",
    dtype: str = "float32",
    seconds: float = 3.0,
    devices: int = 1,
    size: int | None = None,
    finished: Callable[[list[Row], dict[str, Any]], object] = lambda rows, machine: None,
    say: Callable[[str], object] = lambda line: None,
    progress: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """Measure engines beside each other: for a model and a batch size they take turns, so all see the same machine.

    Args:
        models: names; all by default.
        engines: keys of `ENGINES`; by default those that are installed.
        batches: images in a call.
        task: "inference" (images to probabilities), "features" (to a layer in the middle) or "train" (a step of SGD).
        dtype: "float32" or "bfloat16".
        seconds: of calls, for each engine, model and batch size.
        devices: how many of JAX's a batch is spread over.
        size: height and width of the images, in pixels; the model's own by default.
        finished: called with the rows of each model and batch size, and the facts of the machine.
        say: called with a line on what is left out.
        progress: called with a line on what is going on.

    Returns:
        A row for each model, batch size and engine; see `row`.

    Raises:
        ValueError: an unknown model, engine, task or dtype, or numbers that do not fit.
        ModuleNotFoundError: an engine was asked for that is not installed; the message says how to.
    """
    for given, offered, what in ((task, worker.TASKS, "task"), (dtype, worker.DTYPES, "dtype")):
        if given not in offered:
            raise ValueError(unknown(what, given, offered))
    for batch in batches:
        if batch < 1 or batch % devices:
            raise ValueError(f"a batch of {batch} given, a positive multiple of {devices} devices expected")
    sizes = {name: size or fzoo.spec(name).input_size for name in models or fzoo.list_models()}
    for name, side in sizes.items():
        fzoo.create(name, input_shape=(side, side, 3))  # says what is wrong with the size
    engines, rows = available(engines, say), []
    with tempfile.TemporaryDirectory(prefix="fzoo-bench-") as folder:
        for name, side in sizes.items():
            known = prepared("facts", Job("facts", name, 1, task, dtype, side), Path(folder))
            for batch in batches:
                job = Job(CEILING, name, batch, task, dtype, side, devices, known["layer"])
                found = measure(job, known, engines, seconds, Path(folder), progress)
                rows += found
                finished(found, machine(rows))
    return rows


def available(engines: Sequence[str], say: Callable[[str], object]) -> list[str]:
    """The engines to measure, in the order of `ENGINES`; by default those that are installed."""
    for name in engines:
        if name not in ENGINES:
            raise ValueError(unknown("engine", name, ENGINES, show=len(ENGINES)))
    lacking = {name: [p for p in e.packages if importlib.util.find_spec(p) is None] for name, e in ENGINES.items()}
    for name in engines:
        if lacking[name]:
            needed = " and ".join(lacking[name])
            raise ModuleNotFoundError(f"{name} needs {needed}: pip install 'fzoo[{ENGINES[name].extra}]'")
    if not engines:
        for extra in ("bench", "peers"):
            skipped = [name for name, packages in lacking.items() if packages and ENGINES[name].extra == extra]
            if skipped:
                say(f"skipped, not installed: {', '.join(skipped)}: pip install 'fzoo[{extra}]'")
    return [name for name in ENGINES if (name in engines if engines else not lacking[name])]


def measure(
    job: Job,
    known: dict[str, Any],
    engines: Sequence[str],
    seconds: float,
    folder: Path,
    progress: Callable[[str], object],
) -> list[Row]:
    """The rows of one model and batch size; `known` is what `worker.facts` gives."""
    rows: dict[str, Row] = {}
    ceiling = None
    together = [[CEILING, *engines]]
    if known["platform"] == "tpu":  # which one process holds at a time
        together = [[name] for name in together[0]]
    for group in together:
        workers: dict[str, Worker] = {}
        try:
            for name in group:
                progress(f"{job.model}, batch {job.batch}: {name} starts")
                try:
                    workers[name] = start(dataclasses.replace(job, engine=name), folder)
                except NoAnswer as e:
                    rows[name] = row(job, name, known, None, e)
            progress(f"{job.model}, batch {job.batch}: {len(workers)} processes take turns")
            while waiting := [name for name, w in workers.items() if sum(w.times) < seconds]:
                for name in waiting:
                    time.sleep(PAUSE)
                    try:
                        workers[name].turn(min(TURN, seconds))
                    except NoAnswer as e:
                        rows[name] = row(job, name, known, None, e)
                        workers.pop(name).stop()
            for name, w in workers.items():
                if name == CEILING:
                    ceiling = tidy(w.first["flops"] / min(w.times) / 1e9)
                else:
                    rows[name] = row(job, name, known, w)
        finally:
            for w in workers.values():
                w.stop()
    shares = 1 if known["platform"] == "cpu" else job.devices  # CPU devices share one processor
    for each in rows.values():
        each["ceiling_gflop_s"] = ceiling
        each["utilisation"] = tidy(each["gflop_s"] / ceiling / shares) if ceiling and each["gflop_s"] else None
    return [rows[name] for name in engines]


def start(job: Job, folder: Path) -> Worker:
    """A process that has given its first results, in the engine's fastest mode.

    Raises:
        NoAnswer: there are none in any mode.
    """
    engine = ENGINES.get(job.engine, Engine(worker.start_ceiling, spread=True))
    if job.devices > 1 and not engine.spread:
        raise NoAnswer("missing", "one device only")
    if job.task not in engine.tasks or job.dtype not in engine.dtypes:
        raise NoAnswer("missing", f"no {job.task} in {job.dtype} here")
    if engine.converted:
        path = folder / f"{job.model}-{job.size}-{job.layer}.onnx"
        job = dataclasses.replace(job, path=str(path))
        if not path.exists():
            prepared("convert", job, folder)
    workers, tried, failures = [], [], []
    best = None
    try:
        for mode in engine.modes:
            try:
                workers.append(w := Worker(dataclasses.replace(job, mode=mode), environment(job.engine, folder)))
                w.turn(TURN)
                tried.append(w)
            except NoAnswer as e:
                failures.append(e)
        if not tried:
            raise next((e for e in failures if e.status == "error"), failures[0])
        best = min(tried, key=lambda w: np.median(w.times))
        best.times.clear()
        return best
    finally:
        for w in workers:
            if w is not best:
                w.stop()


def prepared(what: str, job: Job, folder: Path) -> dict[str, Any]:
    """What one of `PREPARATIONS` answers."""
    done = Worker(dataclasses.replace(job, engine=what), environment(what, folder))
    done.stop()
    return done.first


def environment(name: str, folder: Path) -> dict[str, str]:
    """Of a process: where fzoo lies, quiet libraries, GPU memory taken as it is needed, since several share it."""
    root = str(Path(fzoo.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    engine = {"KERAS_BACKEND": "tensorflow"} if name == "convert" else ENGINES[name].env if name in ENGINES else {}
    return {
        **os.environ,
        "PYTHONPATH": path,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        **engine,
    }


def row(job: Job, name: str, known: dict[str, Any], w: Worker | None, failure: NoAnswer | None = None) -> Row:
    """What was measured of an engine, or why nothing was.

    images/s come from the median call; the first call compiles; the first answer counts from the start of the process,
    imports included. FLOPs are the model's (see `worker.facts`), whatever the engine does for them; the ceiling is
    the fastest matrix product on JAX's device, measured in turns with the engines.
    """
    times = np.array(w.times if w else [np.nan])
    found = {
        "model": job.model,
        "engine": name,
        "batch": job.batch,
        "task": job.task,
        "dtype": "bfloat16" if name == "openvino-bf16" else job.dtype,
        "size": job.size,
        "device": w.first["device"] if w else "cpu" if ENGINES[name].converted else known["device"],
        "devices": job.devices,
        "status": failure.status if failure else "ok",
        "reason": str(failure or ""),
        "mode": w.job.mode if w else "",
        "images_per_s": job.batch / np.median(times),
        "p50_ms": 1e3 * np.median(times),
        "p95_ms": 1e3 * np.percentile(times, 95),
        "calls": len(w.times) if w else 0,
        "first_call_s": w.first["first_call_s"] if w else np.nan,
        "first_answer_s": w.first_answer_s if w else np.nan,
        "peak_mib": w.last["peak_mib"] if w else np.nan,
        "device_peak_mib": w.last.get("device_peak_mib", np.nan) if w else np.nan,
        "parameters": known["parameters"],
        "flops_per_image": known["flops"],
        "layer": known["layer"],
        "gflop_s": known["flops"] * job.batch / np.median(times) / 1e9,
        "versions": ", ".join(f"{package} {number}" for package, number in versions(name).items()),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return {key: tidy(value) for key, value in found.items()}


def tidy(value: Any) -> Any:
    """A number for a file: four digits of it, or None where it is not known."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if np.isfinite(value) else None


def versions(name: str) -> dict[str, str]:
    """Of an engine's packages."""
    own = () if ENGINES[name].packages else ("fzoo", "flax")
    on_jax = ("jax", "jaxlib") if own or ENGINES[name].env.get("KERAS_BACKEND") == "jax" else ()
    packages = {
        package: distributions().get(package, [package])[0] for package in (*own, *ENGINES[name].packages, *on_jax)
    }
    return {package: importlib.metadata.version(distribution) for package, distribution in packages.items()}


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """Of each package that can be imported, what was installed for it: tensorflow may come with tensorflow-cpu."""
    return importlib.metadata.packages_distributions()


def machine(rows: Sequence[Row]) -> dict[str, Any]:
    """What it ran on, and how. The instruction sets decide which way of computing is the fastest."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
    numbers = {key: value for each in rows for key, value in versions(each["engine"]).items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["fzoo", *sys.argv[1:]]),
        "processor": processor or platform.processor(),
        "instruction_sets": list(instruction_sets()),
        "cores": os.cpu_count(),
        "memory_gib": round(int(meminfo.read_text().split()[1]) / 2**20) if meminfo.exists() else None,
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, **numbers},
    }
