"""`fzoo classify`, `features`, `explain`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from fzoo.cli.console import command, complain, prepare_process, show
from fzoo.cli.loading import class_names, join_processes, load_network
from fzoo.cli.options import Cache, Images, Job, Labels, Network, Reading, Tune, require_images

if TYPE_CHECKING:
    from fzoo.images.recipe import Recipe
    from fzoo.jobs.pipeline import Report
    from fzoo.layers.classifier import Classifier
    from fzoo.types import Variables


@command
def classify(
    images: Images = None,
    network: Network = Network(),
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object for each image.")] = False,
    labels: Labels = None,
    out: Annotated[
        Path | None, typer.Option(help="The .jsonl, .csv or .parquet file to write, instead of printing.")
    ] = None,
    reading: Reading = Reading(),
    job: Job = Job(),
    tune: Tune = False,
    cache: Cache = True,
) -> None:
    """Name what is in images. In a pipe: image, WordNet ID, label and probability, separated by tabs.

    With --out, the job can be interrupted: the same command goes on where it was.
    """
    from fzoo.inference.devices import mesh
    from fzoo.jobs.results import check_out

    paths = require_images(images)
    if labels is not None:
        class_names(labels, network.classes)
    if out is not None:
        check_out(out, tapped=False)
        if as_json:
            raise ValueError("--json is for printing; --out FILE.jsonl has an object on each line")
    elif job.distributed or job.restart or job.append or job.shard_size:
        raise ValueError("--out FILE expected with --distributed, --restart, --append or --shard-size")
    process = join_processes(job.distributed)
    prepare_process(cache)
    loaded = load_network(network, reading)
    module, variables = loaded.module, loaded.variables
    names = class_names(labels, module.classes) if labels or not loaded.names else loaded.names
    options = {"preprocess": loaded.preprocess, "recipe": loaded.recipe, "top": top, "labels": names}
    options |= {"mesh": mesh(job.devices), "batch_size": job.batch_size, "workers": job.workers}
    if out is None:
        if tune:
            module, variables = tuned(module, variables, job.batch_size, loaded.recipe)
        print_classes(module, variables, paths, as_json, **options)
        return
    options |= {
        "shard_size": job.shard_size,
        "restart": job.restart,
        "append": job.append,
        "process": process,
        "tune": tune,
    }
    report = batch_job(module, variables, paths, out, **options)
    if report.joined:
        show(("file", "report"), [(out, report)])
    finish(report.failed, report.images, out)


@command
def features(
    images: Images = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="A Keras layer, e.g. block4_pool; may be given again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The .npz, .h5 or .parquet file to write.")] = None,
    network: Network = Network(),
    include_top: Annotated[bool, typer.Option(help="Whether the weights have the classifier.")] = True,
    reading: Reading = Reading(),
    job: Job = Job(),
    tune: Tune = False,
    cache: Cache = True,
) -> None:
    """Write the outputs of layers for images: an array for each layer, and `images`, their paths.

    The job can be interrupted: the same command goes on where it was.
    """
    from fzoo.inference.devices import mesh
    from fzoo.jobs.results import check_out

    paths = require_images(images)
    if not layer or out is None:
        raise ValueError("--layer NAME and --out FILE.npz expected; `fzoo summary MODEL` shows the layers")
    check_out(out, tapped=True)
    process = join_processes(job.distributed)
    prepare_process(cache)
    loaded = load_network(network, reading, include_top=include_top)
    options = {"preprocess": loaded.preprocess, "recipe": loaded.recipe, "layers": layer, "process": process}
    options |= {"mesh": mesh(job.devices), "batch_size": job.batch_size, "workers": job.workers}
    options |= {"shard_size": job.shard_size, "restart": job.restart, "append": job.append, "tune": tune}
    report = batch_job(loaded.module, loaded.variables, paths, out, **options)
    if report.joined:
        rows = report.images - report.failed
        arrays = [(name, f"{array.dtype} {(rows, *array.shape)}") for name, array in report.shapes.items()]
        show(("layer", "array"), arrays, f"{out}: {report}")
    finish(report.failed, report.images, out)


@command
def explain(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    out: Annotated[
        Path | None, typer.Option(help="The .png to write: the image, and where each of the classes is seen.")
    ] = None,
    sheet: Annotated[Path | None, typer.Option(help="The .png to write of the layer's liveliest channels.")] = None,
    layer: Annotated[
        str | None, typer.Option(help="A Keras layer with a feature map; the last before the top if left out.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest classes.")] = 3,
    class_: Annotated[
        list[str] | None,
        typer.Option("--class", help="Label, WordNet ID or number of a class instead; may be given again."),
    ] = None,
    channels: Annotated[int, typer.Option(min=1, help="How many channels the sheet has.")] = 64,
    network: Network = Network(),
    labels: Labels = None,
    reading: Reading = Reading(),
    cache: Cache = True,
) -> None:
    """Show where in an image classes are seen (Grad-CAM), and the feature maps of a layer, as PNG.

    In a pipe: file, WordNet ID, label and probability of each class, separated by tabs.
    """
    import numpy as np
    from PIL import Image

    import fzoo
    from fzoo.apps.picture import check_picture
    from fzoo.files import replacing
    from fzoo.images.reading import open_image
    from fzoo.images.walk import check_one_image
    from fzoo.inference.explain import map_layer, side_by_side

    if out is None and sheet is None:
        raise ValueError("--out FILE.png or --sheet FILE.png expected")
    for path in filter(None, (out, sheet)):
        check_picture(path)
    check_one_image(image)
    open_image(image)
    prepare_process(cache)
    loaded = load_network(network, reading)
    module, variables, recipe, names = loaded.module, loaded.variables, loaded.recipe, loaded.names
    if out or labels:
        names = class_names(labels, module.classes) if labels or not names else names
    chosen = [class_number(item, names or ()) for item in class_ or ()] if out else []
    pixels = recipe.load(image)
    layer = map_layer(module, layer).name
    rows = []
    with contextlib.ExitStack() as files:
        temporary = {path: files.enter_context(replacing(path)) for path in (out, sheet) if path}
        if out:
            explanation = fzoo.explain(
                module,
                variables,
                pixels[None],
                top=min(top, module.classes),
                classes=chosen or None,
                layer=layer,
                preprocess=loaded.preprocess,
            )
            shown = recipe.show(image, 360)
            panels = [(shown, image.name)]
            numbers, probabilities, heats = (np.asarray(item[0]) for item in explanation)
            for i, p, heat in zip(numbers, probabilities, heats, strict=True):
                assert names  # an output has them
                wnid, label = names[i]
                panels.append((np.asarray(fzoo.overlay(shown, heat)), f"{label}  {p:.1%}"))
                rows.append((out, wnid, label, f"{p:.6f}"))
            side_by_side(panels).save(temporary[out])
        if sheet:
            maps = fzoo.features(module, variables, pixels[None], layer, preprocess=loaded.preprocess)[layer][0]
            Image.fromarray(np.asarray(fzoo.feature_sheet(maps, channels=channels))).save(temporary[sheet])
            rows.append((sheet, "-", layer, "-"))
    show(("picture", "id", "label", "probability"), rows)


def tuned(
    module: Classifier, variables: Variables, batch_size: int | None, recipe: Recipe
) -> tuple[Classifier, Variables]:
    """Tune a network for images as they are read."""
    import jax
    import numpy as np

    import fzoo
    from fzoo.inference.batches import BATCH_SIZE

    shape = (batch_size or BATCH_SIZE, *recipe.size, recipe.channels)
    return fzoo.tune(module, variables, jax.ShapeDtypeStruct(shape, np.float32), dtype=module.dtype)


def class_number(text: str, names: Sequence[tuple[str, str]]) -> int:
    """Return the class of a label, a WordNet ID or a number."""
    from fzoo.errors import unknown

    if text.isdecimal() and int(text) < len(names):
        return int(text)
    plain = text.lower().replace(" ", "_")
    for i, name in enumerate(names):
        if plain in (word.lower().replace(" ", "_") for word in name):
            return i
    raise ValueError(unknown("class", text, [label for _, label in names]))


def batch_job(module: Classifier, variables: Variables, paths: Sequence[Path], out: Path, **options: Any) -> Report:
    """Do what `run_job` does, with a progress bar; the first images that can't be read are named."""
    from fzoo.jobs.job import run_job

    with watching() as watch:
        report = run_job(module, variables, paths, out, watch=watch, **options)
    if report.passed_over:
        complain(str(report.passed_over))
    if not report.joined:
        complain(f"this process's share of {out} is done; the last process to be done puts all together")
    if report.added:
        complain(f"{report.added} images came while the job ran and are not in {out}: the same with --append adds them")
    return report


