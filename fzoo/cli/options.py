"""Options that several commands share, and how their values are parsed."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fzoo.training.steps import Phase

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Name of the model; `fzoo list` shows them. If left out, what the weights say, of ImageNet's MobileNetV2.",
    ),
]


Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        "-w",
        help="'imagenet'; a Keras file (.h5, .weights.h5, .keras); the folder of a `fzoo finetune`; Teachable "
        "Machine's converted_keras.zip. A whole model as Keras saved it needs no --model.",
    ),
]


Size = Annotated[int | None, typer.Option(help="Height and width in pixels; the model's own if left out.")]


Classes = Annotated[
    int | None, typer.Option(help="Number of classes of the weights; what they say, or 1000, if left out.")
]


Labels = Annotated[
    Path | None, typer.Option(help="Names of the classes, one a line, where the weights are not ImageNet's.")
]


Option = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="An option of the model's network, e.g. -o alpha=0.5.")
]


Preprocess = Annotated[
    str | None,
    typer.Option(
        help="What a whole model wants of its pixels, where it does not show: tf (-1 to 1), unit (0 to 1), torch, "
        "clip, caffe, none (0 to 255 as they are), or the name of a model that wants the same."
    ),
]


Devices = Annotated[
    int | None, typer.Option(min=1, help="How many of this machine's a batch is spread over; all if left out.")
]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How images are read, where it is not as the weights want it."""

    size: Size = None
    interpolation: Annotated[
        str | None, typer.Option(help="Of the resize: bicubic, bilinear, nearest, lanczos; the model's if left out.")
    ] = None
    crop: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="How much of the resized shorter side the centre crop keeps, e.g. 0.875; 0 squeezes the whole image.",
        ),
    ] = None
    exif: Annotated[
        bool | None, typer.Option("--exif/--no-exif", help="Whether images are turned upright as cameras say.")
    ] = None
    background: Annotated[
        str | None,
        typer.Option(help="Behind what is transparent: a colour's name, #rrggbb, or none to drop the transparency."),
    ] = None
    keras_pixels: Annotated[
        bool,
        typer.Option(
            "--keras-pixels",
            help="Read images as keras.utils.load_img does: squeezed by nearest, not turned, transparency dropped, "
            "16-bit grey cut off.",
        ),
    ] = False

    def changes(self) -> dict[str, Any]:
        """Return what differs from the recipe of the weights, but for the size: fields of `fzoo.Recipe`."""
        from fzoo.images.recipe import KERAS_PIXELS

        given: dict[str, Any] = dict(KERAS_PIXELS) if self.keras_pixels else {}
        if self.interpolation is not None:
            given["interpolation"] = self.interpolation
        if self.crop is not None:
            given["crop"] = self.crop or None
        if self.exif is not None:
            given["exif"] = self.exif
        if self.background is not None:
            given["background"] = None if self.background == "none" else self.background
        return given


@dataclasses.dataclass(frozen=True)
class Network:
    """Which network, with which weights."""

    model: Model = None
    weights: Weights = "imagenet"
    classes: Classes = None
    option: Option = None
    preprocess: Preprocess = None


@dataclasses.dataclass(frozen=True)
class Job:
    """How many images go through a network together, on what, and with whom."""

    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images at once, on all devices together; for each 32 on a CPU and some 256 elsewhere if left out.",
        ),
    ] = None
    devices: Devices = None
    distributed: Annotated[
        str | None,
        typer.Option(
            help="Share the job with other processes, started alike, on one file system: auto with a cluster manager "
            "(SLURM, Open MPI, ...), else HOST:PORT,PROCESS,COUNT."
        ),
    ] = None
    workers: Annotated[int | None, typer.Option(min=1, help="Threads that decode; one for each core if left out.")] = (
        None
    )
    shard_size: Annotated[
        int | None, typer.Option(min=1, help="Images in a shard: what a killed job loses at most.")
    ] = None
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what another job on the same --out has done.")
    ] = False
    append: Annotated[
        bool,
        typer.Option(
            "--append",
            help="Add to the --out that is there: rows of images that did not change are kept, others computed.",
        ),
    ] = False


Tune = Annotated[
    bool,
    typer.Option(
        "--tune",
        help="Fold batch normalisation, and take the ways to compute convolutions that are the fastest on this "
        "machine's CPU; the first time they are timed, which takes up to some minutes (see `fzoo tune`).",
    ),
]


Cache = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep compiled programs in the user's cache, for the next start.")
]


Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE...",
        help="Image files, folders, globs in quotes, tar or zip archives, @FILE with such a path on each line.",
        show_default=False,
    ),
]


def require_images(images: Sequence[Path] | None) -> Sequence[Path]:
    """Return the images asked for; none is an error."""
    if not images:
        raise ValueError("no images given: `fzoo classify IMAGE...` takes one path or more")
    return images


def parse_phase(text: str) -> Phase:
    """Make a `fzoo.Phase` from 'NAME=VALUE NAME=VALUE'; what is none of its fields is the optimizer's.

    `pattern` may come more than once.
    """
    import fzoo
    from fzoo.training.steps import patterns_of

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
        if name == "pattern":
            parsed = (*patterns_of(known[name]), value) if name in known else value
        elif name in known or name in options:
            raise ValueError(f"--phase {text!r} gives {name} twice")
        (known if name in fields else options)[name] = parsed
    return fzoo.Phase(**known, options=options)


def parse_options(model: str, options: Sequence[str] | None) -> dict[str, Any]:
    """Parse options of a model's network from NAME=VALUE, the value as in Python."""
    import fzoo
    from fzoo.errors import unknown
    from fzoo.pretrained.whole import is_whole_model
    from fzoo.zoo import model_options

    if options and is_whole_model(model):
        raise ValueError(f"--option {options[0]} given, which {model} says itself")
    known, parsed = model_options(fzoo.spec(model)), {}
    for text in options or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--option {text!r} given, NAME=VALUE expected, e.g. alpha=0.5")
        if key not in known:
            raise ValueError(unknown(f"option of {model}", key, known))
        try:
            parsed[key] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            raise ValueError(f"--option {text!r} given, a number, True or False, or a tuple expected") from None
    return parsed
