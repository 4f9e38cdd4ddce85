"""`fzoo bench`, `tune`."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fzoo.cli.console import command, complain, prepare_process, show
from fzoo.cli.options import Network, Option, Reading, Size, parse_options

if TYPE_CHECKING:
    from fzoo.bench.facts import Row
    from fzoo.inference.optimize import Tuned
    from fzoo.layers.classifier import Classifier
    from fzoo.types import Json, Variables


@command
def bench(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL...", help="Names; all if left out.", show_default=False)
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", "-e", help="What to measure, e.g. fzoo or keras-jax; all installed if left out."),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images in a call; 1 and 16 if left out.")] = None,
    task: Annotated[str, typer.Option(help="inference, features (to a layer in the middle), or train.")] = "inference",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    precision: Annotated[
        str,
        typer.Option(
            help="Of products of float32: default (TF32 on GPUs that have it, bfloat16 on TPUs) or highest (float32)."
        ),
    ] = "default",
    inputs: Annotated[
        str, typer.Option(help="device (a batch and its result are in the device's memory) or host (both are moved).")
    ] = "device",
    in_flight: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calls under way at once where images/s are measured; 1 on a CPU, 8 elsewhere, if left out. p50 and "
            "p95 are of calls one by one.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of calls, for each engine, model and batch size.")] = 3.0,
    devices: Annotated[int, typer.Option(min=1, help="How many of JAX's a batch is spread over.")] = 1,
    size: Size = None,
    reference: Annotated[str, typer.Option(help="The engine that ratios are given to.")] = "keras-jax",
    profile: Annotated[
        Path | None, typer.Option(help="Folder for a trace of a few calls of each engine that has a profiler.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results and plots; what it has of other rows stays.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Show such a folder again, instead of measuring.")] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show where the time goes on this CPU, instead: each convolution of one MODEL in the form that "
            "`fzoo tune` finds, and what OpenVINO takes for it, where it is installed. Goes with one --batch, --dtype "
            "and --size.",
        ),
    ] = False,
) -> None:
    """Measure fzoo beside other engines, which take turns, each in a process of its own."""
    from fzoo.bench import bench as measure
    from fzoo.bench import report as reports
    from fzoo.bench.engines import ENGINES
    from fzoo.errors import unknown

    if reference not in ENGINES:
        raise ValueError(unknown("engine", reference, ENGINES, show=len(ENGINES)))
    if report is not None:
        rows = reports.read_results(report)["rows"]
        show(*reports.table(rows, reference, narrow=sys.stdout.isatty()))
        reports.plot(report, rows)
        return
    if explain:
        others = {"--engine": engine, "--out": out, "--profile": profile, "--devices": devices - 1}
        given = [name for name, value in others.items() if value]
        names = list(models or ())
        if given or task != "inference" or len(names) != 1 or len(batch or ()) > 1:
            raise ValueError(
                f"--explain given{f' with {given[0]}' if given else ''}: one MODEL, with --batch N, --dtype and --size "
                "at most, expected"
            )
        explain_convolutions(names[0], (batch or [16])[0], size, dtype)
        return
    if out is not None:
        reports.check(out)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what was started, and removes its files

    def finished(rows: list[Row], machine: dict[str, Json]) -> None:
        if out is not None:
            reports.write(out, rows, machine, reference)

    with waiting() as progress:
        rows = measure(
            models or (),
            engines=engine or (),
            batches=batch or (1, 16),
            task=task,
            dtype=dtype,
            precision=precision,
            inputs=inputs,
            in_flight=in_flight,
            seconds=seconds,
            devices=devices,
            profile=profile,
            size=size,
            finished=finished,
            say=complain,
            progress=progress,
        )
    show(*reports.table(rows, reference, narrow=sys.stdout.isatty()))
    if out is not None:
        reports.plot(out, reports.read_results(out)["rows"])
    failed = [row for row in rows if row["status"] == "error"]
    for row in failed:
        complain(f"{row['model']}, batch {row['batch']}, {row['engine']}: {row['reason']}")
    if failed:
        raise typer.Exit(1)


def explain_convolutions(name: str, batch: int, size: int | None, dtype: str) -> None:
    """Print a line for each distinct convolution of a model: ours, and OpenVINO's."""
    import jax
    import jax.numpy as jnp

    from fzoo.bench.explain import HEADERS, explain_model

    check_dtype(dtype)
    prepare_process(cache=True)
    module, variables = network_to_tune(name, None, size)
    images = jax.ShapeDtypeStruct((batch, *module.example_shape), jnp.float32)
    with waiting() as progress:
        tuned, rows = explain_model(module, variables, images, dtype, progress)
    if not any(row.kernel for row in rows):
        complain(
            "OpenVINO's times need openvino and onnx: pip install 'fzoo[peers]'; for bfloat16 a processor that has it"
        )
    ours = sum(len(row.choice.layers) * row.choice.seconds[row.choice.form] for row in rows)
    show(HEADERS, [row.cells() for row in rows], f"{1e3 * ours:.1f} ms in convolutions; {whole_network(tuned)}")


