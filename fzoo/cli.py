"""The command line: what the Python functions do, as commands; `fzoo --help` lists them.

Results go to standard output: tables on a terminal, plain lines in a pipe.
Errors are one line on standard error, with exit code 2; 1 means that some of several images or files could not be had.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

#: Exit code after Ctrl-C.
INTERRUPTED = 130

app = typer.Typer(
    help="A functional model zoo for JAX: the image classifiers of keras.applications as pure Flax modules.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Name of the model; `fzoo list` shows them.")]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        help="'imagenet', a Keras file (.h5, .weights.h5, .keras), or the folder of a `fzoo finetune`, which says the "
        "model, too.",
    ),
]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels; the model's own if left out.")]
Classes = Annotated[int, typer.Option(help="Number of classes of the weights.")]
Labels = Annotated[
    Path | None, typer.Option(help="Names of the classes, one a line, where the weights are not ImageNet's.")
]
Option = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="An option of the model's family, e.g. -o alpha=0.5.")
]
Interpolation = Annotated[
    str | None, typer.Option(help="Of the resize: nearest (Keras's default), bilinear, bicubic, lanczos.")
]
Crop = Annotated[
    float | None,
    typer.Option(
        help="Cut out the centre instead of squeezing: how much of the resized shorter side is kept, e.g. 0.875."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images at once, on all devices together; for each 32 on a CPU and some 256 elsewhere if left out."
    ),
]
Devices = Annotated[
    int | None, typer.Option(min=1, help="How many of this machine's a batch is spread over; all if left out.")
]
Distributed = Annotated[
    str | None,
    typer.Option(
        help="Share the job with other processes, started alike, on one file system: auto with a cluster manager "
        "(SLURM, Open MPI, ...), else HOST:PORT,PROCESS,COUNT."
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads that decode; one for each core if left out.")]
ShardSize = Annotated[int | None, typer.Option(min=1, help="Images in a shard: what a killed job loses at most.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw away what another job on the same --out has done.")]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep compiled programs in the user's cache, for the next start.")
]
Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE...",
        help="Image files, folders, globs in quotes, .tar or .tar.gz archives, @FILE with such a path on each line.",
        show_default=False,
    ),
]


def main() -> None:
    """Run the command line; what is wrong with the arguments is one line, too."""
    try:
        with interruptible():
            code = app(standalone_mode=False)
    except Exception as e:
        if not hasattr(e, "format_message"):  # of the option parser's own errors
            raise
        complain(f"error: {e.format_message()} (--help shows the options)")  # pyright: ignore
        code = 2
    if code == INTERRUPTED:
        silence()
        os._exit(INTERRUPTED)  # XLA's threads still compute, and can crash while the interpreter is taken down
    sys.exit(code if isinstance(code, int) else 0)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """A Ctrl-C that comes while Python runs one of JAX's callbacks, whose exceptions it ignores, comes again."""
    report = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
        else:
            report(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report


def command(function: Callable) -> Callable:
    """Register a command whose bad input ends in one line and exit code 2."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader of a pipe has left: say nothing
            silence()
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from None
        except (ValueError, OSError, ImportError) as e:
            complain(f"error: {e}")
            silence()
            raise typer.Exit(2) from None

    return app.command(function.__name__.rstrip("_"), help=(function.__doc__ or "").split("\n\n")[0])(wrapped)


def silence() -> None:
    """Keep the interpreter's last flush of standard output from failing again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(line: str) -> None:
    """One line on standard error, whatever breaks the text has."""
    print(f"fzoo: {' '.join(line.split())}", file=sys.stderr, flush=True)


def show(headers: Sequence[str], rows: Sequence[Sequence[Any]], footer: str = "") -> None:
    """A table on a terminal; in a pipe a line for each row, its cells separated by tabs, without the headers."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(str(cell) for cell in row))
        if footer:
            print(footer)
        return
    table = Table(box=None, pad_edge=False)
    numeric = [
        all(str(row[i]).replace(",", "").replace(".", "").replace("-", "0").isdigit() for row in rows)
        for i in range(len(headers))
    ]
    for header, right in zip(headers, numeric, strict=True):
        table.add_column(header, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # a path may look like markup
    Console().print(table)
    if footer:
        print(footer)


@app.callback(invoke_without_command=True)
def before(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False
) -> None:
    """What comes without a command: the version, or the help."""
    if version:
        from fzoo._version import __version__

        print(f"fzoo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@command
def list_(pattern: Annotated[str, typer.Argument(help="Names to show, with wildcards, e.g. 'ResNet*'.")] = "*") -> None:
    """List the models: size, parameters, depth, and accuracy on ImageNet as Keras publishes it."""
    import fzoo

    names = fzoo.list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}: `fzoo list` shows all")
    specs = [fzoo.spec(name) for name in names]
    show(
        ("model", "input", "parameters", "depth", "MB", "top-1 %", "top-5 %"),
        [
            (
                s.name,
                s.input_size,
                f"{s.parameters:,}",
                s.depth,
                s.size_mb,
                f"{100 * s.top1:.1f}",
                "-" if s.top5 is None else f"{100 * s.top5:.1f}",
            )
            for s in specs
        ],
    )


@command
def info(name: Annotated[str, typer.Argument(help="Name of the model.")]) -> None:
    """Show what is known of a model: paper, licence, preprocessing, options, published files."""
    import fzoo
    from fzoo.registry import family_defaults

    s = fzoo.spec(name)
    options = family_defaults(s)
    rows = [
        ("name", s.name),
        ("paper", s.paper),
        ("licence of the weights", s.licence),
        ("input", f"{s.input_size} x {s.input_size}, at least {s.min_size} x {s.min_size}"),
        ("preprocessing", s.preprocessing),
        ("parameters", f"{s.parameters:,}"),
        ("depth", s.depth),
        ("size of the weights", f"{s.size_mb} MB"),
        ("ImageNet top-1, top-5", f"{s.top1:.1%}, {'not published' if s.top5 is None else f'{s.top5:.1%}'}"),
        ("options", ", ".join(f"{k}={v}" for k, v in options.items()) or "none"),
        *(("file", f"{f.url}  {f.hash or 'no hash published'}") for f in s.weight_files),
    ]
    for key, value in rows:
        print(f"{key:22}  {value}" if sys.stdout.isatty() else f"{key}\t{value}")


@command
def summary(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    include_top: Annotated[bool, typer.Option(help="With the classifier.")] = True,
    classes: Classes = 1000,
    size: Size = None,
    option: Option = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw its blocks instead: the .png or .svg file to write.")
    ] = None,
) -> None:
    """Show a model's layers in Keras's order: output shape, parameters, FLOPs, and what feeds each.

    FLOPs count 2 for each multiply-add of convolutions and dense layers, for one image.
    """
    import fzoo
    from fzoo.layers import trace
    from fzoo.picture import check_picture, save_picture

    if picture is not None:
        check_picture(picture, (".png", ".svg"))
    shape = None if size is None else (size, size, 3)
    options = parse_options(name, option)
    module = fzoo.create(name, include_top=include_top, classes=classes, input_shape=shape, **options)
    found = trace(module)
    count = found.parameters
    rows = [
        (n.name, n.kind, " x ".join(map(str, n.shape)), f"{count[n.name]:,}", f"{n.flops:,}", ", ".join(n.inputs))
        for n in found.layers
    ]
    total, flops = sum(count.values()), sum(n.flops for n in found.layers)
    height, width, _ = module.example_shape
    whole = f"{name} at {height} x {width}: {len(rows)} layers, {total:,} parameters, {flops / 1e9:.3f} GFLOPs an image"
    if picture is not None:
        save_picture(module, picture, title=whole)
        print(picture)
        return
    show(("layer", "class", "output", "parameters", "FLOPs", "from"), rows, whole)


@command
def classify(
    images: Images = None,
    model: Model = "MobileNetV2",
    weights: Weights = "imagenet",
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object for each image.")] = False,
    labels: Labels = None,
    out: Annotated[
        Path | None, typer.Option(help="The .jsonl, .csv or .parquet file to write, instead of printing.")
    ] = None,
    classes: Classes = 1000,
    size: Size = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    batch_size: BatchSize = None,
    devices: Devices = None,
    distributed: Distributed = None,
    workers: Workers = None,
    shard_size: ShardSize = None,
    restart: Restart = False,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Name what is in images. In a pipe: image, WordNet ID, label and probability, separated by tabs.

    With --out, the job can be interrupted: the same command goes on where it was.
    """
    from fzoo.devices import mesh
    from fzoo.results import check_out

    paths = some(images)
    if labels is not None:
        class_names(labels, classes)
    if out is not None:
        check_out(out, tapped=False)
        if as_json:
            raise ValueError("--json is for printing; --out FILE.jsonl has an object on each line")
    elif distributed or restart or shard_size:
        raise ValueError("--out FILE expected with --distributed, --restart or --shard-size")
    process = join_processes(distributed)
    prepare_process(cache)
    network = opened(model, weights, size, interpolation, crop, classes=classes, option=option)
    module, variables = network.module, network.variables
    names = class_names(labels, module.classes) if labels or not network.names else network.names
    options = {"preprocess": network.model, "top": top, "labels": names, "mesh": mesh(devices)}
    options |= {**network.reading, "batch_size": batch_size}
    if out is None:
        print_classes(module, variables, paths, as_json, workers=workers, **options)
        return
    options |= {"workers": workers, "shard_size": shard_size, "restart": restart, "process": process}
    report = batch_job(module, variables, paths, out, **options)
    if report.joined:
        show(("file", "report"), [(out, report)])
    finish(report.failed, report.images, out)


@command
def finetune(
    data: Annotated[
        Path, typer.Argument(metavar="DATA_DIR", help="A folder for each class, or train/ and val/ that hold these.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: metrics, curves, checkpoints, weights.")],
    model: Model = "MobileNetV2",
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="Of the backbone: 'imagenet', 'none' for random, or a file.")
    ] = "imagenet",
    phase: Annotated[
        list[str] | None,
        typer.Option(
            help="What trains, how long, and how, e.g. 'from_layer=mixed8 epochs=5 optimizer=sgd learning_rate=1e-4 "
            "momentum=0.9'; again for the next. See fzoo.Phase. If left out: the head alone, then the top of the "
            "backbone, 5 epochs each."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, where it was.")] = False,
    pooling: Annotated[str, typer.Option(help="Of the head: avg or max.")] = "avg",
    hidden: Annotated[int | None, typer.Option(min=1, help="Units of a hidden layer in the head.")] = None,
    dropout: Annotated[float, typer.Option(help="Before the last layer.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step, on all devices.")] = 32,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches whose gradients make one step.")] = 1,
    augment: Annotated[bool, typer.Option(help="Train on random, mirrored parts of the images.")] = False,
    label_smoothing: Annotated[float, typer.Option(help="How much of each label is spread over all classes.")] = 0.0,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute in bfloat16; parameters are float32.")] = False,
    validation_split: Annotated[float, typer.Option(help="Share held out where there is no val/.")] = 0.2,
    cache_features: Annotated[
        bool | None, typer.Option(help="Keep what the frozen part computes; where possible if left out.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps; by default at the end of epochs, and each 5 min of a long one.")
    ] = None,
    max_broken: Annotated[int, typer.Option(min=0, help="Unreadable images that are put up with.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 4,
    devices: Devices = None,
    distributed: Annotated[
        str | None,
        typer.Option(
            help="Train with other processes, started alike: auto with a cluster manager (SLURM, Open MPI, ...), else "
            "HOST:PORT,PROCESS,COUNT."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of all that is random.")] = 0,
    size: Size = None,
    interpolation: Annotated[str, typer.Option(help="Of the resize.")] = "bicubic",
    crop: Annotated[float, typer.Option(min=0, max=1, help="As in `classify`; 0 squeezes.")] = 0.875,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Adapt a pretrained model to other classes, in phases: first the new head, then the top of the backbone."""
    import jax.numpy as jnp

    import fzoo
    from fzoo.devices import mesh
    from fzoo.training import TWO_PHASES

    join_processes(distributed)
    phases = [parse_phase(text) for text in phase or ()] or TWO_PHASES
    options = parse_options(model, option)
    prepare_process(cache)
    result = fzoo.finetune(
        data,
        model,
        weights=None if weights == "none" else weights,
        out=out,
        phases=phases,
        head=fzoo.Head(pooling, hidden, dropout),
        size=size,
        interpolation=interpolation,
        crop=crop or None,
        augment=augment,
        batch_size=batch_size,
        accumulate=accumulate,
        label_smoothing=label_smoothing,
        dtype=jnp.bfloat16 if bfloat16 else jnp.float32,
        validation_split=validation_split,
        cache_features=cache_features,
        checkpoint_every=checkpoint_every,
        max_broken=max_broken,
        workers=workers,
        seed=seed,
        resume=resume,
        mesh=mesh(devices) if devices else None,
        report=complain,
        **options,
    )
    rows: list[tuple[str, Any]] = [("weights, as Keras h5", out / "model.h5"), ("curves", out / "curves.png")]
    if result.evaluation is not None:
        rows.insert(0, ("accuracy on held-out images", f"{result.evaluation.top1:.1%} of {result.evaluation.images}"))
    show(("", ""), rows)
    if result.broken:
        complain(f"{len(result.broken)} images could not be read")
        raise typer.Exit(1)


@command
def evaluate(
    data: Annotated[Path, typer.Argument(metavar="DATA_DIR", help="A folder for each class, e.g. ImageNet's val/.")],
    model: Model = "MobileNetV2",
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="'imagenet', a file, or the folder of a `fzoo finetune`.")
    ] = "imagenet",
    out: Annotated[Path | None, typer.Option(help="A .csv of the classes to write.")] = None,
    classes: Classes = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    max_broken: Annotated[int, typer.Option(min=0, help="Unreadable images that are put up with.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 4,
    size: Size = None,
    interpolation: Annotated[str | None, typer.Option(help="Of the resize: bicubic if left out.")] = None,
    crop: Annotated[
        float | None, typer.Option(help="Share of the shorter side that is seen: 0.875 if left out, 0 squeezes.")
    ] = None,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Measure a classifier on labelled images: top-1, top-5, loss, each class; with the accuracy that Keras publishes.

    Folders are named as the classes: ImageNet's by their WordNet IDs.
    """
    import numpy as np

    import fzoo
    from fzoo.data import Broken, Recipe, in_order, read_folder
    from fzoo.runs import is_run
    from fzoo.weights.files import replacing

    if out is not None and out.suffix != ".csv":
        raise ValueError(f"--out {out}: a name that ends in .csv expected")
    prepare_process(cache)
    published = classes == 1000 and not is_run(weights)
    usual = {"interpolation": "bicubic", "crop": 0.875}
    network = opened(model, weights, size, interpolation, crop, classes=classes, option=option, usual=usual)
    names = [label if id == "-" else id for id, label in network.names or class_names(None, classes)]
    recipe = Recipe(**network.reading)
    broken = Broken(max_broken, complain)
    files = relabelled(read_folder(data, recipe, broken, least=1), names)
    module, variables = fzoo.optimize_for_inference(network.module, network.variables)
    found = fzoo.evaluate(
        module, variables, in_order(files, batch_size, workers), preprocess=network.model, batch_size=batch_size
    )
    s = fzoo.spec(network.model)
    rows = [
        ("images", f"{found.images:,} of {len(set(files.labels.tolist()))} classes"),
        ("recipe", str(recipe)),
        ("top-1", f"{found.top1:.2%}" + (f" (Keras publishes {s.top1:.1%} on ImageNet)" if published else "")),
        ("top-5", f"{found.top5:.2%}" + (f" (Keras publishes {s.top5:.1%})" if published and s.top5 else "")),
        ("loss", f"{found.mean_loss:.4f}"),
    ]
    seen = np.flatnonzero(found.confusion.sum(1))
    worst = sorted(seen, key=lambda i: found.recall[i])
    table = [(names[i], int(found.confusion[i].sum()), f"{found.recall[i]:.2%}") for i in worst]
    if out is not None:
        with replacing(out) as temporary:
            temporary.write_text(
                "class,images,top1\n" + "".join(f"{n},{c},{r}\n" for n, c, r in table), encoding="utf-8"
            )
    show(("", ""), rows)
    if out is None or not sys.stdout.isatty():
        show(("class", "images", "top-1"), table)
    finish(len(broken.paths), len(files.paths))


@command
def convert(
    source: Annotated[
        Path, typer.Argument(help="A Keras file, .safetensors, or the directory of an Orbax checkpoint.")
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(help="What to write: .h5, .weights.h5, .keras, .safetensors, or .orbax for a checkpoint."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name of the model; a Keras file tells it if left out.")
    ] = None,
    include_top: Annotated[bool, typer.Option(help="Whether the weights have the classifier.")] = True,
    classes: Classes = 1000,
    option: Option = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a Keras file is, and write nothing.")] = False,
) -> None:
    """Write weights as another kind of file; with --dry-run say what a file is, and which models it fits."""
    from fzoo.convert import convert, inspect_weights

    if dry_run:
        report = inspect_weights(source)
        fit = report.fits[0] if report.fits else None
        goes_to = {array: variable for array, variable, _ in fit.arrays} if fit else {}
        show(
            ("layer", "array", "shape", "dtype", "variable"),
            [
                (layer, array, " x ".join(map(str, shape)) or "scalar", dtype, goes_to.get(array, "-"))
                for layer, array, shape, dtype in report.arrays
            ],
            f"{source}: {report.layout}, {len(report.arrays)} arrays, {report.parameters:,} values; "
            f"fits {'; '.join(map(str, report.fits)) or 'no model of fzoo list'}",
        )
        return
    if destination is None:
        raise ValueError("the name of a file to write expected, or --dry-run")
    options: dict[str, Any] = {}
    if model is not None:
        options = {"include_top": include_top, **({"classes": classes} if include_top else {})}
        options |= parse_options(model, option)
    elif option or not include_top or classes != 1000:
        raise ValueError("--model NAME expected with --option, --no-include-top or --classes")
    module = convert(source, destination, model, **options)
    print(f"{destination}: {type(module).__name__}" if sys.stdout.isatty() else destination)


@command
def features(
    images: Images = None,
    layer: Annotated[
        list[str] | None, typer.Option(help="A Keras layer, e.g. block4_pool; may be given again.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The .npz, .h5 or .parquet file to write.")] = None,
    model: Model = "MobileNetV2",
    weights: Weights = "imagenet",
    include_top: Annotated[bool, typer.Option(help="Whether the weights have the classifier.")] = True,
    classes: Classes = 1000,
    size: Size = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    batch_size: BatchSize = None,
    devices: Devices = None,
    distributed: Distributed = None,
    workers: Workers = None,
    shard_size: ShardSize = None,
    restart: Restart = False,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Write the outputs of layers for images: an array for each layer, and `images`, their paths.

    The job can be interrupted: the same command goes on where it was.
    """
    from fzoo.devices import mesh
    from fzoo.results import check_out

    paths = some(images)
    if not layer or out is None:
        raise ValueError("--layer NAME and --out FILE.npz expected; `fzoo summary MODEL` shows the layers")
    check_out(out, tapped=True)
    process = join_processes(distributed)
    prepare_process(cache)
    network = opened(model, weights, size, interpolation, crop, classes=classes, option=option, include_top=include_top)
    module, variables = network.module, network.variables
    options = {"preprocess": network.model, "mesh": mesh(devices), "workers": workers, "shard_size": shard_size}
    options |= {**network.reading, "batch_size": batch_size}
    report = batch_job(module, variables, paths, out, layers=layer, restart=restart, process=process, **options)
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
    model: Model = "MobileNetV2",
    weights: Weights = "imagenet",
    labels: Labels = None,
    classes: Classes = 1000,
    size: Size = None,
    interpolation: Interpolation = None,
    crop: Crop = None,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Show where in an image classes are seen (Grad-CAM), and the feature maps of a layer, as PNG.

    In a pipe: file, WordNet ID, label and probability of each class, separated by tabs.
    """
    import numpy as np
    from PIL import Image

    import fzoo
    from fzoo.explain import map_layer, side_by_side
    from fzoo.picture import check_picture
    from fzoo.preprocessing import load_image
    from fzoo.weights.files import replacing

    if out is None and sheet is None:
        raise ValueError("--out FILE.png or --sheet FILE.png expected")
    for path in filter(None, (out, sheet)):
        check_picture(path)
    whole = load_image(image)
    prepare_process(cache)
    network = opened(model, weights, size, interpolation, crop, classes=classes, option=option)
    module, variables, model = network.module, network.variables, network.model
    names: Sequence[tuple[str, str]] = []
    if out or labels:
        names = network.names or class_names(labels, module.classes)
    chosen = [class_number(each, names) for each in class_ or ()] if out else []
    pixels = load_image(image, **network.reading)
    layer = map_layer(module, layer).name
    rows = []
    with contextlib.ExitStack() as files:
        temporary = {path: files.enter_context(replacing(path)) for path in (out, sheet) if path}
        if out:
            found = fzoo.explain(
                module,
                variables,
                pixels[None],
                top=min(top, module.classes),
                classes=chosen or None,
                layer=layer,
                preprocess=model,
            )
            shown = shrunk(whole, 360)
            panels = [(shown, image.name)]
            numbers, probabilities, heats = (np.asarray(each[0]) for each in found)
            for i, p, heat in zip(numbers, probabilities, heats, strict=True):
                wnid, label = names[i]
                panels.append((np.asarray(fzoo.overlay(shown, heat)), f"{label}  {p:.1%}"))
                rows.append((out, wnid, label, f"{p:.6f}"))
            side_by_side(panels).save(temporary[out])
        if sheet:
            maps = fzoo.features(module, variables, pixels[None], layer, preprocess=model)[layer][0]
            Image.fromarray(np.asarray(fzoo.feature_sheet(maps, channels=channels))).save(temporary[sheet])
            rows.append((sheet, "-", layer, "-"))
    show(("picture", "id", "label", "probability"), rows)


@command
def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Models, with wildcards, e.g. 'ResNet*'.", show_default=False),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All models.")] = False,
    include_top: Annotated[
        bool | None, typer.Option(help="Only the files with the classifier, or only those without; both if left out.")
    ] = None,
    size: Size = None,
    option: Option = None,
) -> None:
    """Fill the cache for a machine without a network: with the published files of models, and ImageNet's class names.

    In a pipe: path, bytes, whether it was cached or downloaded, and what was checked, separated by tabs. The cache is
    Keras's: $KERAS_HOME/models, or ~/.keras/models. The environment variable FZOO_WEIGHTS_URL names a mirror.
    """
    import fzoo
    from fzoo.labels import CLASS_INDEX_HASH, CLASS_INDEX_URL
    from fzoo.registry import needed, proof_of, published
    from fzoo.weights.download import UNPROVEN, Proof, cache_dir, cached, fetch

    if bool(names) == every:
        raise ValueError("names of models or --all expected; `fzoo list` shows the names")
    found: dict[str, None] = {}
    for name in names or ["*"]:
        found |= dict.fromkeys(fzoo.list_models(name) or [fzoo.spec(name).name])
    shape = None if size is None else (size, size, 3)
    files: dict[str, tuple[str, Proof]] = {}  # the URL of each name, and what it is known by
    megabytes = 0
    for name in found:
        options = needed(name) | parse_options(name, option)
        for top in (True, False) if include_top is None else (include_top,):
            module = fzoo.create(name, include_top=top, input_shape=shape, **options)
            file = published(name, module)
            files[file.name] = file.url, proof_of(file, module)
            megabytes += fzoo.spec(name).size_mb
    if include_top is not False:
        files[CLASS_INDEX_URL.rsplit("/", 1)[1]] = CLASS_INDEX_URL, CLASS_INDEX_HASH
    if sys.stderr.isatty():
        complain(f"{len(files)} files, about {megabytes:,} MB, in {cache_dir()}")
    failed = 0
    for name, (url, proof) in files.items():
        try:
            path = cached(name, proof)
            state = "cached" if path else "downloaded"
            path = path or fetch(url, name, proof)
            length = path.stat().st_size
        except OSError as e:
            complain(str(e))
            failed += 1
        else:
            checked = "hash is right" if isinstance(proof, str) else UNPROVEN
            at_terminal = f"{path}  {length / 1e6:,.1f} MB  {state}"  # `fetch` says there what was checked
            print(at_terminal if sys.stdout.isatty() else f"{path}\t{length}\t{state}\t{checked}", flush=True)
    if failed:
        complain(f"{failed} of {len(files)} files could not be had")
        raise typer.Exit(2 if failed == len(files) else 1)


@command
def export(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    out: Annotated[Path, typer.Argument(help="The .stablehlo file to write.")],
    weights: Weights = "imagenet",
    platform: Annotated[
        list[str] | None, typer.Option(help="cpu, cuda, rocm or tpu; may be given again. cpu, cuda, tpu if left out.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a call; any number if left out.")] = None,
    preprocess: Annotated[
        bool, typer.Option("--preprocess", help="Take pixels of uint8, and preprocess them in the program.")
    ] = False,
    optimize: Annotated[bool, typer.Option(help="Fold batch normalisation into the kernels.")] = True,
    include_top: Annotated[
        bool,
        typer.Option("--include-top/--no-include-top", " /--no-top", help="Whether the weights have the classifier."),
    ] = True,
    classes: Classes = 1000,
    size: Size = None,
    option: Option = None,
) -> None:
    """Write a model and its weights as one file of StableHLO, which JAX runs without fzoo.

    In a pipe: file, input, output, platforms and MB, separated by tabs.
    """
    import fzoo
    from fzoo.export import check_target

    platforms = check_target(out, platform or ("cpu", "cuda", "tpu"))
    module, variables, _ = load_model(name, weights, size, classes=classes, option=option, include_top=include_top)
    if optimize:
        # Kernels that are kept as a CPU wants them would be the only ones in the file, for all platforms.
        target = platforms[0] if len(platforms) == 1 else "several"
        module, variables = fzoo.optimize_for_inference(module, variables, platform=target)
    exported = fzoo.export(
        module, variables, out, platforms=platforms, preprocess=name if preprocess else None, batch_size=batch
    )
    takes, gives = (aval.str_short(short_dtypes=False) for aval in (*exported.in_avals, *exported.out_avals))
    megabytes = f"{out.stat().st_size / 1e6:,.1f}"
    show(("file", "input", "output", "platforms", "MB"), [(out, takes, gives, ", ".join(platforms), megabytes)])


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it writes.")] = Path("digits"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training digits.")] = 20,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the split, the initial weights and the order.")
    ] = 0,
) -> None:
    """Train a small MobileNet on handwritten digits, save it for Keras, load it back, classify. Needs no network."""
    from fzoo import demo

    out.mkdir(parents=True, exist_ok=True)
    print(f"training MobileNet (alpha 0.25) on handwritten digits, {epochs} epochs; compiling first", flush=True)

    def report(epoch: int, loss: float) -> None:
        print(f"epoch {epoch:2d}/{epochs}  loss {loss:.4f}", flush=True)

    result = demo.run(out, epochs=epochs, seed=seed, report=report)
    print(f"accuracy on held-out digits  {result.accuracy:.1%}")
    print(f"weights, as Keras h5         {result.weights}")
    print(f"picture of the results       {result.picture}")
    options = "-m MobileNet -o alpha=0.25 --size 32 --classes 10"
    print(f"next: fzoo classify {result.examples[7]} -w {result.weights} {options}")


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
) -> None:
    """Measure fzoo beside other engines, which take turns, each in a process of its own."""
    from fzoo.bench import bench as measure
    from fzoo.bench import report as reports
    from fzoo.bench.worker import ENGINES
    from fzoo.layers import unknown

    if reference not in ENGINES:
        raise ValueError(unknown("engine", reference, ENGINES, show=len(ENGINES)))
    if report is not None:
        rows = reports.read(report)["rows"]
        show(*reports.table(rows, reference, narrow=sys.stdout.isatty()))
        reports.plot(report, rows)
        return
    if out is not None:
        reports.check(out)
    status = Console(stderr=True).status("", spinner="line") if sys.stderr.isatty() else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which stops what was started, and removes its files

    def finished(rows: list[Any], machine: Any) -> None:
        if out is not None:
            reports.write(out, rows, machine, reference)

    with status or contextlib.nullcontext():
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
            progress=status.update if status else lambda line: None,
        )
    show(*reports.table(rows, reference, narrow=sys.stdout.isatty()))
    if out is not None:
        reports.plot(out, reports.read(out)["rows"])
    failed = [row for row in rows if row["status"] == "error"]
    for row in failed:
        complain(f"{row['model']}, batch {row['batch']}, {row['engine']}: {row['reason']}")
    if failed:
        raise typer.Exit(1)


