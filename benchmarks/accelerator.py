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
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from on_device import ROOT
from on_device.cases import MODELS, SMALL_MODELS, cases, key
from on_device.phases import phase_errors, phase_measure
from on_device.processes import Child
from on_device.results import Results

from fzoo.bench import engines
from fzoo.bench.engines import Job

#: Minutes for everything, and the share of each phase.
MINUTES, SMALL_MINUTES = 7.5, 2.7
SHARES = {"errors": 0.2, "fzoo": 0.5, "peers": 0.3}
SMALL_SHARES = {"errors": 0.55, "fzoo": 0.32, "peers": 0.13}


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
