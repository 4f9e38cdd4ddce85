"""What comes of the rows: a table, files, plots."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import fzoo
from fzoo.bench.engines import ENGINES
from fzoo.bench.facts import Row
from fzoo.bench.runner import KEY
from fzoo.figures import Axes, Axis, Figure, make_figure, save_figure
from fzoo.files import replacing
from fzoo.ops.processor import instruction_sets
from fzoo.types import Json

REFERENCE = "keras-jax"

#: Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS = {
    "fzoo": "#D55E00",
    "fzoo-optimized": "#E69F00",
    "fzoo-tuned": "#F0E442",
    "keras-jax": "#0072B2",
    "keras-tensorflow": "#56B4E9",
    "torchvision": "#CC79A7",
    "timm": "#882255",
    "onnxruntime": "#009E73",
    "openvino": "#000000",
    "openvino-bf16": "#999999",
}
MARKERS = "osD^v<>Pp*hX8dH"

#: What rows have in common that are compared with each other.
BESIDE = ("model", "batch", "task", "size", "dtype", "precision", "devices", "inputs")

#: What rows have that were written before these could be chosen.
OLDER = {
    "precision": "default",
    "inputs": "host",
    "in_flight": 1,
    "compile_s": None,
    "peak_tflop_s": None,
    "peak_share": None,
}

#: The columns of the table: a header, and the cell of a row.
COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda r: r["model"],
    "batch": lambda r: str(r["batch"]),
    "engine": lambda r: f"{r['engine']} {r['mode']}".strip(),
    "images/s": lambda r: "error" if r["status"] == "error" else number(r["images_per_s"]),
    "p50 ms": lambda r: number(r["p50_ms"]),
    "p95 ms": lambda r: number(r["p95_ms"]),
    "first call s": lambda r: number(r["first_call_s"]),
    "first answer s": lambda r: number(r["first_answer_s"]),
    "peak MiB": lambda r: number(r["device_peak_mib"] or r["peak_mib"]),
    "GFLOP/s": lambda r: number(r["gflop_s"]),
    "% of ceiling": lambda r: number(r["utilisation"] and 100 * r["utilisation"]),
    "% of peak": lambda r: number(r["peak_share"] and 100 * r["peak_share"]),
}

#: Those that a terminal has no room for.
WIDE = ("first call s", "GFLOP/s")

#: What a table shows only where its rows differ in it.
VARYING = ("task", "size", "dtype", "precision", "inputs", "in_flight", "devices", "device")


def number(value: float | None) -> str:
    """Write three digits; a dash where it is not known."""
    if value is None:
        return "-"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if 0 < abs(value) < 100 else f"{value:,.0f}"


def varies(rows: Sequence[Row], key: str) -> bool:
    """Tell whether rows differ in this: sizes of one model, dtypes of engines that leave the choice."""
    if key == "size":
        return len({(row["model"], row["size"]) for row in rows}) > len({row["model"] for row in rows})
    return len({row[key] for row in rows if key != "dtype" or not row["engine"].endswith("bf16")}) > 1


def table(rows: Sequence[Row], reference: str = REFERENCE, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Make (headers, cells), with the ratios of images/s to the reference and to the fastest that is not fzoo.

    `narrow` leaves out the columns of `WIDE` and breaks the headers.
    """
    columns = {header: cell for header, cell in COLUMNS.items() if not narrow or header not in WIDE}
    if not any(row["peak_share"] for row in rows):
        columns.pop("% of peak")
    beside = group_rows(rows, *BESIDE)
    extra = [key for key in VARYING if varies(rows, key)]
    cells = []
    for row in rows:
        peers = beside[tuple(row[key] for key in BESIDE)]
        theirs = next((r["images_per_s"] for r in peers if r["engine"] == reference), None)
        fastest = max((r["images_per_s"] or 0 for r in peers if not r["engine"].startswith("fzoo")), default=0)
        ratios = [theirs, fastest]
        shown = [cell(row) for cell in columns.values()]
        shown += [number(row["images_per_s"] / r if r and row["images_per_s"] else None) for r in ratios]
        cells.append([*shown, *(str(row[key]) for key in extra)])
    headers = [*columns, f"× {reference}", "× fastest peer", *extra]
    return [header.replace(" ", "\n", 1) for header in headers] if narrow else headers, cells