def prepare_process(cache: bool) -> None:
    """Settings for a process that is our own: memory is kept, and so are compiled programs unless `cache` is off."""
    from fzoo.runtime import enable_compilation_cache, reuse_memory

    reuse_memory()
    if cache:
        try:
            enable_compilation_cache()
        except OSError as e:
            complain(f"no compilation cache: {e} (--no-cache does without)")


def some(images: Sequence[Path] | None) -> Sequence[Path]:
    """The images asked for; none is an error."""
    if not images:
        raise ValueError("no images given: `fzoo classify IMAGE...` takes one path or more")
    return images


def parse_phase(text: str) -> Any:
    """A `fzoo.Phase` from 'NAME=VALUE NAME=VALUE'; what is none of its fields is the optimizer's."""
    import dataclasses

    import fzoo

    fields = {field.name for field in dataclasses.fields(fzoo.Phase)} - {"options"}
    known: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for part in text.replace(",", " ").split():
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise ValueError(f"--phase {text!r} given, NAME=VALUE pairs expected, e.g. 'trains=head epochs=5'")
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value  # a name
        (known if name in fields else options)[name] = parsed
    return fzoo.Phase(**known, options=options)


def relabelled(files: Any, names: Sequence[str]) -> Any:
    """Images whose labels are the places of their folders' names among a classifier's classes."""
    import dataclasses

    import numpy as np

    from fzoo.layers import unknown

    places = {name: i for i, name in enumerate(names)}
    if all(name.isdigit() for name in names) and len(files.class_names) == len(names):
        places = {name: i for i, name in enumerate(files.class_names)}  # a classifier without names: in their order
    for name in files.class_names:
        if name not in places:
            raise ValueError(f"{unknown('class folder', name, places)} (the folders are named as the classes)")
    order = np.array([places[name] for name in files.class_names], np.int32)
    return dataclasses.replace(files, labels=order[files.labels], class_names=tuple(names))


