"""One command for an accelerator: is fzoo right on it, how fast is it, and how fast are its peers?

    python benchmarks/accelerator.py --out FOLDER            on a GPU or TPU: 8 minutes at most
    python benchmarks/accelerator.py --out FOLDER --small    to try it: 3 minutes on two cores of a CPU

It needs JAX and Flax with what fzoo imports (neither Keras nor fzoo's other extras), for peers PyTorch with torchvision
or timm, and nothing is installed or fetched. First come the errors: a small version of every family at two sizes,
beside float32 on the CPU. Then, the most important first, images/s and latency of whole networks, in inference and
training: fzoo as it is loaded and optimised, and its peers. FOLDER has everything as soon as it is measured:
accelerator.md, with errors.csv and the results.json, results.csv and results.md of `fzoo bench`.

What runs on the device are processes of their own, one at a time. One that dies is started again without what killed
it; what failed is tried once more without XLA's autotuning, and says so.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have the small networks, which are alive

#: The platforms that were asked for; the parent itself keeps off the device, which one process at a time may hold.
PLATFORMS = os.environ.get("JAX_PLATFORMS")
if "--phase" not in sys.argv:
    os.environ["JAX_PLATFORMS"] = "cpu"

from fzoo.bench import engines, report, runner, worker  # noqa: E402
from fzoo.bench.engines import Job  # noqa: E402
from fzoo.bench.peaks import published_peak  # noqa: E402

#: Networks, the most important first, and the sides of their images.
MODELS = {
    "ResNet50": 224,
    "EfficientNetB0": 224,
    "ConvNeXtTiny": 224,
    "VGG16": 224,
    "MobileNetV2": 224,
    "InceptionV3": 299,
    "DenseNet121": 224,
}
SMALL_MODELS = {"MobileNetV2": 64, "ResNet50": 64}

#: Minutes for everything, and the share of each phase.
MINUTES, SMALL_MINUTES = 7.5, 2.7
SHARES = {"errors": 0.2, "fzoo": 0.5, "peers": 0.3}
SMALL_SHARES = {"errors": 0.55, "fzoo": 0.32, "peers": 0.13}

#: Seconds of a case's calls, and after which a process that says nothing is taken for stuck.
SECONDS, STUCK = 0.8, 150.0

#: How far an output may be from float32 on the CPU, over the largest magnitude, before it counts as wrong: rounding of
#: products alone, through networks of up to a hundred layers.
LIMITS = {"float32, highest": 2e-3, "float32": 5e-2, "bfloat16": 0.3}

#: Images a second on an H100, and milliseconds for one image: what is aimed at.
GOALS = (
    ("ResNet50, float32 (TF32), images/s", {"task": "inference", "dtype": "float32", "precision": "default"}, 13_000),
    ("ResNet50, bfloat16, batch 256, images/s", {"task": "inference", "dtype": "bfloat16", "batch": 256}, 22_000),
    ("ResNet50, training in bfloat16, images/s", {"task": "train", "dtype": "bfloat16"}, 3_500),
)
LATENCY_GOAL = 0.9


# -- what is measured --------------------------------------------------------------------------------------------------


def cases(engines: Sequence[str], models: dict[str, int], small: bool) -> list[Job]:
    """List everything that is to be measured of some engines, the most important first; `models` as `MODELS`."""
    batch, train = (4, 4) if small else (256, 128)
    rounds: list[list[Job]] = [[], [], []]
    for number, (model, size) in enumerate(models.items()):
        for engine in engines:

            def add(
                turn: int, task: str, batch: int, dtype: str, model=model, size=size, engine=engine, **options: Any
            ) -> None:
                modes = ("eager", "compile") if engine in ("torchvision", "timm") else ("",)
                for mode in modes if not small else modes[:1]:
                    job = Job(
                        engine, model, batch, task, dtype, size, mode=mode, in_flight=4 if small else 8, **options
                    )
                    rounds[turn].append(job)

            add(0, "inference", batch, "bfloat16")
            add(0 if engine.startswith("fzoo") else 2, "inference", batch, "float32")
            add(1, "inference", 1, "bfloat16")
            if engine != "fzoo-optimized" and not (small and number == 1):
                add(1, "train", 256 if model == "ResNet50" and not small else train, "bfloat16")
            if number == 0:
                add(1, "inference", batch, "bfloat16", inputs="host")
                add(2, "inference", batch, "float32", precision="highest")
                for more in () if small else (64, 1024):
                    add(2, "inference", more, "bfloat16")
                if not small:
                    add(2, "inference", 1, "float32")
            if number < 3 and engine != "fzoo-optimized" and not small:
                add(2, "train", train, "float32")
    return [job for turn in rounds for job in turn]


def key(job: Job) -> str:
    """Write a case in a line."""
    parts = [job.model, job.task, f"batch {job.batch}", job.dtype, job.precision, job.inputs, job.engine, job.mode]
    return " ".join(part for part in parts if part)


# -- processes on the device -------------------------------------------------------------------------------------------


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


# -- the parent --------------------------------------------------------------------------------------------------------


class Child:
    """A phase in a process of its own, in a session of its own, which a deadline ends."""

    def __init__(self, phase: str, work: list[Any], small: bool, threads: int, **env: str):
        given = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
        given |= {"JAX_PLATFORMS": PLATFORMS} if PLATFORMS else {}
        given |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        given |= {"TORCHINDUCTOR_FREEZING": "1"}
        command = [
            sys.executable,
            __file__,
            "--phase",
            phase,
            "--threads",
            str(threads),
            *(["--small"] if small else []),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=given | env,
            start_new_session=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([dataclasses.asdict(w) if isinstance(w, Job) else w for w in work]))
        self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.strip():
                self.errors = [*self.errors[-20:], line.strip()]

    def answers(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Yield what it says, until it ends, says nothing for long, or the time is up; then it is no more."""
        try:
            while (left := min(deadline - time.monotonic(), STUCK)) > 0:
                try:
                    line = self.lines.get(timeout=left)
                except queue.Empty:
                    return
                if line is None:
                    return
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            code = self.process.poll()
            if code is None:
                try:
                    self.process.wait(2)
                except subprocess.TimeoutExpired:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait()

    def death(self) -> str:
        """Say how it ended, in a line."""
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process: {how}{': ' + self.errors[-1][:200] if self.errors else ''}"


