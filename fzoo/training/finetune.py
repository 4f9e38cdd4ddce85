"""Fine-tuning as a whole: a folder of photographs in, a trained network out.

A loop around the pure functions of `fzoo.training.steps`; Grain reads the images (`fzoo.training.data`), and
`fzoo.training.runs` is what is written.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from fzoo.images.recipe import Recipe
from fzoo.inference import devices
from fzoo.inference.compiler import compiler_options
from fzoo.inference.predict import features
from fzoo.layers.classifier import Classifier, Head
from fzoo.layers.graph import trace
from fzoo.layers.options import is_count
from fzoo.training.data import (
    Arrays,
    Batches,
    Broken,
    Features,
    Files,
    Replayed,
    Source,
    in_order,
    training_batches,
)
from fzoo.training.evaluate import evaluate
from fzoo.training.inputs import sources
from fzoo.training.results import Evaluation, Finetuned
from fzoo.training.runs import Progress, Run, describe, options_of
from fzoo.training.steps import (
    TWO_PHASES,
    Flow,
    Phase,
    TrainState,
    flow,
    merge_params,
    partition_params,
    phase_mask,
    train_step,
    trained_layers,
    transfer,
)
from fzoo.zoo import preprocess_input, spec

#: Bytes of features that `cache_features=None` keeps in memory at the most.
CACHE_LIMIT = 2 << 30


#: Seconds after which the end of an epoch is worth a checkpoint; the end of a phase always is.
CHECKPOINT_SECONDS = 30


#: Seconds after which one is written in the middle of an epoch.
LONG_EPOCH_SECONDS = 300


def finetune(
    data: Any,
    model: str = "MobileNetV2",
    *,
    weights: Any = "imagenet",
    out: str | os.PathLike | None = None,
    validation: Any = None,
    phases: Sequence[Phase] = TWO_PHASES,
    head: Head | None = None,
    classes: int | None = None,
    size: int | None = None,
    interpolation: str = "bicubic",
    crop: float | None = 0.875,
    augment: bool = False,
    batch_size: int = 32,
    accumulate: int = 1,
    label_smoothing: float = 0.0,
    dtype: Any = jnp.float32,
    validation_split: float = 0.2,
    steps_per_epoch: int | None = None,
    cache_features: bool | None = None,
    max_broken: int = 10,
    workers: int = 4,
    seed: int = 0,
    resume: bool = False,
    checkpoint_every: int | None = None,
    mesh: Mesh | None = None,
    report: Callable[[str], None] = lambda line: None,
    **create_options: Any,
) -> Finetuned:
    """Adapt a pretrained network to other classes, in phases.

    What is frozen is bit for bit the same afterwards, batch statistics too; no gradient is computed below the lowest
    layer that trains, and no state of the optimizer is kept for it.

    Args:
        data: a folder with a folder for each class, or with train/ and val/ that have these; or (images, labels)
            arrays; or an iterable of (images, labels) batches, gone through once an epoch (a generator goes on and on,
            and needs `steps_per_epoch`). Images (N, H, W, 3): integers from 0 to 255, which are preprocessed as the
            model wants, or floats, which are so already; labels (N,) are integers from 0.
        model: the backbone.
        weights: of it: "imagenet", a file, or None for random ones.
        out: the folder of the run: configuration, metrics, curves, checkpoints, weights. Nothing is written without it.
            Several processes need one that all see.
        validation: as `data`, for the end of each epoch; by default what `data` has, or a share of it.
        phases: what trains, how long, and how; by default the head alone, then the top of the backbone.
        head: the new classifier's layers.
        classes: their number, where `data` is an iterable.
        size: height and width; the model's own by default. interpolation, crop, augment: see `Recipe`.
        batch_size: over all devices and processes.
        accumulate: batches whose gradients make one step.
        label_smoothing: how much of each label is spread over all classes.
        dtype: of the computation: jnp.bfloat16 for mixed precision; parameters are float32.
        validation_split: share of each class held out, where `data` is a folder without val/, or arrays; 0 for none.
        steps_per_epoch: batches; by default all that `data` fills.
        cache_features: keep the outputs of the frozen part, instead of computing them in each epoch; by default
            where the data is no iterable, nothing is augmented, and they take 2 GiB or less.
        max_broken: images that can't be read are reported and skipped, so many at the most.
        workers: threads that decode.
        seed: of the split, the order, the new layers, dropout and augmentation.
        resume: go on with the run in `out`, where it was; from the start if it has no checkpoint.
        checkpoint_every: steps; by default at the end of epochs (every 30 seconds at the most) and of phases, and every
            five minutes of a longer epoch; with several processes, at the end of every epoch.
        mesh: of the devices, from `fzoo.devices.mesh`; all by default. Each batch is spread over them, with the
            gradients and batch statistics (those of the whole batch) of a single device.
        report: takes a line for each epoch, and for what else a user may want to know.
        **create_options: of the model, see `create`.

    Returns:
        See `Finetuned`.

    Raises:
        ValueError: bad data or options, a run of other settings in `out`, a loss that is not finite.
        OSError: what can't be read or written.
        ModuleNotFoundError: Grain, which reads the data, is not installed.
    """
    phases = tuple(phases)
    if not phases or not all(isinstance(phase, Phase) for phase in phases):
        raise ValueError(f"phases={phases!r} given, one fzoo.Phase or more expected")
    for name, value in (("batch_size", batch_size), ("accumulate", accumulate), ("workers", workers)):
        if not is_count(value):
            raise ValueError(f"{name}={value!r} given, a positive number expected")
    for name, value in (("label_smoothing", label_smoothing), ("validation_split", validation_split)):
        if not isinstance(value, Real) or not 0 <= float(value) < 1:
            raise ValueError(f"{name}={value!r} given, from 0 to less than 1 expected")
    mesh, processes = mesh or devices.mesh(jax.devices()), jax.process_count()
    if batch_size % mesh.size:
        raise ValueError(f"batch_size={batch_size} given, a multiple of the {mesh.size} devices expected")
    if cache_features and (augment or processes > 1):
        raise ValueError("cache_features=True given, which goes with augment=False and one process")
    size = spec(model).input_size if size is None else size
    recipe, broken = Recipe((size, size), interpolation, crop, augment), Broken(max_broken, report)
    source, held_out = sources(data, validation, recipe, broken, validation_split, seed, classes, steps_per_epoch)
    if isinstance(source, Batches):
        if cache_features:
            raise ValueError("cache_features=True given, which goes with a folder or arrays: an iterable may change")
        names, steps, fingerprint = tuple(map(str, range(source.classes))), source.steps, None
    else:
        names, fingerprint = source.class_names, source.fingerprint()
        steps = len(source.labels) // batch_size if steps_per_epoch is None else steps_per_epoch
        if len(source.labels) < batch_size:
            raise ValueError(
                f"batch_size={batch_size} given, {len(source.labels)} training images: a smaller one would do"
            )
    head, options = head or Head(), {"input_shape": (size, size, 3), "dtype": dtype, **create_options}
    rng = jax.random.key(seed)
    module, variables = transfer(model, classes=len(names), head=head, weights=weights, rng=rng, **options)
    variables = devices.replicate(variables, mesh)
    config = describe(
        model=model,
        weights=weights,
        head=head,
        classes=names,
        phases=phases,
        recipe=recipe,
        batch_size=batch_size,
        accumulate=accumulate,
        label_smoothing=label_smoothing,
        steps_per_epoch=steps,
        cache_features=cache_features,
        seed=seed,
        data=fingerprint,
        options=options_of(module, model),
    )
    run = None if out is None else Run(Path(out), config, resume)
    progress = run.progress() if run else None
    if run and progress:
        variables = run.restore("variables", variables)
        report(f"resumed in phase {progress.phase + 1}, epoch {progress.epoch + 1}, after {progress.total} steps")
    progress = progress or Progress()
    plan = Plan(
        module, model, mesh, source, held_out, steps, batch_size, accumulate, label_smoothing, seed, workers,
        cache_features, checkpoint_every, run, report,
    )  # fmt: skip
    for number in range(progress.phase, len(phases)):
        variables = train_phase(plan, number, phases[number], variables, progress)
    evaluation = held_out and validate(plan, variables, held_out)
    result = Finetuned(module, local(variables), names, progress.history, evaluation, tuple(sorted(broken.paths)))
    if run is not None:
        run.finish(result)
    return result


class Plan(NamedTuple):
    """What is the same in all phases; see `finetune`."""

    module: Classifier
    model: str
    mesh: Mesh
    source: Files | Arrays | Batches
    held_out: Files | Arrays | Batches | None
    steps: int
    batch_size: int
    accumulate: int
    label_smoothing: float
    seed: int
    workers: int
    cache_features: bool | None
    checkpoint_every: int | None
    run: Run | None
    report: Callable[[str], None]

    @property
    def part(self) -> tuple[int, int]:
        """(the number of this process, how many there are)."""
        return jax.process_index(), jax.process_count()


def train_phase(plan: Plan, number: int, phase: Phase, variables: Any, progress: Progress) -> Any:
    """Train a phase from where `progress` is, which goes along; returns the variables after it.

    Raises:
        ValueError: the loss, or what trains, is not finite.
    """
    mask = phase_mask(plan.module, variables, phase)
    stream = flow(plan.module, trained_layers(mask), phase.batch_statistics)
    trained, frozen = partition_params(variables["params"], mask)
    optimizer = phase.transformation(max(1, phase.epochs * plan.steps // plan.accumulate))
    if plan.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, plan.accumulate).gradient_transformation()
    opt_state = devices.replicate(optimizer.init(trained), plan.mesh)
    if plan.run and (progress.epoch or progress.step):
        opt_state = plan.run.restore("optimizer", opt_state)
    # A step consumes its state; the variables that came in stay as they are.
    state = TrainState(*jax.tree.map(jnp.copy, (trained, variables.get("batch_stats", {}), opt_state)))
    step = jax.jit(
        functools.partial(
            pixels_step,
            (plan.module, plan.model),
            optimizer,
            train=stream.training,
            label_smoothing=plan.label_smoothing,
        ),
        donate_argnums=0,
        compiler_options=compiler_options(plan.mesh.devices.flat[0].platform, jnp.dtype(plan.module.dtype)),
    )
    source, held_out = plan.source, plan.held_out
    if should_cache(plan, stream):
        plan.report(f"phase {number + 1}: the features of the frozen part are computed once")
        source = cached(plan, variables, source, stream)
        held_out = held_out and cached(plan, variables, held_out, stream)
    batches = batches_of(plan, source, number)
    if progress.position is not None:
        batches.set_state(progress.position)
    key = jax.random.fold_in(jax.random.key(plan.seed), number)
    saved_at, alone = time.monotonic(), plan.part[1] == 1

    def overdue(seconds: float) -> bool:
        """Whether a checkpoint is, by the clock; processes save together, and theirs differ."""
        return plan.run is not None and alone and time.monotonic() - saved_at > seconds

    def whole() -> Any:
        return {**variables, "params": merge_params(state.trained, frozen), **named("batch_stats", state.batch_stats)}

    def save() -> None:
        nonlocal saved_at
        if plan.run:
            check_finite(state.trained, progress, plan)
            plan.run.save(progress, whole(), state.opt_state)
            saved_at = time.monotonic()

    while progress.epoch < phase.epochs:
        start, under_way = time.monotonic(), deque()
        for index in range(progress.step, plan.steps):
            inputs, labels = devices.shard(next(batches), plan.mesh)
            rng = jax.random.fold_in(key, progress.epoch * plan.steps + index)
            state, metrics = step(state, frozen, inputs, labels, rng)
            under_way.append(metrics)
            if plan.checkpoint_every:
                due = (progress.total + len(under_way)) % plan.checkpoint_every == 0
            else:
                due = overdue(LONG_EPOCH_SECONDS)
            # One step is computed while the next is prepared.
            while len(under_way) > (0 if due or index == plan.steps - 1 else 1):
                progress.took(*(float(value) for value in under_way.popleft()))
                check_finite(progress.last_loss, progress, plan)
            if due and progress.step < plan.steps:
                progress.position = batches.get_state()
                save()
        progress.position = batches.get_state()
        check_finite(state.trained, progress, plan)
        row = {"phase": number + 1, "epoch": progress.epoch + 1, **progress.means()}
        if held_out:
            found = validate(plan, whole(), held_out)
            row |= {"val_loss": found.mean_loss, "val_accuracy": found.top1}
        row["seconds"] = round(time.monotonic() - start, 3)
        progress.end_of_epoch(row)
        plan.report(f"phase {number + 1}, epoch {progress.epoch}/{phase.epochs}: {in_words(row)}")
        if plan.run:
            plan.run.write_metrics(progress.history)
            if progress.epoch < phase.epochs and (not alone or overdue(CHECKPOINT_SECONDS)):
                save()
    progress.end_of_phase()
    if plan.run:
        plan.run.save(progress, whole(), ())
    return whole()


def pixels_step(
    module_and_model: tuple[Classifier, str],
    optimizer: Any,
    state: TrainState,
    frozen: Any,
    inputs: Any,
    *rest: Any,
    **options: Any,
) -> tuple[TrainState, tuple[Array, Array]]:
    """`train_step`, for pixels too."""
    module, model = module_and_model
    state, metrics = train_step(module, optimizer, state, frozen, preprocessed(inputs, model), *rest, **options)
    return state, (metrics["loss"], metrics["accuracy"])


def preprocessed(inputs: Any, model: str) -> Any:
    """Pixels as the model wants them; what is no integers is already."""
    if isinstance(inputs, Mapping) or not jnp.issubdtype(inputs.dtype, jnp.integer):
        return inputs
    return preprocess_input(jnp.asarray(inputs), model)


def named(name: str, tree: Any) -> dict[str, Any]:
    """A collection of variables, if there is anything in it."""
    return {name: tree} if tree else {}


def local(variables: Any) -> Any:
    """Variables on one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)


