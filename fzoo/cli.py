"""The command line: `fzoo list | info | summary | classify | features | convert | download | export | demo | bench`.

It offers what the Python functions do. Results go to standard output: tables on a terminal, plain lines in a pipe.
Errors are one line on standard error, with exit code 2; 1 means that some of several images or files could not be had.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

app = typer.Typer(
    help="A functional model zoo for JAX: the image classifiers of keras.applications as pure Flax modules.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Name of the model; `fzoo list` shows them.")]
Weights = Annotated[
    str, typer.Option("--weights", "-w", help="'imagenet', or the path of a Keras file (.h5, .weights.h5, .keras).")
]
Size = Annotated[int | None, typer.Option(help="Height and width in pixels; the model's own if left out.")]
Classes = Annotated[int, typer.Option(help="Number of classes of the weights.")]
Option = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="An option of the model's family, e.g. -o alpha=0.5.")
]
Interpolation = Annotated[
    str, typer.Option(help="Of the resize: nearest (Keras's default), bilinear, bicubic, lanczos.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]
Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep compiled programs in the user's cache, for the next start.")
]
Images = Annotated[list[Path] | None, typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)]


def main() -> None:
    """Run the command line; what is wrong with the arguments is one line, too."""
    try:
        code = app(standalone_mode=False)
    except Exception as e:
        if not hasattr(e, "format_message"):  # of the option parser's own errors
            raise
        complain(f"error: {e.format_message()} (--help shows the options)")  # pyright: ignore
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


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
            raise typer.Exit(130) from None
        except (ValueError, OSError, ModuleNotFoundError) as e:
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
) -> None:
    """Show a model's layers in Keras's order: output shape, parameters, FLOPs, and what feeds each.

    FLOPs count 2 for each multiply-add of convolutions and dense layers, for one image.
    """
    import jax

    import fzoo
    from fzoo.layers import trace

    shape = None if size is None else (size, size, 3)
    options = parse_options(name, option)
    module = fzoo.create(name, include_top=include_top, classes=classes, input_shape=shape, **options)
    found = trace(module)
    count = {
        node.name: sum(leaf.size for tree in found.variables.values() for leaf in jax.tree.leaves(tree.get(node.name)))
        for node in found.layers
    }
    rows = [
        (n.name, n.kind, " x ".join(map(str, n.shape)), f"{count[n.name]:,}", f"{n.flops:,}", ", ".join(n.inputs))
        for n in found.layers
    ]
    total, flops = sum(count.values()), sum(n.flops for n in found.layers)
    height, width, _ = module.example_shape
    show(
        ("layer", "class", "output", "parameters", "FLOPs", "from"),
        rows,
        f"{name} at {height} x {width}: {len(rows)} layers, {total:,} parameters, {flops / 1e9:.3f} GFLOPs an image",
    )


@command
def classify(
    images: Images = None,
    model: Model = "MobileNetV2",
    weights: Weights = "imagenet",
    top: Annotated[int, typer.Option(min=1, help="Classes to show for each image.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array, an object for each image.")] = False,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line, where the weights are not ImageNet's.")
    ] = None,
    classes: Classes = 1000,
    size: Size = None,
    interpolation: Interpolation = "nearest",
    batch_size: BatchSize = 32,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Name what is in images. In a pipe: image, WordNet ID, label and probability, separated by tabs."""
    import numpy as np

    import fzoo

    paths = some(images)
    if labels is not None:
        class_names(labels, classes)
    prepare_process(cache)
    module, variables, size = load_model(model, weights, size, classes=classes, option=option)
    names = class_names(labels, classes)
    results, cut = [], min(batch_size, len(paths))
    for batch, pixels in read_batches(paths, size, interpolation, batch_size, skipped := []):
        p = np.asarray(fzoo.predict(module, variables, pixels, batch_size=cut, preprocess=model))
        best = np.argsort(-p, axis=1, kind="stable")[:, :top]
        for path, row, indices in zip(batch, p, best, strict=True):
            results.append((path, [(*names[i], float(row[i])) for i in indices]))
    if as_json:
        objects = [
            {
                "image": str(path),
                "predictions": [dict(zip(("wnid", "label", "probability"), each, strict=True)) for each in found],
            }
            for path, found in results
        ]
        print("[\n" + ",\n".join(json.dumps(each) for each in objects) + "\n]")
    else:
        show(
            ("image", "id", "label", "probability"),
            [(path, wnid, label, f"{p:.6f}") for path, found in results for wnid, label, p in found],
        )
    finish(skipped, len(paths))


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
    out: Annotated[Path | None, typer.Option(help="The .npz file to write.")] = None,
    model: Model = "MobileNetV2",
    weights: Weights = "imagenet",
    include_top: Annotated[bool, typer.Option(help="Whether the weights have the classifier.")] = True,
    classes: Classes = 1000,
    size: Size = None,
    interpolation: Interpolation = "nearest",
    batch_size: BatchSize = 32,
    option: Option = None,
    cache: Cache = True,
) -> None:
    """Write the outputs of layers for images to an .npz: an array for each layer, and `images`, their paths."""
    import numpy as np

    import fzoo
    from fzoo.weights.files import replacing

    paths = some(images)
    if not layer or out is None:
        raise ValueError("--layer NAME and --out FILE.npz expected; `fzoo summary MODEL` shows the layers")
    if out.suffix != ".npz":
        raise ValueError(f"--out {out}: a name that ends in .npz expected")
    prepare_process(cache)
    module, variables, size = load_model(model, weights, size, classes=classes, option=option, include_top=include_top)
    read, parts, cut = [], [], min(batch_size, len(paths))
    with replacing(out) as temporary:
        for batch, pixels in read_batches(paths, size, interpolation, batch_size, skipped := []):
            found = fzoo.features(module, variables, pixels, layer, batch_size=cut, preprocess=model)
            parts.append({name: np.asarray(array) for name, array in found.items()})
            read += map(str, batch)
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, images=np.array(read), **arrays)
    show(("layer", "array"), [(name, f"{array.dtype} {array.shape}") for name, array in arrays.items()])
    finish(skipped, len(paths))


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
    seconds: Annotated[float, typer.Option(min=0.01, help="Of calls, for each engine, model and batch size.")] = 3.0,
    devices: Annotated[int, typer.Option(min=1, help="How many of JAX's a batch is spread over.")] = 1,
    size: Size = None,
    reference: Annotated[str, typer.Option(help="The engine that ratios are given to.")] = "keras-jax",
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
            seconds=seconds,
            devices=devices,
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