def parse_options(model: str, options: Sequence[str] | None) -> dict[str, Any]:
    """Options of a model's family from NAME=VALUE, the value as in Python."""
    import fzoo
    from fzoo.layers import unknown
    from fzoo.registry import family_defaults

    known, parsed = family_defaults(fzoo.spec(model)), {}
    for text in options or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text!r} given, NAME=VALUE expected, e.g. alpha=0.5")
        if key not in known:
            raise ValueError(unknown(f"option of {model}", key, known or ["none"]))
        try:
            parsed[key] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"--option {text!r} given, a number, True or False, or a tuple expected") from None
    return parsed


class Opened(NamedTuple):
    """A network, and how it wants its images.

    Attributes:
        module, variables: the network.
        model: the name for `preprocess_input`.
        names: (WordNet ID or "-", label) of the classes, where the weights tell.
        reading: "size", "interpolation" and "crop" for `load_image`.
    """

    module: Any
    variables: Any
    model: str
    names: Sequence[tuple[str, str]] | None
    reading: dict[str, Any]


def opened(
    model: str,
    weights: str,
    size: int | None,
    interpolation: str | None,
    crop: float | None,
    *,
    usual: Mapping[str, Any] | None = None,
    **options: Any,
) -> Opened:
    """What `load_model` gives, or what a fine-tuning made, with its own classes and recipe.

    Args:
        usual: how images are read where neither the user nor a fine-tuning says it; as Keras's `load_img` by default.
        model, weights, size, interpolation, crop, **options: of the command.
    """
    from fzoo.runs import is_run, load_run

    names, reading = None, dict(usual or {"interpolation": "nearest", "crop": None})
    if is_run(weights):
        run = load_run(weights)
        module, variables, model = run.module, run.variables, run.model
        if size is not None and (size, size) != run.recipe.size:
            raise ValueError(
                f"--size {size} given, {weights} was trained on {run.recipe.size[0]} x {run.recipe.size[1]}"
            )
        names = [("-", name) for name in run.class_names]
        reading = {"size": run.recipe.size, "interpolation": run.recipe.interpolation, "crop": run.recipe.crop}
    else:
        module, variables, side = load_model(model, weights, size, **options)
        reading["size"] = (side, side)
    given = {"interpolation": interpolation, "crop": crop}
    reading |= {name: value or None for name, value in given.items() if value is not None}  # a crop of 0 squeezes
    return Opened(module, variables, model, names, reading)


