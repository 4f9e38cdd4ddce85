"""The parent: starts a process for each engine, lets them take turns, and makes a row of each."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import fzoo
from fzoo.bench import worker
from fzoo.bench.engines import DTYPES, ENGINES, INPUTS, PRECISIONS, TASKS, Engine, Job
from fzoo.bench.facts import Row, machine, versions
from fzoo.bench.peaks import published_peak
from fzoo.bench.worker import CEILING
from fzoo.errors import unknown
from fzoo.types import Json

#: Seconds of a turn, of the pause before it (in which the threads of the last one fall asleep), and for an answer.
TURN, PAUSE, PATIENCE = 0.5, 0.25, 1200.0


#: Calls in flight where throughput is measured, by default: a CPU computes one at a time, and what an accelerator waits
#: for between two is the time to begin the next.
IN_FLIGHT = {"cpu": 1}


IN_FLIGHT_ELSEWHERE = 8


#: What a row is known by: of two that agree in these, the newer one counts.
KEY = ("model", "engine", "batch", "task", "dtype", "precision", "size", "device", "devices", "inputs", "in_flight")


class NoAnswer(ChildProcessError):
    """A process gave no result; `status` is "missing" where its engine has none to give, or "error"."""

    def __init__(self, status: str, reason: str):
        super().__init__(reason)
        self.status = status


class Measured(NamedTuple):
    """What is known of an engine that ran.

    Attributes:
        device: as its library calls it.
        mode: which of the engine's it was.
        times: seconds of each call, one by one.
        in_flight_times: seconds for a call in each turn with several in flight; empty where there was none.
        first_call_s, first_answer_s: see `results.schema.json`.
        peak_mib, device_peak_mib: the most memory of the process, on the host and the device.
    """

    device: str
    mode: str
    times: Sequence[float]
    in_flight_times: Sequence[float]
    first_call_s: float
    first_answer_s: float
    peak_mib: float
    device_peak_mib: float


class Worker:
    """A process, in a session of its own: Ctrl-C reaches the parent alone, and all that it started can be stopped."""

    def __init__(self, job: Job, env: dict[str, str]):
        self.job = job
        self.times: list[float] = []
        self.in_flight_times: list[float] = []
        self.spent = 0.0
        self.last: dict[str, Json] = {}
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

    def ask(self, request: str) -> dict[str, Json]:
        """Return the answer to a request.

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
        start = time.perf_counter()
        self.last = self.ask(json.dumps({"seconds": seconds}))
        self.spent += time.perf_counter() - start
        self.times += self.last["times"]
        self.in_flight_times += self.last.get("in_flight_times", [])

    def measured(self) -> Measured:
        """Return all that it has said."""
        return Measured(
            self.first["device"],
            self.job.mode,
            self.times,
            self.in_flight_times,
            self.first["first_call_s"],
            self.first_answer_s,
            self.last["peak_mib"],
            self.last.get("device_peak_mib", np.nan),
        )

    def profile(self, folder: Path) -> bool:
        """Have it write a trace of some calls; returns whether its engine can."""
        return self.ask(json.dumps({"profile": str(folder)}))["profile"] is not None

    def _death(self) -> str:
        code = self.process.wait()
        self._errors.seek(0)
        printed = self._errors.read().decode(errors="replace").split("\n")
        last = next((f": {line.strip()[:300]}" for line in reversed(printed) if line.strip()), "")
        ending = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {ending}{last}"

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
    precision: str = "default",
    inputs: str = "device",
    in_flight: int | None = None,
    seconds: float = 3.0,
    devices: int = 1,
    size: int | None = None,
    profile: str | os.PathLike | None = None,
    finished: Callable[[list[Row], dict[str, Json]], object] = lambda rows, machine: None,
    say: Callable[[str], object] = lambda line: None,
    progress: Callable[[str], object] = lambda line: None,
) -> list[Row]:
    """Measure engines beside each other: for a model and a batch size they take turns, so all see the same machine.

    Args:
        models: names; all by default.
        engines: keys of `ENGINES`; by default those that are installed.
        batches: images in a call.
        task: "inference" (images to probabilities), "features" (to a layer in the middle) or "train" (a step of SGD).
        dtype: "float32" or "bfloat16", of the images, the kernels and the arithmetic; in training, parameters are
            float32 either way.
        precision: how products of float32 are computed: "default" is JAX's (TF32 on GPUs that have it, bfloat16 on
            TPUs), "highest" is float32.
        inputs: "device": a batch lies in the device's memory, and its result stays there; "host": both are moved.
        in_flight: calls under way at once where throughput is measured; 1 takes it from calls one by one. By default
            1 on a CPU, 8 elsewhere.
        seconds: of calls, for each engine, model and batch size.
        devices: how many of JAX's a batch is spread over.
        size: height and width of the images, in pixels; the model's own by default.
        profile: a folder for traces of a few calls, one below it for each row: of JAX's and PyTorch's profilers.
        finished: called with the rows of each model and batch size, and the facts of the machine.
        say: called with a line on what is left out.
        progress: called with a line on what is going on.

    Returns:
        A row for each model, batch size and engine; see `row`.

    Raises:
        ValueError: an unknown model, engine, task or dtype, or numbers that do not fit.
        ModuleNotFoundError: an engine was asked for that is not installed; the message says how to.
    """
    for given, offered, noun in (
        (task, TASKS, "task"),
        (dtype, DTYPES, "dtype"),
        (precision, PRECISIONS, "precision"),
        (inputs, INPUTS, "place of the inputs"),
    ):
        if given not in offered:
            raise ValueError(unknown(noun, given, offered))
    if precision != "default" and dtype != "float32":
        raise ValueError(f"precision {precision!r} is of float32, dtype {dtype!r} given")
    if in_flight is not None and in_flight < 1:
        raise ValueError(f"{in_flight} calls in flight given, a positive number expected")
    for batch in batches:
        if batch < 1 or batch % devices:
            raise ValueError(f"a batch of {batch} given, a positive multiple of {devices} devices expected")
    sizes = {name: size or fzoo.spec(name).input_size for name in models or fzoo.list_models(tagged=False)}
    for name, side in sizes.items():
        fzoo.create(name, input_shape=(side, side, 3))  # says what is wrong with the size
    engines, rows = available(engines, say), []
    with tempfile.TemporaryDirectory(prefix="fzoo-bench-") as folder:
        for name, side in sizes.items():
            known = prepared("facts", Job("facts", name, 1, task, dtype, side), Path(folder))
            flying = in_flight or IN_FLIGHT.get(known["platform"], IN_FLIGHT_ELSEWHERE)
            for batch in batches:
                job = Job(CEILING, name, batch, task, dtype, side, devices, precision, inputs, flying, known["layer"])
                traces = None if profile is None else Path(profile).absolute()
                measured = measure(job, known, engines, seconds, Path(folder), progress, say, traces)
                rows += measured
                finished(measured, machine(rows))
    return rows