def order(row: Row) -> tuple[Any, ...]:
    """Return what sorts rows: model, task, dtype, devices, batch, engine."""
    place = list(ENGINES).index(row["engine"])
    settings = row["dtype"], row["precision"], row["inputs"], row["in_flight"], row["device"]
    return row["model"], row["task"], row["size"], row["devices"], row["batch"], place, *settings


def merged(older: Iterable[Row], newer: Iterable[Row]) -> list[Row]:
    """Merge rows; of two with the same key the newer stays."""
    return sorted({tuple(r[key] for key in KEY): r for r in (*older, *newer)}.values(), key=order)


def read_results(folder: Path) -> dict[str, Json]:
    """Read the results of a folder: {"machine": ..., "rows": ...}.

    Raises:
        ValueError: there are none, or they are not this program's.
    """
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"no {path}: `fzoo bench --out {folder}` writes it")
    try:
        results = json.loads(path.read_text())
        for row in results["rows"]:
            fzoo.spec(row["model"])
        return {"machine": results["machine"], "rows": merged([OLDER | row for row in results["rows"]], [])}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not what `fzoo bench --out` writes") from None


def write(folder: Path, rows: Sequence[Row], machine: dict[str, Json], reference: str = REFERENCE) -> list[Row]:
    """Put rows to those that the folder has, and write results.json, results.csv and results.md; returns all rows."""
    older = read_results(folder)["rows"] if (folder / "results.json").exists() else []
    rows = merged(older, rows)
    headers, cells = table(rows, reference)
    lines = [f"| {' | '.join(line)} |" for line in (headers, ["-"] * len(headers), *cells)]
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "results.md").write_text("\n".join([processor_of(machine), "", *lines]) + "\n")
    return rows


def processor_of(machine: dict[str, Json]) -> str:
    """Describe in a line the kind of processor that a table is of."""
    sets = ", ".join(machine.get("instruction_sets") or ["instruction sets unknown"])
    return f"Processor: {machine.get('processor') or 'unknown'} ({sets}), {machine.get('cores') or '?'} cores"


def check(folder: Path) -> None:
    """Make the folder of the results, and see that they can be merged and drawn, before anything is measured.

    Raises:
        ValueError: what it holds is not what `write` writes, or was measured on a processor of another kind: its
            instruction sets decide which way of computing is the fastest.
        OSError: it can't be made.
        ModuleNotFoundError: matplotlib is not installed; the message says how to.
    """
    make_figure(1, 1, extra="bench")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "results.json").exists():
        theirs, ours = read_results(folder)["machine"].get("instruction_sets"), list(instruction_sets())
        if theirs and ours and theirs != ours:
            raise ValueError(
                f"{folder} holds results of a processor with {', '.join(theirs)}, this one has {', '.join(ours)}: "
                "another folder expected"
            )


# -- plots -------------------------------------------------------------------------------------------------------------