def load_model(
    model: str,
    weights: str,
    size: int | None,
    *,
    option: Sequence[str] | None,
    include_top: bool = True,
    classes: int = 1000,
) -> tuple[Any, Any, int]:
    """(module, variables, size of its images)."""
    import fzoo

    size = fzoo.spec(model).input_size if size is None else size
    options = {
        "input_shape": (size, size, 3),
        "include_top": include_top,
        "classes": classes,
        **parse_options(model, option),
    }
    return *fzoo.load(model, weights=weights, **options), size


@functools.cache
def class_names(labels: Path | None, classes: int) -> Sequence[tuple[str, str]]:
    """(WordNet ID, label) of each class: ImageNet's, those of a file, or the bare number."""
    if labels is not None:
        try:
            names = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{labels} is not a text file, one name a line expected") from None
        if len(names) != classes:
            raise ValueError(f"{labels} has {len(names)} names, {classes} expected, one a line")
        return [("-", name) for name in names]
    if classes != 1000:
        return [("-", str(i)) for i in range(classes)]
    from fzoo.labels import class_index

    return class_index()


def class_number(text: str, names: Sequence[tuple[str, str]]) -> int:
    """The class of a label, a WordNet ID or a number."""
    from fzoo.layers import unknown

    if text.isdecimal() and int(text) < len(names):
        return int(text)
    plain = text.lower().replace(" ", "_")
    for i, name in enumerate(names):
        if plain in (each.lower().replace(" ", "_") for each in name):
            return i
    raise ValueError(unknown("class", text, [label for _, label in names]))


