"""`fzoo list`, `info`, `summary`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fzoo.cli.console import command, show
from fzoo.cli.options import Classes, Option, Size, parse_options


@command
def list_(pattern: Annotated[str, typer.Argument(help="Names to show, with wildcards, e.g. 'ResNet*'.")] = "*") -> None:
    """List the models: size, parameters, depth, accuracy on ImageNet as it is published, and licence of the weights."""
    import fzoo

    names = fzoo.list_models(pattern)
    if not names:
        raise ValueError(f"no model matches {pattern!r}: `fzoo list` shows all")
    specs = [fzoo.spec(name) for name in names]
    show(
        ("model", "input", "parameters", "depth", "MB", "top-1 %", "top-5 %", "licence"),
        [
            (
                s.name,
                s.input_size,
                f"{s.parameters:,}",
                s.depth,
                s.size_mb,
                *("-" if accuracy is None else f"{100 * accuracy:.1f}" for accuracy in (s.top1, s.top5)),
                s.licence.partition(" (")[0],
            )
            for s in specs
        ],
    )


@command
def info(name: Annotated[str, typer.Argument(help="Name of the model.")]) -> None:
    """Show what is known of a model: paper, licence, preprocessing, options, published files."""
    import fzoo
    from fzoo.zoo import model_options

    s = fzoo.spec(name)
    options = model_options(s)
    rows = [
        ("name", s.name),
        ("paper", s.paper),
        ("licence of the weights", s.licence),
        ("input", f"{s.input_size} x {s.input_size}, at least {s.min_size} x {s.min_size}"),
        ("preprocessing", s.preprocessing),
        ("parameters", f"{s.parameters:,}"),
        ("depth", s.depth),
        ("size of the weights", f"{s.size_mb} MB"),
        ("ImageNet top-1, top-5", ", ".join("not published" if a is None else f"{a:.1%}" for a in (s.top1, s.top5))),
        ("options", ", ".join(f"{k}={v}" for k, v in options.items())),
        *(("file", f"{f.url}  {f.hash or 'no hash published'}") for f in s.weight_files),
    ]
    for key, value in rows:
        print(f"{key:22}  {value}" if sys.stdout.isatty() else f"{key}\t{value}")


@command
def summary(
    name: Annotated[str, typer.Argument(help="Name of the model, or the file of a whole model that Keras saved.")],
    include_top: Annotated[bool, typer.Option(help="With the classifier.")] = True,
    classes: Classes = None,
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
    from fzoo.apps.picture import check_picture, save_picture
    from fzoo.layers.graph import trace
    from fzoo.pretrained.whole import is_whole_model, network_in

    if picture is not None:
        check_picture(picture, (".png", ".svg"))
    if is_whole_model(name):
        if classes or option:
            raise ValueError(f"{'--option' if option else '--classes'} given, which {name} says itself")
        module, _ = network_in(name)
        shape = module.input_shape if size is None else (size, size, module.example_shape[2])
        module = module.clone(include_top=include_top, input_shape=shape)
    else:
        shape = None if size is None else (size, size, 3)
        options = parse_options(name, option)
        module = fzoo.create(name, include_top=include_top, classes=classes or 1000, input_shape=shape, **options)
    traced = trace(module)
    count = traced.parameters
    rows = [
        (n.name, n.kind, " x ".join(map(str, n.shape)), f"{count[n.name]:,}", f"{n.flops:,}", ", ".join(n.inputs))
        for n in traced.layers
    ]
    total, flops = sum(count.values()), sum(n.flops for n in traced.layers)
    height, width, _ = module.example_shape
    whole = f"{name} at {height} x {width}: {len(rows)} layers, {total:,} parameters, {flops / 1e9:.3f} GFLOPs an image"
    if picture is not None:
        save_picture(module, picture, title=whole)
        print(picture)
        return
    show(("layer", "class", "output", "parameters", "FLOPs", "from"), rows, whole)