def plot(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw throughput.png, accuracy.png and batches.png, those that there are rows for; returns their paths."""
    rows = [row for row in rows if row["status"] == "ok"]
    paths = []
    for name, draw in (("throughput", draw_throughput), ("accuracy", draw_accuracy), ("batches", draw_batches)):
        drawn = draw(rows)
        if drawn is not None:
            paths.append(folder / f"{name}.png")
            save_figure(drawn, paths[-1])
    return paths


def label(row: Row) -> str:
    """Name a row's engine for a plot."""
    plain = row["dtype"] == "float32" or row["engine"].endswith("bf16")
    parts = [row["engine"]] if plain else [row["engine"], row["dtype"]]
    parts += [row["precision"]] if row["precision"] != "default" else []
    return ", ".join([*parts, *(["from the host"] if row["inputs"] == "host" and row["device"] != "cpu" else [])])


def group_rows(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by the values of some keys, in their order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def by_engine(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group rows by their label, in the order of `ENGINES`."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (list(COLOURS).index(row["engine"]), row["dtype"] == "bfloat16")):
        groups.setdefault(label(row), []).append(row)
    return groups


def title(task: str, batch: int | None, devices: int) -> str:
    """Say what a panel shows."""
    parts = [task, batch and f"batch {batch}", devices > 1 and f"{devices} devices"]
    return ", ".join(str(part) for part in parts if part)


def plain_numbers(axis: Axis) -> None:
    """Write 10 and 100 along a logarithmic axis, and what lies between where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def draw_throughput(rows: Sequence[Row]) -> Figure | None:
    """Draw bars of images/s: a panel for each task and batch size, a group for each model."""
    panels = group_rows(rows, "task", "devices", "batch")
    if not panels:
        return None
    models, engines = sorted({row["model"] for row in rows}), by_engine(rows)
    fig = make_figure(max(7.5, 0.13 * len(models) * (len(engines) + 2) + 1.5), 0.9 + 3.2 * len(panels), extra="bench")
    axes = list(fig.subplots(len(panels), squeeze=False)[:, 0])
    for ax, ((task, devices, batch), shown) in zip(axes, panels.items(), strict=True):
        here = by_engine(shown)
        width = 0.84 / len(here)
        for i, (name, theirs) in enumerate(here.items()):
            x = [models.index(row["model"]) + (i - (len(here) - 1) / 2) * width for row in theirs]
            hatch = "////" if name.endswith(", bfloat16") else None
            colour = COLOURS[theirs[0]["engine"]]
            heights = [row["images_per_s"] for row in theirs]
            ax.bar(x, heights, 0.92 * width, color=colour, label=name, hatch=hatch, edgecolor="white", linewidth=0)
        low = min(row["images_per_s"] for row in shown)
        ax.set(yscale="log", ylabel="images/s", xlim=(-0.6, len(models) - 0.4), title=title(task, batch, devices))
        ax.set_ylim(bottom=low / 2)
        ax.set_xticks(
            range(len(models)),
            models,
            rotation=30 if len(models) > 4 else 0,
            ha="right" if len(models) > 4 else "center",
        )
        ax.tick_params(axis="x", length=0)
        finish(ax)
        plain_numbers(ax.yaxis)
        ax.grid(axis="x", visible=False)
    legend(fig, axes)
    return fig


def draw_accuracy(rows: Sequence[Row]) -> Figure | None:
    """Draw the published top-1 against images/s, of the batch size with the most rows."""
    known = {row["model"]: fzoo.spec(row["model"]) for row in rows}
    published = {name: 100 * record.top1 for name, record in known.items() if record.top1 is not None}
    panels = group_rows(
        (
            r
            for r in rows
            if r["task"] == "inference" and r["size"] == known[r["model"]].input_size and r["model"] in published
        ),
        "batch",
        "devices",
    )
    if not panels:
        return None
    (batch, devices), shown = max(panels.items(), key=lambda item: (len(item[1]), -item[0][0], -item[0][1]))
    top1 = {row["model"]: published[row["model"]] for row in shown}
    models = sorted(top1, key=lambda name: (top1[name], name))
    scale = max(1.0, len(models) / 40)  # as many names fit beside it
    fig = make_figure(9, 5.5 * scale, extra="bench")
    ax = fig.subplots()
    for name, theirs in by_engine(shown).items():
        ax.scatter([], [], color=COLOURS[theirs[0]["engine"]], marker="s", label=name)
        for row in theirs:
            face = "white" if name.endswith(", bfloat16") else COLOURS[row["engine"]]
            marker = MARKERS[models.index(row["model"]) % len(MARKERS)]
            at = row["images_per_s"], top1[row["model"]]
            ax.scatter(*at, s=55, marker=marker, facecolor=face, edgecolor=COLOURS[row["engine"]], alpha=0.9, zorder=3)
    low, high = min(top1.values()) - 1.5, max(top1.values()) + 1.5
    ax.set(xscale="log", xlabel="images/s", ylabel="ImageNet top-1, %, as published", ylim=(low, high))
    finish(ax)
    plain_numbers(ax.xaxis)
    heights = spread_apart([top1[name] for name in models], (high - low) / (20 * scale))
    for name, y in zip(models, heights, strict=True):
        ax.plot([1, 1.03], [top1[name], y], color="#999999", lw=0.7, clip_on=False, transform=ax.get_yaxis_transform())
        marker = MARKERS[models.index(name) % len(MARKERS)]
        ax.plot([1.045], [y], marker, color="#555555", ms=6, clip_on=False, transform=ax.get_yaxis_transform())
        ax.text(1.065, y, name, va="center", fontsize=9, transform=ax.get_yaxis_transform())
        ax.axhline(top1[name], color="#dddddd", lw=0.7, zorder=1)
    ax.grid(axis="y", visible=False)
    ax.set_title(title("inference", batch, devices))
    legend(fig, [ax])
    return fig


def spread_apart(values: Sequence[float], gap: float) -> list[float]:
    """Move ascending values as little as it takes for a gap between each and the next."""
    clusters: list[list[float]] = []
    for value in values:
        clusters.append([value])
        while (
            len(clusters) > 1
            and fmean(clusters[-1]) - fmean(clusters[-2]) < gap * (len(clusters[-1]) + len(clusters[-2])) / 2
        ):
            clusters[-2:] = [clusters[-2] + clusters[-1]]
    return [fmean(c) + gap * (i - (len(c) - 1) / 2) for c in clusters for i in range(len(c))]


def draw_batches(rows: Sequence[Row]) -> Figure | None:
    """Draw images/s over the batch size: a panel for each model and task of which several were measured."""
    panels = {
        key: group
        for key, group in group_rows(rows, "model", "task", "devices").items()
        if len(group_rows(group, "batch")) > 1
    }
    if not panels:
        return None
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    fig = make_figure(max(7.5, 3.1 * columns), 0.9 + 2.5 * lines, extra="bench")
    axes = list(fig.subplots(lines, columns, squeeze=False).flat)
    for ax, ((model, task, devices), shown) in zip(axes, panels.items(), strict=False):
        for name, theirs in by_engine(shown).items():
            theirs = sorted(theirs, key=lambda row: row["batch"])
            style = "--" if name.endswith(", bfloat16") else "-"
            points = [row["batch"] for row in theirs], [row["images_per_s"] for row in theirs]
            ax.plot(*points, style, marker="o", ms=4, lw=1.5, color=COLOURS[theirs[0]["engine"]], label=name)
        batches = sorted({row["batch"] for row in shown})
        several = len({key[1:] for key in panels}) > 1
        ax.set(title=f"{model}, {title(task, None, devices)}" if several else model, xscale="log", yscale="log")
        finish(ax)
        plain_numbers(ax.yaxis)
        ax.set_xticks(batches, [str(batch) for batch in batches])
        ax.minorticks_off()
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    fig.supxlabel("batch", fontsize=10)
    fig.supylabel("images/s", fontsize=10)
    legend(fig, axes[: len(panels)])
    return fig


def finish(ax: Axes) -> None:
    """Set a light grid, and no box."""
    ax.grid(color="#e5e5e5", lw=0.7)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend(fig: Figure, axes: Sequence[Axes]) -> None:
    """Set one for all panels, above them."""
    handles = {name: handle for ax in axes for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    names = [name for engine in COLOURS for name in handles if name.split(",")[0] == engine]
    fig.legend([handles[n] for n in names], names, loc="outside upper center", ncols=min(4, len(names)), frameon=False)