class Results:
    """All that is known so far, and its files."""

    def __init__(self, out: Path, small: bool):
        self.out, self.small, self.start = out, small, time.monotonic()
        self.errors: list[dict[str, Any]] = []
        self.by_case: dict[str, runner.Row] = {}
        self.ceilings: dict[str, float] = {}
        self.device, self.platform = "unknown", "unknown"
        self.notes: list[str] = []
        self.known: dict[tuple[str, str, int], dict[str, Any]] = {}

    def add(self, job: Job, answer: dict[str, Any], flags: str) -> None:
        """Put a case to the rows."""
        where = (job.model, job.task, job.size)
        if where not in self.known:
            self.known[where] = worker.facts(Job("facts", job.model, 1, job.task, job.dtype, job.size))
        known = {**self.known[where], "device": self.device, "platform": self.platform}
        if "status" in answer:
            failure = runner.NoAnswer(answer["status"], answer["reason"])
            row = runner.row(job, job.engine, known, None, failure)
        else:
            measured = runner.Measured(
                answer["device"],
                job.mode,
                answer["times"],
                answer.get("in_flight_times", []),
                answer["first_call_s"],
                float("nan"),
                answer["peak_mib"],
                answer.get("device_peak_mib", float("nan")),
            )
            row = runner.row(job, job.engine, known, measured)
        row["mode"] = " ".join(filter(None, [job.mode, flags]))
        row |= runner.shares(row, self.ceilings.get(f"{job.dtype} {job.precision}"), self.device, self.platform)
        self.by_case[key(job)] = row
        self.write()

    @property
    def rows(self) -> list[runner.Row]:
        """Those of all cases."""
        return list(self.by_case.values())

    def write(self) -> None:
        """Write what there is."""
        if self.errors:
            with (self.out / "errors.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(self.errors[0]))
                writer.writeheader()
                writer.writerows(self.errors)
        machine = {**runner.machine(self.rows), "command": " ".join(["python", *sys.argv])}
        if self.rows:
            report.write(self.out, best_of_modes(self.rows), machine, reference="torchvision")
        page = self.out / "accelerator.md.part"
        page.write_text(self.page(machine))
        page.replace(self.out / "accelerator.md")

    def page(self, machine: dict[str, Any]) -> str:
        """Write the tables and what they were measured with."""
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        flags = machine["xla_flags"] or "none, so autotuning at its default level"
        lines = [
            f"# {self.device}",
            "",
            f"{machine['accelerator'] or machine['processor']}; {machine['date']}; {machine['command']}",
            f"({time.monotonic() - self.start:.0f} s). {versions}.",
            f"XLA_FLAGS: {flags}. Images NHWC, as the networks have them: the layout on the device is XLA's choice.",
            *(f"{note}." for note in self.notes),
            "",
        ]
        if self.ceilings:
            lines += ["Fastest matrix product: "]
            for name, value in self.ceilings.items():
                peak = published_peak(self.device, *name.split())
                lines[-1] += (
                    f"{name} {value / 1e3:.3g} TFLOP/s{f' ({value / peak / 10:.0f} % of its peak)' if peak else ''}; "
                )
            lines += [""]
        if self.platform != "cpu" or self.small:
            lines += [*self.goals(), ""]
        if self.rows:
            headers, cells = self.speeds()
            lines += ["## Speed", "", *markdown(headers, cells), ""]
        if self.errors:
            lines += ["## Errors", "", "Beside float32 on the CPU, over the largest magnitude.", ""]
            headers = list(self.errors[0])
            lines += markdown(headers, [[str(row[name]) for name in headers] for row in self.errors])
        return "\n".join(lines) + "\n"

    def speeds(self) -> tuple[list[str], list[list[str]]]:
        """List all cases, those that failed with why."""
        cells = []
        for row in sorted(self.rows, key=lambda r: (r["model"], r["task"], r["dtype"], r["precision"], r["batch"])):
            what = [row["model"], row["task"], f"{row['dtype']}{', highest' if row['precision'] == 'highest' else ''}"]
            what += [str(row["batch"]), row["inputs"], f"{row['engine']} {row['mode']}".strip()]
            if row["status"] != "ok":
                cells.append([*what, row["status"], "", "", "", "", "", row["reason"]])
                continue
            numbers = (row["images_per_s"], row["p50_ms"], row["compile_s"], row["device_peak_mib"])
            percents = [value and 100 * value for value in (row["utilisation"], row["peak_share"])]
            cells.append([*what, *(report.number(value) for value in (*numbers, *percents)), ""])
        headers = ["model", "task", "dtype", "batch", "inputs", "engine", "images/s", "p50 ms", "compile s", "peak MiB"]
        return [*headers, "% of product", "% of peak", "why"], cells

    def goals(self) -> list[str]:
        """List what is aimed at on an H100, beside the best that was found here."""

        def best(engines: str | tuple[str, ...], value: Callable[[runner.Row], float], **wanted: Any) -> float | None:
            found = [
                value(row)
                for row in self.rows
                if row["status"] == "ok"
                and row["engine"].startswith(engines)
                and all(row[name] == given for name, given in wanted.items())
            ]
            return max(found, default=None)

        lines = ["| aimed at on an H100 | goal | here |", "|-|-|-|"]
        for name, wanted, goal in GOALS:
            here = best("fzoo", lambda row: row["images_per_s"], model="ResNet50", inputs="device", **wanted)
            lines.append(f"| {name} | {goal:,} | {report.number(here)} |")
        quickest = best("fzoo", lambda row: -row["p50_ms"], model="ResNet50", batch=1, inputs="device")
        lines.append(f"| ResNet50, one image, ms | {LATENCY_GOAL} | {report.number(quickest and -quickest)} |")
        ahead, compared = [], 0
        for model in MODELS:
            options = {"model": model, "task": "inference", "dtype": "bfloat16", "inputs": "device"}
            ours = best("fzoo", lambda row: row["images_per_s"], **options)
            theirs = best(
                ("torchvision", "timm"), lambda row: row["images_per_s"] if row["mode"] == "compile" else 0.0, **options
            )
            if ours and theirs:
                compared += 1
                ahead += [model] if ours > theirs else []
        text = f"{len(ahead)} of {compared}" if compared else "-"
        return [*lines, f"| networks ahead of `torch.compile` in bfloat16 | 5 of 7 | {text} |"]


def markdown(headers: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """Write the lines of a table."""
    return [f"| {' | '.join(line)} |" for line in (headers, ["-"] * len(headers), *cells)]


def best_of_modes(rows: Sequence[runner.Row]) -> list[runner.Row]:
    """Choose of each engine the fastest of its modes: what `fzoo bench` has rows of."""
    found: dict[tuple[Any, ...], runner.Row] = {}
    for row in rows:
        name = tuple(row[each] for each in runner.KEY)
        if name not in found or (row["images_per_s"] or 0) > (found[name]["images_per_s"] or 0):
            found[name] = row
    return list(found.values())


def hurry(small: bool) -> dict[str, str]:
    """Return flags with which the CPU compiles in little time, for a trial."""
    if not small:
        return {}
    command, env = [sys.executable, str(ROOT / "tests" / "hurry.py")], {**os.environ, "PYTHONPATH": str(ROOT)}
    flags = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags.stdout}".strip()}


def find_errors(results: Results, families: list[str], small: bool, deadline: float) -> None:
    """Run the phase of errors."""
    child = Child("errors", families, small, os.cpu_count() or 1, **hurry(small))
    for answer in child.answers(deadline):
        if "device" in answer:
            results.device, results.platform = answer["device"], answer["platform"]
        if "error" in answer:
            results.errors.append(answer["error"])
            results.errors.sort(key=lambda row: [str(row[name]) for name in ("family", "size", "form", "dtype")])
            results.write()
    if child.process.returncode:
        why = "the time was up" if time.monotonic() >= deadline else child.death()
        results.notes.append(f"Errors are of {len(results.errors)} cases, then {why}")
        results.write()


def measure(results: Results, jobs: list[Job], small: bool, deadline: float, flags: str = "") -> list[Job]:
    """Run the phase that measures, again where its process dies; returns what failed on a GPU and may go otherwise."""
    failed, threads, left = [], os.cpu_count() or 1, {key(job): job for job in jobs}
    env = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()} if flags else {}
    while left and time.monotonic() < deadline:
        # A process of PyTorch's compiles with threads of its own.
        child = Child("measure", list(left.values()), small, threads if not small else 1, **env)
        begun: list[str] = []
        for answer in child.answers(deadline):
            if "ceiling" in answer:
                results.ceilings[answer["ceiling"]] = answer["gflop_s"]
            for name in ("begin", "measuring"):
                begun += [answer[name]] if name in answer else []
            if "case" in answer:
                job = left.pop(answer["case"])
                failed += [job] if answer.get("status") == "error" else []
                results.add(job, answer, flags)
        if time.monotonic() >= deadline or not left:
            break
        # It died, or is stuck: where several compiled together, each alone from now on; else it was the last begun.
        suspects = [name for name in begun if name in left]
        if threads > 1 and len(set(suspects)) > 1:
            threads = 1
            continue
        name = suspects[-1] if suspects else next(iter(left))
        job = left.pop(name)
        failed.append(job)
        results.add(job, {"status": "error", "reason": child.death()}, flags)
    if left:
        names = ", ".join(list(left)[:3])
        results.notes.append(f"{len(left)} cases were left when the time was up, among them {names}")
        results.write()
    return [job for job in failed if job.engine.startswith("fzoo") and results.platform in ("gpu", "cuda")]


