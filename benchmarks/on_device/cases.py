"""What is measured: the networks, and their cases, the most important first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fzoo.bench.engines import Job

#: Networks, the most important first, and the sides of their images.
MODELS = {
    "ResNet50": 224,
    "EfficientNetB0": 224,
    "ConvNeXtTiny": 224,
    "VGG16": 224,
    "MobileNetV2": 224,
    "InceptionV3": 299,
    "DenseNet121": 224,
}
SMALL_MODELS = {"MobileNetV2": 64, "ResNet50": 64}


def cases(engines: Sequence[str], models: dict[str, int], small: bool) -> list[Job]:
    """List everything that is to be measured of some engines, the most important first; `models` as `MODELS`."""
    batch, train = (4, 4) if small else (256, 128)
    rounds: list[list[Job]] = [[], [], []]
    for number, (model, size) in enumerate(models.items()):
        for engine in engines:

            def add(
                turn: int, task: str, batch: int, dtype: str, model=model, size=size, engine=engine, **options: Any
            ) -> None:
                modes = ("eager", "compile") if engine in ("torchvision", "timm") else ("",)
                for mode in modes if not small else modes[:1]:
                    job = Job(
                        engine, model, batch, task, dtype, size, mode=mode, in_flight=4 if small else 8, **options
                    )
                    rounds[turn].append(job)

            add(0, "inference", batch, "bfloat16")
            add(0 if engine.startswith("fzoo") else 2, "inference", batch, "float32")
            add(1, "inference", 1, "bfloat16")
            if engine != "fzoo-optimized" and not (small and number == 1):
                add(1, "train", 256 if model == "ResNet50" and not small else train, "bfloat16")
            if number == 0:
                add(1, "inference", batch, "bfloat16", inputs="host")
                add(2, "inference", batch, "float32", precision="highest")
                for more in () if small else (64, 1024):
                    add(2, "inference", more, "bfloat16")
                if not small:
                    add(2, "inference", 1, "float32")
            if number < 3 and engine != "fzoo-optimized" and not small:
                add(2, "train", train, "float32")
    return [job for turn in rounds for job in turn]


def key(job: Job) -> str:
    """Write a case in a line."""
    parts = [job.model, job.task, f"batch {job.batch}", job.dtype, job.precision, job.inputs, job.engine, job.mode]
    return " ".join(part for part in parts if part)