def print_classes(
    module: Classifier,
    variables: Variables,
    paths: Sequence[Path],
    as_json: bool,
    *,
    labels: Sequence[tuple[str, str]],
    **options: Any,
) -> None:
    """Print the likeliest classes as they come; on a terminal as a table at the end."""
    from fzoo.jobs.pipeline import Report, classify
    from fzoo.jobs.results import as_object

    sys.stdout.reconfigure(errors="surrogateescape")  # pyright: ignore  # names of files may be any bytes
    table, before, report = [], "[\n", Report()
    options |= {"labels": labels, "report": report}
    with watching() as watch:
        for name, classes in classify(module, variables, paths, watch=watch, **options):
            if as_json:
                print(before + as_object(name, classes), end="", flush=True)
                before = ",\n"
            else:
                rows = [(name, wnid, label, f"{p:.6f}") for wnid, label, p in classes]
                if sys.stdout.isatty():
                    table += rows
                else:
                    show((), rows)
                    sys.stdout.flush()  # who reads a pipe shall not wait for a full buffer
    if as_json:
        print("\n]")
    elif table:
        show(("image", "id", "label", "probability"), table)
    if report.images > 1 and sys.stderr.isatty():
        complain(str(report))
    if report.passed_over:
        complain(str(report.passed_over))
    finish(report.failed, report.images)


#: How many of the images that can't be read are named on standard error.
NAMED = 10


@contextlib.contextmanager
def watching() -> Iterator[Callable]:
    """Yield the `watch` of a job: a progress bar on a terminal, and the first images that can't be read."""
    shown = sys.stderr.isatty()
    bar = Progress(console=Console(stderr=True), disable=not shown, transient=True)
    with bar if shown else contextlib.nullcontext():  # some versions of rich end one that is not shown with a line
        task, failed = bar.add_task("images"), 0

        def watch(report: Report, failures: Sequence[tuple[str, str]]) -> None:
            nonlocal failed
            if report.images > 1:
                for _, error in failures[: max(0, NAMED - failed)]:
                    complain(f"skipped: {error}")
                failed += len(failures)
            bar.update(task, total=report.images, completed=report.before + report.done)

        yield watch


def finish(failed: int, count: int, out: Path | None = None) -> None:
    """Exit with code 1 where some of the images could not be read."""
    if failed:
        complain(f"{failed} of {count} images skipped" + (f": see {out}.errors.jsonl" if out else ""))
        raise typer.Exit(1)