def shrunk(pixels: Any, side: int) -> Any:
    """An image at most so many pixels wide and high."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    return np.asarray(image)


def join_processes(distributed: str | None) -> tuple[int, int]:
    """(number of this process, how many there are)."""
    from fzoo.devices import start_distributed

    return (0, 1) if distributed is None else start_distributed(distributed)


def batch_job(module: Any, variables: Any, paths: Sequence[Path], out: Path, **options: Any) -> Any:
    """`run_job` with a progress bar; the first images that can't be read are named."""
    from fzoo.jobs import run_job

    with watching() as watch:
        report = run_job(module, variables, paths, out, watch=watch, **options)
    if not report.joined:
        complain(f"this process's share of {out} is done; the last process to be done puts all together")
    return report


def print_classes(
    module: Any,
    variables: Any,
    paths: Sequence[Path],
    as_json: bool,
    *,
    labels: Sequence[tuple[str, str]],
    **options: Any,
) -> None:
    """Print the likeliest classes as they come; on a terminal as a table at the end."""
    from fzoo.jobs import Report, classify
    from fzoo.results import as_object

    sys.stdout.reconfigure(errors="surrogateescape")  # pyright: ignore  # names of files may be any bytes
    table, before, report = [], "[\n", Report()
    options |= {"labels": labels, "report": report}
    with watching() as watch:
        for name, found in classify(module, variables, paths, watch=watch, **options):
            if as_json:
                print(before + as_object(name, found), end="", flush=True)
                before = ",\n"
            else:
                rows = [(name, wnid, label, f"{p:.6f}") for wnid, label, p in found]
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
    finish(report.failed, report.images)


#: How many of the images that can't be read are named on standard error.
NAMED = 10


@contextlib.contextmanager
def watching() -> Iterator[Callable]:
    """The `watch` of a job: a progress bar on a terminal, and the first images that can't be read."""
    bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True)
    with bar:
        task, failed = bar.add_task("images"), 0

        def watch(report: Any, failures: Sequence[tuple[str, str]]) -> None:
            nonlocal failed
            if report.images > 1:
                for _, error in failures[: max(0, NAMED - failed)]:
                    complain(f"skipped: {error}")
                failed += len(failures)
            bar.update(task, total=report.images, completed=report.before + report.done)

        yield watch


def finish(failed: int, count: int, out: Path | None = None) -> None:
    """Exit code 1 where some of the images could not be read."""
    if failed:
        complain(f"{failed} of {count} images skipped" + (f": see {out}.errors.jsonl" if out else ""))
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