def installed_peers(results: Results) -> list[str]:
    """List the peers that can run here: where JAX computes on a GPU or a CPU, PyTorch's."""
    import importlib.util

    if results.platform == "tpu":
        results.notes.append("No peers on a TPU")
        return []
    found = [
        name
        for name in ("torchvision", "timm")
        if all(importlib.util.find_spec(package) for package in engines.ENGINES[name].packages)
    ]
    if not found:
        results.notes.append("Neither torchvision nor timm is installed, and so there are no peers")
    return found


def main() -> int:
    """Parse the arguments, and run the phases; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the tables")
    parser.add_argument("--small", action="store_true", help="a trial in three minutes on two cores")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="which network; may be given again")
    parser.add_argument("--family", action="append", help="whose errors, by the name in the table; may be given again")
    parser.add_argument("--minutes", type=float, help=f"at most; {MINUTES} if left out")
    parser.add_argument("--phase", choices=("errors", "measure"), help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.phase:
        work = json.loads(sys.stdin.read())
        if given.phase == "errors":
            phase_errors(work, given.small, given.threads)
        else:
            phase_measure([Job(**fields) for fields in work], given.small, given.threads)
        return 0
    if given.out is None:
        parser.error("--out names the folder for the tables")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out {given.out} is a file, a folder expected")
    if (given.out / "results.json").exists():
        parser.error(f"--out {given.out} holds results already, another folder expected")
    given.out.mkdir(parents=True, exist_ok=True)
    models = SMALL_MODELS if given.small else MODELS
    if given.model:
        models = {name: SMALL_MODELS["ResNet50"] if given.small else MODELS[name] for name in given.model}
    results, start = Results(given.out, given.small), time.monotonic()
    total = 60 * (given.minutes or (SMALL_MINUTES if given.small else MINUTES))

    def until(*phases: str) -> float:
        shares = SMALL_SHARES if given.small else SHARES
        return start + total * sum(shares[name] for name in phases)

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        find_errors(results, given.family or [], given.small, until("errors"))
        jobs = cases(("fzoo-optimized", "fzoo"), models, given.small)
        again = measure(results, jobs, given.small, until("errors", "fzoo"))
        if peers := installed_peers(results):
            measure(results, cases(peers, models, given.small), given.small, until("errors", "fzoo", "peers"))
        if again:
            measure(results, again, given.small, start + total + 30, "--xla_gpu_autotune_level=0")
    except KeyboardInterrupt:
        print(f"accelerator: interrupted; what was measured is in {given.out}", file=sys.stderr)
        return 130
    results.write()
    print((given.out / "accelerator.md").read_text())
    wrong = [row for row in results.errors if row["status"] != "ok"]
    broken = [row for row in results.rows if row["status"] == "error"]
    return 1 if wrong or broken or not results.errors or not results.rows else 0


if __name__ == "__main__":
    sys.exit(main())