def check_finite(values: Any, progress: Progress, plan: Plan) -> None:
    """Raise ValueError where a number is NaN or infinite, with what to do."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(values)):
        place = f"phase {progress.phase + 1}, epoch {progress.epoch + 1}, step {progress.step}"
        kept = f"; the last good checkpoint is kept in {plan.run.folder}" if plan.run else ""
        raise ValueError(f"the loss is not finite any more ({place}): a lower learning_rate would do{kept}")


def in_words(row: Mapping[str, Any]) -> str:
    """A row of the history."""
    return ", ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name not in ("phase", "epoch", "seconds")
    ) + (f", {row['seconds']:.1f} s")


def batches_of(plan: Plan, source: Source | Batches, phase: int) -> Any:
    """The endless training input of a phase."""
    if isinstance(source, Batches):
        return Replayed(source)
    process, processes = plan.part
    return training_batches(
        source, plan.batch_size // processes, seed=plan.seed + phase, workers=plan.workers, part=(process, processes)
    )


def should_cache(plan: Plan, stream: Flow) -> bool:
    """Whether to keep the outputs of the frozen part."""
    sets = [each for each in (plan.source, plan.held_out) if each is not None]
    shapes = {node.name: node for node in trace(plan.module).nodes}
    frozen = [shapes[name] for name in stream.frontier]
    if plan.cache_features is False or any(node.kind == "InputLayer" for node in frozen):
        return False
    if plan.cache_features is None:
        fixed = not any(isinstance(each, Batches) for each in sets) and plan.part[1] == 1
        augmented = isinstance(plan.source, Files) and plan.source.recipe.augment
        if not fixed or augmented:
            return False
        count = sum(len(each.labels) for each in sets if not isinstance(each, Batches))
        return 4 * count * sum(math.prod(node.shape) for node in frozen) <= CACHE_LIMIT
    return True


def cached(plan: Plan, variables: Any, source: Any, stream: Flow) -> Features | Batches:
    """What the trained part needs of the frozen one, for all images."""
    if isinstance(source, Batches):
        return source
    found: dict[str, list[np.ndarray]] = {name: [] for name in stream.frontier}
    all_labels = []
    for images, labels in in_order(source, min(plan.batch_size, len(source.labels)), plan.workers):
        batch = features(
            plan.module,
            local(variables),
            images,
            stream.frontier,
            batch_size=plan.batch_size,
            **how(images, plan.model),
        )
        for name, array in batch.items():
            found[name].append(np.asarray(array))
        all_labels.append(labels)
    return Features({name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(all_labels))


def how(images: Any, model: str) -> dict[str, Any]:
    """`predict`'s option for images that are pixels."""
    return {"preprocess": model} if np.issubdtype(images.dtype, np.integer) else {}


def validate(plan: Plan, variables: Any, source: Source | Batches) -> Evaluation:
    """Evaluate the network on validation images, each process on its share."""
    batches = in_order(source, plan.batch_size, plan.workers, plan.part)
    options = {"preprocess": plan.model, "batch_size": plan.batch_size, "mesh": devices.mesh()}
    found = evaluate(plan.module, local(variables), batches, **options)
    if plan.part[1] == 1:
        return found
    from jax.experimental import multihost_utils

    confusion, loss, top5 = multihost_utils.process_allgather((found.confusion, np.float64(found.loss), found.in_top5))
    return Evaluation(np.sum(confusion, 0), float(np.sum(loss)), int(np.sum(top5)))