@contextlib.contextmanager
def waiting() -> Iterator[Callable[[str], None]]:
    """Yield what shows a line on a terminal, while something is measured."""
    status = Console(stderr=True).status("", spinner="line") if sys.stderr.isatty() else None
    with status or contextlib.nullcontext():
        yield status.update if status else lambda line: None


def check_dtype(dtype: str) -> None:
    """Raise ValueError for a dtype that no network is run in."""
    from fzoo.bench.engines import DTYPES
    from fzoo.errors import unknown

    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))


def whole_network(tuned: Tuned) -> str:
    """Say what a network takes as a whole."""
    times = [f"{1e3 * seconds:.1f} ms {in_short(way)}" for way, seconds in tuned.seconds.items()]
    return f"{tuned.images} images together: {', '.join(times)}; taken: {in_short(tuned.chosen)}"


@command
def tune(
    name: Annotated[
        str,
        typer.Argument(help="Name of the model, the file of a whole model that Keras saved, or the folder of a run."),
    ],
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a call, of which some go through together; 16 if left out.")
    ] = None,
    size: Size = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    option: Option = None,
) -> None:
    """Time the ways to compute a model's convolutions on this machine's CPU, and keep what was found for --tune.

    In a pipe: layers, convolution, form, GFLOP/s, the form without tuning and its GFLOP/s, separated by tabs.
    """
    import jax
    import jax.numpy as jnp

    from fzoo.inference.optimize import tune_network
    from fzoo.inference.tuning import in_words, times_path

    check_dtype(dtype)
    prepare_process(cache=True)
    module, variables = network_to_tune(name, option, size)
    images = jax.ShapeDtypeStruct((batch or 16, *module.example_shape), jnp.float32)
    with waiting() as progress:
        tuned = tune_network(module, variables, images, dtype, progress=progress)
    rows = [
        (
            choice.layers_in_short,
            in_words(choice.convolution),
            choice.form,
            f"{choice.gflops(choice.form):.0f}",
            choice.untimed,
            f"{choice.gflops(choice.untimed):.0f}",
        )
        for choice in tuned.tuning.convolutions
    ]
    footer = f"{whole_network(tuned)}; kept in {times_path()}"
    show(("layers", "convolution", "form", "GFLOP/s", "untuned", "GFLOP/s"), rows, footer)


def in_short(way: str) -> str:
    """Say which way a network was run."""
    return "untuned" if way == "untuned" else f"tuned, YNNPACK gets {way}"


def network_to_tune(name: str, option: list[str] | None, size: int | None) -> tuple[Classifier, Variables]:
    """Return a network and variables, random ones for a model by its name: times don't depend on them."""
    import fzoo
    from fzoo.cli.loading import load_network
    from fzoo.pretrained.whole import is_whole_model
    from fzoo.training.runs import is_run

    if is_whole_model(name) or is_run(name):
        loaded = load_network(Network(None, name, None, option), Reading(size=size), pixels=False)
        return loaded.module, loaded.variables
    options = parse_options(name, option)
    if size is not None:
        options["input_shape"] = size, size, 3
    return fzoo.load(name, weights=None, **options)
