"""`fzoo convert`, `download`, `export`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fzoo.cli.console import command, complain, show
from fzoo.cli.loading import load_network, report_taken
from fzoo.cli.options import Classes, Network, Option, Preprocess, Reading, Size, Weights, parse_options


@command
def convert(
    source: Annotated[
        Path, typer.Argument(help="A Keras file, .safetensors, .pth, an Orbax checkpoint, or a run's folder.")
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(help="What to write: .h5, .weights.h5, .keras, .safetensors, or .orbax for a checkpoint."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name of the model; the file tells it if left out.")
    ] = None,
    include_top: Annotated[bool, typer.Option(help="Whether the weights have the classifier.")] = True,
    classes: Classes = None,
    option: Option = None,
    layout: Annotated[
        Literal["keras", "torch", "timm", "torchvision"],
        typer.Option(help="Of a .safetensors file: torch for what load_state_dict of timm or torchvision takes."),
    ] = "keras",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what a file is, and write nothing.")] = False,
) -> None:
    """Write weights as another kind of file; with --dry-run say what a file is, and which models it fits."""
    from fzoo.convert import convert, inspect_weights
    from fzoo.weights import read_description

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
            f"{source}: {report.layout}, {len(report.arrays)} arrays, {report.parameters:,} values; {report}",
        )
        return
    if destination is None:
        raise ValueError("the name of a file to write expected, or --dry-run")
    options: dict[str, Any] = {}
    if model is not None:
        options = parse_options(model, option)
        options |= {} if include_top else {"include_top": False}
        options |= {} if classes is None else {"classes": classes}
    elif option or not include_top or classes is not None:
        raise ValueError("--model NAME expected with --option, --no-include-top or --classes")
    module = convert(source, destination, model, layout, **options)
    if model is not None and read_description(source) is None:
        report_taken(str(source), model, options, module)
    print(f"{destination}: {type(module).__name__}" if sys.stdout.isatty() else destination)


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
    from fzoo.images.labels import CLASS_INDEX_HASH, CLASS_INDEX_URL
    from fzoo.pretrained.imagenet import needed, proof_of, published
    from fzoo.weights.download import Proof, cache_dir, cached_file, checked_by, fetch

    if bool(names) == every:
        raise ValueError("names of models or --all expected; `fzoo list` shows the names")
    selected: dict[str, None] = {}
    for name in names or ["*"]:
        matching = fzoo.list_models(name) or [fzoo.spec(name).name]
        selected |= dict.fromkeys(name for name in matching if fzoo.spec(name).weight_files or name in (names or []))
    shape = None if size is None else (size, size, 3)
    files: dict[str, tuple[str, Proof]] = {}  # the URL of each name, and what it is known by
    megabytes = 0
    for name in selected:
        options = needed(name) | parse_options(name, option)
        for top in (True, False) if include_top is None else (include_top,):
            module = fzoo.create(name, include_top=top, input_shape=shape, **options)
            file = published(name, module)
            if file.name not in files:  # a state dict is for both
                megabytes += fzoo.spec(name).size_mb
            files[file.name] = file.url, proof_of(file, module)
    if include_top is not False:
        files[CLASS_INDEX_URL.rsplit("/", 1)[1]] = CLASS_INDEX_URL, CLASS_INDEX_HASH
    if sys.stderr.isatty() or every:
        complain(f"{len(files)} files, about {megabytes:,} MB, in {cache_dir()}")
    failed = 0
    for name, (url, proof) in files.items():
        try:
            path = cached_file(name, proof)
            state = "cached" if path else "downloaded"
            path = path or fetch(url, name, proof)
            length = path.stat().st_size
        except OSError as e:
            complain(str(e))
            failed += 1
        else:
            at_terminal = f"{path}  {length / 1e6:,.1f} MB  {state}"  # `fetch` says there what was checked
            print(at_terminal if sys.stdout.isatty() else f"{path}\t{length}\t{state}\t{checked_by(proof)}", flush=True)
    if failed:
        complain(f"{failed} of {len(files)} files could not be had")
        raise typer.Exit(2 if failed == len(files) else 1)


@command
def export(
    name: Annotated[
        str,
        typer.Argument(help="Name of the model, the file of a whole model that Keras saved, or the folder of a run."),
    ],
    out: Annotated[Path, typer.Argument(help="The .stablehlo or .onnx file to write.")],
    weights: Weights = "imagenet",
    platform: Annotated[
        list[str] | None,
        typer.Option(help="Of StableHLO: cpu, cuda, rocm or tpu; may be given again. All but rocm if left out."),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in a call; any number if left out.")] = None,
    pixels: Annotated[
        bool,
        typer.Option(
            "--pixels",
            help="Take pixels of uint8, and preprocess them in the program; --preprocess means it, too.",
        ),
    ] = False,
    preprocess: Preprocess = None,
    optimize: Annotated[bool, typer.Option(help="Fold batch normalisation into the kernels.")] = True,
    include_top: Annotated[
        bool,
        typer.Option("--include-top/--no-include-top", " /--no-top", help="Whether the weights have the classifier."),
    ] = True,
    classes: Classes = None,
    size: Size = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Leave the height and the width open, in StableHLO.")
    ] = False,
    option: Option = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="A Keras layer whose output is wanted instead of the network's; may be given again."),
    ] = None,
) -> None:
    """Write a model and its weights as one file that runs without fzoo: .stablehlo for JAX, .onnx for ONNX Runtime.

    In a pipe: file, input, output, platforms and MB, separated by tabs; several outputs are separated by "; ".
    """
    import fzoo
    from fzoo.inference.export import check_target
    from fzoo.pretrained.whole import is_whole_model
    from fzoo.training.runs import is_run

    platforms = check_target(out, platform or None)
    if any_size and size is not None:
        raise ValueError(f"--size {size} given with --any-size: one of them")
    pixels = pixels or preprocess is not None
    own = is_whole_model(name) or is_run(name)
    if own and weights != "imagenet":
        raise ValueError(f"--weights {weights} given, {name} has its own: leave it out")
    if is_whole_model(name):
        from fzoo.jobs.loading import model_of

        model_of(name, "the name of its model, with --weights FILE,")  # says so where the file does not tell
    network = Network(None if own else name, name if own else weights, classes, option, preprocess)
    loaded = load_network(network, Reading(size=size), include_top, pixels)
    module, variables = loaded.module, loaded.variables
    open_shape = (None, None, module.example_shape[2]) if any_size else None
    if any_size and module.keras_graph is None:  # a file of a user says for which size it was saved
        module = module.clone(input_shape=open_shape)
    if optimize and not module.prepared:
        # Kernels that are kept as a CPU wants them would be the only ones in the file, for all platforms.
        target = platforms[0] if len(platforms) == 1 and not any_size else "several"
        module, variables = fzoo.optimize_for_inference(module, variables, platform=target)
    written = fzoo.export(
        module,
        variables,
        out,
        platforms=platforms or None,
        preprocess=loaded.preprocess,
        batch_size=batch,
        image_shape=open_shape,
        layers=layer or (),
    )
    takes, gives = signature(written)
    megabytes = f"{out.stat().st_size / 1e6:,.1f}"
    show(
        ("file", "input", "output", "platforms", "MB"), [(out, takes, gives, ", ".join(platforms) or "any", megabytes)]
    )


def signature(written: Any) -> tuple[str, str]:
    """Say what a program that was exported takes and gives."""
    if hasattr(written, "in_avals"):
        sides = written.in_avals, written.out_avals
        takes, gives = ("; ".join(map(describe_aval, avals)) for avals in sides)
        return takes, gives
    tensors = (written.graph.input, written.graph.output)
    takes, gives = ("; ".join(map(describe_tensor, side)) for side in tensors)
    return takes, gives


def describe_aval(value: Any) -> str:
    """Say what an array of StableHLO is, as JAX says it; a size that follows from open ones by a formula is "?"."""
    sides = ["?" if re.search("[^*\\w]", str(side)) else str(side) for side in value.shape]
    return f"{value.dtype}[{','.join(sides)}]"


def describe_tensor(value: Any) -> str:
    """Say what a tensor of ONNX is, as JAX says it, after its name."""
    import onnx  # pyright: ignore

    tensor = value.type.tensor_type
    sides = ",".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return f"{value.name}: {onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)}[{sides}]"
