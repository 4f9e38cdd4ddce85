"""Images a second of every model and every tag, each at the size that its accuracy was published for.

    python benchmarks/zoo.py --out benchmarks/results/zoo

A graph is measured once, by `fzoo bench` under the first of its names: tags differ in their weights more often than in
their graph. Takes an hour on two cores, and goes on where it was stopped; each time, what is far below its family is
measured once more. Then `zoo.png` is drawn: the published accuracies, which are not measured here, over the speed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

import fzoo
from fzoo.bench import bench, report
from fzoo.figures import Figure, make_figure, save_figure
from fzoo.types import Json

BATCH, SECONDS, ENGINE = 4, 1.0, "fzoo-optimized"

#: Below this share of its family's median, what was measured is measured again.
SUSPICIOUS = 0.75

#: Options of a tag that say nothing of the graph.
NO_GRAPH = ("tag", "preprocessing")


def graph_of(name: str) -> Hashable:
    """Return what decides a network's speed: its family, the options of its graph, and the size of the image."""
    record = fzoo.spec(name)
    options = {key: value for key, value in record.options.items() if key not in NO_GRAPH}
    return record.family, tuple(sorted((key, repr(value)) for key, value in options.items())), record.input_size


def read_rates(folder: Path) -> dict[str, float]:
    """Read the images a second that a folder has: of each name whose graph was measured, under whichever name."""
    if not (folder / "results.json").exists():
        return {}
    rows = [row for row in report.read_results(folder)["rows"] if row["status"] == "ok"]
    by_graph = {graph_of(row["model"]): row["images_per_s"] for row in rows}
    return {name: by_graph[graph_of(name)] for name in fzoo.list_models() if graph_of(name) in by_graph}


def measure(out: Path) -> None:
    """Measure the graphs that the folder has no row for, and again what may have been slowed by something else."""
    report.check(out)
    known = read_rates(out)
    left = {graph_of(name): name for name in reversed(fzoo.list_models()) if name not in known}
    run(out, list(left.values())[::-1])
    run(out, suspects(report.read_results(out)["rows"]))


def run(out: Path, names: Sequence[str]) -> None:
    """Measure these, of whose rows the faster stays."""

    def finished(rows: list[report.Row], machine: dict[str, Json]) -> None:
        (row,) = rows
        if row["status"] == "ok" and row["images_per_s"] > read_rates(out).get(row["model"], 0):
            report.write(out, rows, {**machine, "command": f"python benchmarks/zoo.py --out {out}"}, ENGINE)
        print(f"{row['model']}: {row['images_per_s']} images/s", flush=True)

    if names:
        bench(names, engines=[ENGINE], batches=[BATCH], seconds=SECONDS, finished=finished)


def suspects(rows: Iterable[report.Row]) -> list[str]:
    """Return the models with far fewer operations a second than their family's median: a neighbour may have done it."""
    families: dict[type, list[report.Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            families.setdefault(fzoo.spec(row["model"]).family, []).append(row)
    return [
        row["model"]
        for group in families.values()
        for row in group
        if row["gflop_s"] < SUSPICIOUS * statistics.median(other["gflop_s"] for other in group)
    ]


def frontier(rates: Mapping[str, float], top1: Mapping[str, float]) -> list[str]:
    """Return the names than which none is both faster and more accurate, the fastest first."""
    best: list[str] = []
    for name in sorted(top1, key=lambda name: (-rates[name], -top1[name])):
        if not best or top1[name] > top1[best[-1]]:
            best.append(name)
    return best


def draw(rates: Mapping[str, float]) -> Figure:
    """Draw all names by family: hollow with Keras's weights, filled with those of a tag; the best have their names."""
    records = {name: fzoo.spec(name) for name in rates}
    top1 = {name: 100 * record.top1 for name, record in records.items() if record.top1 is not None}
    families = sorted({records[name].family.__name__ for name in top1})
    looks = dict(zip(families, [(f"C{i}", marker) for marker in "os" for i in range(10)], strict=False))
    fig = make_figure(12, 9, extra="bench")
    ax = fig.subplots()
    for family, (colour, marker) in looks.items():
        ax.scatter([], [], color=colour, marker=marker, label=family)
    for name in top1:
        colour, marker = looks[records[name].family.__name__]
        face = colour if "." in name else "white"
        ax.scatter(rates[name], top1[name], s=34, marker=marker, facecolor=face, edgecolor=colour, zorder=3)
    best = frontier(rates, top1)
    ax.plot([rates[name] for name in best], [top1[name] for name in best], color="#999999", lw=0.8, zorder=1)
    low, high = min(top1.values()) - 1, max(top1.values()) + 1
    ax.set(xscale="log", xlabel="images/s", ylabel="ImageNet top-1, %, as published", ylim=(low, high))
    report.finish(ax)
    report.plain_numbers(ax.xaxis)
    heights = report.spread_apart([top1[name] for name in best], (high - low) / 42)
    for name, y in zip(best, heights, strict=True):
        ax.annotate(
            name,
            (rates[name], top1[name]),
            (1.03, y),
            textcoords=ax.get_yaxis_transform(),
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#cccccc", "lw": 0.6},
        )
    ax.set_title(f"{len(top1)} sets of weights: hollow Keras's, filled those with tags; batch {BATCH}, 2 cores")
    ax.legend(ncols=2, fontsize=8, loc="lower left")
    return fig


def main() -> None:
    """Measure what is left to measure, and draw."""
    parser = argparse.ArgumentParser(description="Measure every model and every tag.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    out = parser.parse_args().out
    measure(out)
    save_figure(draw(read_rates(out)), out / "zoo.png")


if __name__ == "__main__":
    main()