def available(engines: Sequence[str], say: Callable[[str], object]) -> list[str]:
    """List the engines to measure, in the order of `ENGINES`; by default those that are installed."""
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
    known: dict[str, Json],
    engines: Sequence[str],
    seconds: float,
    folder: Path,
    progress: Callable[[str], object],
    say: Callable[[str], object],
    traces: Path | None,
) -> list[Row]:
    """Measure the rows of one model and batch size; `known` is what `worker.facts` gives."""
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
            while waiting := [name for name, w in workers.items() if w.spent < seconds]:
                for name in waiting:
                    time.sleep(PAUSE)
                    try:
                        workers[name].turn(min(TURN, seconds))
                    except NoAnswer as e:
                        rows[name] = row(job, name, known, None, e)
                        workers.pop(name).stop()
            for name, w in workers.items():
                if name == CEILING:
                    ceiling = tidy(w.first["flops"] / min([*w.times, *w.in_flight_times]) / 1e9)
                    continue
                rows[name] = row(job, name, known, w.measured())
                if traces is not None:
                    progress(f"{job.model}, batch {job.batch}: a trace of {name}")
                    try:
                        if not w.profile(traces / f"{job.model}-{job.task}-{job.dtype}-{job.batch}-{name}"):
                            say(f"{name}: no profiler that fzoo knows, and so no trace")
                    except NoAnswer as e:
                        say(f"{name}: no trace: {e}")
        finally:
            for w in workers.values():
                w.stop()
    for fields in rows.values():
        fields |= shares(fields, ceiling, known["device"], known["platform"])
    return [rows[name] for name in engines]


