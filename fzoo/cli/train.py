"""`fzoo finetune`, `evaluate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fzoo.cli.console import command, complain, prepare_process, show
from fzoo.cli.loading import class_names, join_processes, load_network
from fzoo.cli.options import Cache, Devices, Labels, Network, Option, Preprocess, Reading, parse_options, parse_phase
from fzoo.cli.predict import finish


@dataclasses.dataclass(frozen=True)
class Training:
    """What `fzoo.FinetuneConfig` has under the same names, with the same defaults."""

    batch_size: Annotated[int, typer.Option(min=1, help="Images in a step, on all devices.")] = 32
    accumulate: Annotated[int, typer.Option(min=1, help="Batches whose gradients make one step.")] = 1
    augment: Annotated[bool, typer.Option(help="Train on random, mirrored parts of the images.")] = False
    label_smoothing: Annotated[float, typer.Option(help="How much of each label is spread over all classes.")] = 0.0
    validation_split: Annotated[float, typer.Option(help="Share held out where there is no val/.")] = 0.2
    cache_features: Annotated[
        bool | None, typer.Option(help="Keep what the frozen part computes; where possible if left out.")
    ] = None
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps; by default at the end of epochs, and each 5 min of a long one.")
    ] = None
    max_broken: Annotated[int, typer.Option(min=0, help="Unreadable images that are put up with.")] = 10
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 4
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of all that is random.")] = 0


@command
def finetune(
    data: Annotated[
        Path, typer.Argument(metavar="DATA_DIR", help="A folder for each class, or train/ and val/ that hold these.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run: metrics, curves, checkpoints, weights.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Its name, or the file of a whole model that Keras saved; MobileNetV2 if left out, or that of the run "
            "in --weights.",
        ),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights", "-w", help="Of the backbone: 'imagenet', 'none' for random, a file, or the folder of a run."
        ),
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
    pooling: Annotated[str | None, typer.Option(help="Of the head: avg, if left out, or max.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Units of a hidden layer in the head.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Before the last layer; none if left out.")] = None,
    training: Training = Training(),
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Compute in bfloat16; parameters are float32.")] = False,
    devices: Devices = None,
    distributed: Annotated[
        str | None,
        typer.Option(
            help="Train with other processes, started alike: auto with a cluster manager (SLURM, Open MPI, ...), else "
            "HOST:PORT,PROCESS,COUNT."
        ),
    ] = None,
    reading: Reading = Reading(),
    option: Option = None,
    preprocess: Preprocess = None,
    cut: Annotated[
        str | None,
        typer.Option(help="Of a whole model: the last layer that is kept; by default the last with a feature map."),
    ] = None,
    cache: Cache = True,
) -> None:
    """Adapt a pretrained model to other classes, in phases: first the new head, then the top of the backbone."""
    import jax.numpy as jnp

    import fzoo
    from fzoo.inference.devices import mesh
    from fzoo.training.runs import is_run, settings_of

    join_processes(distributed)
    # What is left out is the run's that is trained on, or the default of `FinetuneConfig`.
    given: dict[str, Any] = {"model": model, "size": reading.size, "preprocess": preprocess, "cut": cut}
    given["phases"] = [parse_phase(text) for text in phase or ()]
    head = {"pooling": pooling, "hidden": hidden, "dropout": dropout}
    if head := {name: value for name, value in head.items() if value is not None}:
        given["head"] = fzoo.Head(**head)
    given = {name: value for name, value in given.items() if value not in (None, [])}
    if option:
        theirs = settings_of(Path(weights))["model"] if is_run(weights) else fzoo.FinetuneConfig.model
        given |= parse_options(model or theirs, option)
    prepare_process(cache)
    result = fzoo.finetune(
        data,
        **given | reading.changes() | vars(training),
        weights=None if weights == "none" else weights,
        out=out,
        dtype=jnp.bfloat16 if bfloat16 else jnp.float32,
        resume=resume,
        mesh=mesh(devices) if devices else None,
        report=complain,
    )
    rows: list[tuple[str, object]] = [("weights, as Keras h5", out / "model.h5"), ("curves", out / "curves.png")]
    if result.evaluation is not None:
        rows.insert(0, ("accuracy on held-out images", f"{result.evaluation.top1:.1%} of {result.evaluation.images}"))
    show(("", ""), rows)
    if result.broken:
        complain(f"{len(result.broken)} images could not be read")
        raise typer.Exit(1)


@command
def evaluate(
    data: Annotated[Path, typer.Argument(metavar="DATA_DIR", help="A folder for each class, e.g. ImageNet's val/.")],
    network: Network = Network(),
    labels: Labels = None,
    out: Annotated[Path | None, typer.Option(help="A .csv of the classes to write.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    max_broken: Annotated[int, typer.Option(min=0, help="Unreadable images that are put up with.")] = 10,
    workers: Annotated[int, typer.Option(min=1, help="Threads that decode.")] = 4,
    reading: Reading = Reading(),
    cache: Cache = True,
) -> None:
    """Measure a classifier on labelled images: top-1, top-5, loss, each class; with the accuracy that Keras publishes.

    Folders are named as the classes: ImageNet's by their WordNet IDs.
    """
    import numpy as np

    import fzoo
    from fzoo.training.data import Broken, in_order, read_folder, with_classes
    from fzoo.training.results import NotFinite
    from fzoo.training.runs import csv_text, write_text
    from fzoo.training.splits import part_of

    if out is not None and out.suffix != ".csv":
        raise ValueError(f"--out {out}: a name that ends in .csv expected")
    prepare_process(cache)
    loaded = load_network(network, reading)
    published = fzoo.spec(loaded.model) if loaded.model and loaded.module.classes == 1000 else None
    pairs = class_names(labels, loaded.module.classes) if labels or not loaded.names else loaded.names
    names = [label if id == "-" else id for id, label in pairs]
    recipe = loaded.recipe
    broken = Broken(max_broken, complain)
    known = bool(labels or loaded.names) or loaded.module.classes == 1000
    files = read_folder(data, recipe, broken, least=1)
    if strange := [name for name in files.class_names if part_of(name) and name not in names]:
        raise ValueError(f"{data} holds {strange[0]}/, a part of a data set by its name: {data / strange[0]} expected")
    files = with_classes(files, names, numbered=not known)
    module, variables = loaded.module, loaded.variables
    if not module.prepared:
        module, variables = fzoo.optimize_for_inference(module, variables)
    batches = in_order(files, batch_size, workers)
    try:
        evaluation = fzoo.evaluate(module, variables, batches, preprocess=loaded.preprocess, batch_size=batch_size)
    except NotFinite as e:
        raise NotFinite(e.index, files.readable(e.index)) from None
    s = published
    rows = [
        ("images", f"{evaluation.images:,} of {len(set(files.labels.tolist()))} classes"),
        ("recipe", str(recipe)),
        ("top-1", f"{evaluation.top1:.2%}" + (f" (Keras publishes {s.top1:.1%} on ImageNet)" if s else "")),
        ("top-5", f"{evaluation.top5:.2%}" + (f" (Keras publishes {s.top5:.1%})" if s and s.top5 else "")),
        ("loss", f"{evaluation.mean_loss:.4f}"),
    ]
    seen = np.flatnonzero(evaluation.confusion.sum(1))
    worst = sorted(seen, key=lambda i: evaluation.recall[i])
    table = [(names[i], int(evaluation.confusion[i].sum()), f"{evaluation.recall[i]:.2%}") for i in worst]
    if out is not None:
        write_text(out, csv_text([("class", "images", "top1"), *table]))
    show(("", ""), rows)
    if out is None or not sys.stdout.isatty():
        show(("class", "images", "top-1"), table)
    finish(len(broken.paths), len(files.paths))