def read_batches(
    paths: Sequence[Path], size: int, interpolation: str, batch_size: int, skipped: list[Path]
) -> Iterator[tuple[list[Path], Any]]:
    """Images in batches, (their paths, uint8 pixels); those that can't be read are reported and put into `skipped`."""
    import numpy as np

    from fzoo.preprocessing import INTERPOLATIONS, load_image

    if interpolation not in INTERPOLATIONS:
        load_image(paths[0], size, interpolation)  # says so
    starts = range(0, len(paths), batch_size)
    hidden = len(starts) == 1 or not sys.stderr.isatty()
    for start in track(starts, "images", console=Console(stderr=True), disable=hidden):
        good, pixels = [], []
        for path in paths[start : start + batch_size]:
            try:
                pixels.append(load_image(path, size, interpolation))
                good.append(path)
            except (ValueError, OSError) as e:
                if len(paths) == 1:
                    raise
                complain(f"skipped: {e}")
                skipped.append(path)
        if good:
            yield good, np.stack(pixels)
    if len(skipped) == len(paths):
        raise ValueError(f"none of the {len(paths)} images could be read")


def finish(skipped: Sequence[Path], count: int) -> None:
    """Exit code 1 where some of the images could not be read."""
    if skipped:
        complain(f"{len(skipped)} of {count} images skipped")
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