def shares(row: Row, ceiling: float | None, device: str, platform: str) -> Row:
    """Compute the fields of a row that say how much of what a device can do was reached.

    Args:
        row: see `row`.
        ceiling: the fastest matrix product, in GFLOP/s, where it is known.
        device, platform: JAX's names of them.
    """
    devices = 1 if platform == "cpu" else row["devices"]  # CPU devices share one processor
    peak = published_peak(device, row["dtype"], row["precision"])
    return {
        "ceiling_gflop_s": ceiling and tidy(ceiling),
        "utilisation": tidy(row["gflop_s"] / ceiling / devices) if ceiling and row["gflop_s"] else None,
        "peak_tflop_s": peak,
        "peak_share": tidy(row["gflop_s"] / peak / 1e3 / devices) if peak and row["gflop_s"] else None,
    }


def start(job: Job, folder: Path) -> Worker:
    """Start a process, in the engine's fastest mode, and wait for its first results.

    Raises:
        NoAnswer: there are none in any mode.
    """
    engine = ENGINES.get(job.engine, Engine(worker.start_ceiling, many_devices=True))
    if job.devices > 1 and not engine.many_devices:
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
        best = min(tried, key=lambda w: np.median(w.in_flight_times or w.times))
        best.times.clear()
        best.in_flight_times.clear()
        best.spent = 0.0
        return best
    finally:
        for w in workers:
            if w is not best:
                w.stop()


def prepared(preparation: str, job: Job, folder: Path) -> dict[str, Json]:
    """Return what one of `PREPARATIONS` answers."""
    done = Worker(dataclasses.replace(job, engine=preparation), environment(preparation, folder))
    done.stop()
    return done.first


def environment(name: str, folder: Path) -> dict[str, str]:
    """Make a process's: where fzoo lies, quiet libraries, GPU memory taken as it is needed, since several share it."""
    root = str(Path(fzoo.__file__).parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    engine = ENGINES[name].env if name in ENGINES else {}
    return {
        **os.environ,
        "PYTHONPATH": path,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        **engine,
    }


def row(job: Job, name: str, known: dict[str, Json], measured: Measured | None, failure: NoAnswer | None = None) -> Row:
    """Make the row of an engine: what was measured, or why nothing was; `results.schema.json` says it of each field.

    images/s come from the median: of calls one by one, or of turns with several in flight. The first call compiles; the
    first answer counts from the start of the process, imports included. FLOPs are the model's (see `worker.facts`),
    whatever the engine does for them; the ceiling is the fastest matrix product on JAX's device, measured in turns with
    the engines.
    """
    ran = measured or Measured(known["device"], "", [np.nan], [], np.nan, np.nan, np.nan, np.nan)
    device = "cpu" if measured is None and ENGINES[name].converted else ran.device
    latency = float(np.median(ran.times))
    rate = job.batch / float(np.median(ran.in_flight_times or ran.times))
    fields = {
        "model": job.model,
        "engine": name,
        "batch": job.batch,
        "task": job.task,
        "dtype": "bfloat16" if name == "openvino-bf16" else job.dtype,
        "precision": job.precision,
        "inputs": job.inputs,
        "in_flight": job.in_flight,
        "size": job.size,
        "device": device,
        "devices": job.devices,
        "status": failure.status if failure else "ok",
        "reason": str(failure or ""),
        "mode": ran.mode,
        "images_per_s": rate,
        "p50_ms": 1e3 * latency,
        "p95_ms": 1e3 * float(np.percentile(ran.times, 95)),
        "calls": len(ran.times) if measured else 0,
        "first_call_s": ran.first_call_s,
        "compile_s": ran.first_call_s - min(latency, ran.first_call_s),
        "first_answer_s": ran.first_answer_s,
        "peak_mib": ran.peak_mib,
        "device_peak_mib": ran.device_peak_mib,
        "parameters": known["parameters"],
        "flops_per_image": known["flops"],
        "layer": known["layer"],
        "gflop_s": known["flops"] * rate / 1e9,
        "versions": ", ".join(f"{package} {number}" for package, number in versions(name).items()),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    return {key: tidy(value) for key, value in fields.items()}


def tidy(value: Json) -> Json:
    """Round a number for a file, to four digits; None where it is not known."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if np.isfinite(value) else None
