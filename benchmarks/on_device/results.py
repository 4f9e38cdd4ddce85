"""All that was measured, and its files."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fzoo.bench import report, runner, worker
from fzoo.bench.engines import Job
from fzoo.bench.peaks import published_peak

from .cases import MODELS, key

#: Images a second on an H100, and milliseconds for one image: what is aimed at.
GOALS = (
    ("ResNet50, float32 (TF32), images/s", {"task": "inference", "dtype": "float32", "precision": "default"}, 13_000),
    ("ResNet50, bfloat16, batch 256, images/s", {"task": "inference", "dtype": "bfloat16", "batch": 256}, 22_000),
    ("ResNet50, training in bfloat16, images/s", {"task": "train", "dtype": "bfloat16"}, 3_500),
)
LATENCY_GOAL = 0.9


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
