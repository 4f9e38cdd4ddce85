"""`fzoo demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fzoo.cli.console import command


@command
def demo(
    out: Annotated[Path, typer.Option(help="Folder for what it writes.")] = Path("digits"),
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training digits.")] = 20,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Of the split, the initial weights and the order.")
    ] = 0,
) -> None:
    """Train a small MobileNet on handwritten digits, save it for Keras, load it back, classify. Needs no network."""
    from fzoo.apps import demo

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
