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
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from fzoo.inference import devices
from fzoo.inference.compiler import compiler_options
from fzoo.inference.predict import features
from fzoo.layers.classifier import OF_RUNS, Classifier
from fzoo.layers.graph import trace
from fzoo.pretrained import load
from fzoo.pretrained.whole import is_whole_model
from fzoo.training.config import FinetuneConfig
from fzoo.training.data import (
    Arrays,
    Batches,
    Broken,
    DataSource,
    Features,
    Files,
    Read,
    Replayed,
    in_order,
    training_batches,
)
from fzoo.training.evaluate import evaluate
from fzoo.training.inputs import Data, sources
from fzoo.training.results import Evaluation, Finetuned, NotFinite
from fzoo.training.runs import Progress, Run, describe, is_run, load_run, options_of, settings_of
from fzoo.training.steps import (
    Flow,
    Phase,
    StepInputs,
    TrainState,
    flow,
    merge_params,
    partition_params,
    phase_mask,
    train_step,
    trained_layers,
)
from fzoo.training.transfer import transfer
from fzoo.types import MutableVariables, Options, Params, Variables
from fzoo.weights.mapping import slots, without_top
from fzoo.zoo import preprocess_input

#: Bytes of features that `cache_features=None` keeps in memory at the most.
CACHE_LIMIT = 2 << 30


#: Seconds after which the end of an epoch is worth a checkpoint; the end of a phase always is.
CHECKPOINT_SECONDS = 30


#: Seconds after which one is written in the middle of an epoch.
LONG_EPOCH_SECONDS = 300


def finetune(
    data: Data,
    model: str | os.PathLike | None = None,
    *,
    config: FinetuneConfig | None = None,
    out: str | os.PathLike | None = None,
    validation: Data | None = None,
    resume: bool = False,
    mesh: Mesh | None = None,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Finetuned:
    """Adapt a pretrained network to other classes, in phases.

    What is frozen is bit for bit the same afterwards, batch statistics too; no gradient is computed below the lowest
    layer that trains, and no state of the optimizer is kept for it.

    Args:
        data: a folder with a folder for each class, or with train/ and val/ that have these (test/ is not touched); or
            (images, labels) arrays; or an iterable of (images, labels) batches, gone through once an epoch (a generator
            goes on and on, and needs `steps_per_epoch`). Images (N, H, W, 3): integers from 0 to 255, which are
            preprocessed as the model wants, or floats, which are so already; labels (N,) are integers from 0.
        model: the backbone; MobileNetV2 by default, or that of the run whose folder is given as `weights`. The path of
            a whole model that Keras saved is taken, too (see `transfer`), with `preprocess` and `cut`.
        config: all options at once, in place of `model` and `options`.
        out: the folder of the run: configuration, metrics, curves, checkpoints, weights. Nothing is written without it.
            Several processes need one that all see.
        validation: as `data`, for the end of each epoch; by default what `data` has, or a share of it.
        resume: go on with the run in `out`, where it was; from the start if it has no checkpoint.
        mesh: of the devices, from `fzoo.devices.mesh`; all by default. Each batch is spread over them, with the
            gradients and batch statistics (those of the whole batch) of a single device.
        report: takes a line for what the data is, for each epoch, and for what else a user may want to know.
        **options: `FinetuneConfig`'s (`weights`, `phases`, `head`, `size`, `batch_size`, ...), and those of the model's
            family, see `create`. Where `weights` is the folder of a run, what makes its network and reads its images is
            the default.

    Returns:
        See `Finetuned`.

    Raises:
        ValueError: bad data or options, a run of other settings in `out`, a loss that is not finite.
        OSError: what can't be read or written.
        ModuleNotFoundError: Grain, which reads the data, is not installed.
    """
    if config is None:
        config = configured(options if model is None else {"model": os.fspath(model), **options})
    elif options or model is not None:
        raise ValueError(f"config and {', '.join(options) or 'model'} given, one of both expected")
    if out is None and (resume or config.checkpoint_every):
        raise ValueError(f"{'resume' if resume else 'checkpoint_every'} given, which goes with out=, the run's folder")
    mesh, processes = mesh or devices.mesh(jax.devices()), jax.process_count()
    if config.batch_size % mesh.size:
        raise ValueError(f"batch_size={config.batch_size} given, a multiple of the {mesh.size} devices expected")
    if config.cache_features and processes > 1:
        raise ValueError("cache_features=True given, which goes with one process")
    broken = Broken(config.max_broken, report)
    source, held_out = sources(data, validation, config, broken, report)
    if isinstance(source, Batches):
        if config.cache_features:
            raise ValueError("cache_features=True given, which goes with a folder or arrays: an iterable may change")
        names, steps, fingerprint = tuple(map(str, range(source.classes))), source.steps, None
    else:
        names, fingerprint, count = source.class_names, source.fingerprint(), len(source.labels)
        steps = count // config.batch_size if config.steps_per_epoch is None else config.steps_per_epoch
        if count < config.batch_size:
            raise ValueError(f"batch_size={config.batch_size} given, {count} training images: a smaller one would do")
    for number, phase in enumerate(config.phases):
        if config.accumulate > phase.epochs * steps:
            raise ValueError(
                f"accumulate={config.accumulate} given, phase {number + 1} has {phase.epochs * steps} batches in all"
            )
    module, variables, start = starting_network(config, names)
    variables = devices.replicate(variables, mesh)
    facts = {"classes": names, "steps_per_epoch": steps, "data": fingerprint}
    description = describe(**config.settings() | facts, options=options_of(module, config.model))
    run = None if out is None else Run(Path(out), description, resume)
    progress = run.progress() if run else None
    if run and progress:
        variables = run.restore("variables", variables)
        report(f"resumed in phase {progress.phase + 1}, epoch {progress.epoch + 1}, after {progress.total} steps")
    elif start:
        report(start)
    progress = progress or Progress()
    plan = Plan(config, module, mesh, source, held_out, steps, run, report)
    for number in range(progress.phase, len(config.phases)):
        variables = train_phase(plan, number, config.phases[number], variables, progress)
    evaluation = held_out and validate(plan, variables, held_out)
    result = Finetuned(module, local(variables), names, progress.history, evaluation, tuple(sorted(broken.paths)))
    if run is not None:
        run.finish(result)
    return result


def configured(options: Options) -> FinetuneConfig:
    """Make the configuration of keyword arguments; what they leave out is as in the run that they start from."""
    folder = folder_of_run(options.get("weights"))
    usual = settings_of(folder) if folder else {}
    return FinetuneConfig.of(options, usual if options.get("model") in (None, usual.get("model")) else {})


def folder_of_run(weights: object) -> Path | None:
    """Return the folder of a run, where weights are given as one."""
    return Path(weights) if isinstance(weights, (str, os.PathLike)) and is_run(weights) else None


def starting_network(config: FinetuneConfig, names: Sequence[str]) -> tuple[Classifier, MutableVariables, str]:
    """Make the network that training starts from: (module, variables, a line on its head or "").

    A file's head is kept where it fits, a run's where its classes are these, too.
    """
    if is_whole_model(config.model):
        cut = {"head": config.head, "rng": jax.random.key(config.seed), "dtype": config.dtype, **config.options}
        module, variables = transfer(config.model, classes=len(names), weights=config.weights, **cut)
        module.check_images((1, *config.recipe().size, 3))
        start = f"a new head starts, after {module.cut} of {config.model}; pixels: preprocess {config.preprocess}"
        return module, variables, start
    made = {"input_shape": (*config.recipe().size, 3), "dtype": config.dtype, "param_dtype": jnp.float32}
    made |= config.options
    made |= {"classes": len(names), "head": config.head}
    fresh = {"rng": jax.random.key(config.seed), **made}
    if folder := folder_of_run(config.weights):
        return network_of_run(folder, names, *transfer(config.model, weights=None, **fresh), config.model)
    if config.weights in (None, "imagenet"):
        return *transfer(config.model, weights=config.weights, **fresh), ""
    try:
        module, variables = load(config.model, weights=config.weights, **made)
        note = f"the head of {config.weights} is kept"
    except ValueError:  # with the backbone alone, it says what is wrong, if anything is
        module, variables = transfer(config.model, weights=config.weights, **fresh)
        note = f"a new head starts: {config.weights} has none of {len(names)} classes like {config.head}"
    taken = [f"{name}={value!r}" for name, value in options_of(module, config.model).items() if name not in made]
    return module, variables, note + (f"; {', '.join(taken)} taken from it" if taken else "")


def network_of_run(
    folder: Path, names: Sequence[str], module: Classifier, fresh: Variables, model: str
) -> tuple[Classifier, MutableVariables, str]:
    """Put what a run has trained into a network with new variables; its head too, where the classes are the same."""
    run = load_run(folder)
    free = ("classes", "head", "input_shape", *OF_RUNS, *module.weightless)
    if run.model != model or run.module.clone(**{name: getattr(module, name) for name in free}) != module:
        given = f"{model} with other options than the run's in {folder} given"
        raise ValueError(f"{given}, which is of {run.model}: leave them out")
    kept = run.class_names == tuple(names) and run.module.head == module.head
    new = set() if kept else set(slots(module)) - set(slots(without_top(module)))
    variables = {
        kind: {layer: tree if layer in new else run.variables[kind][layer] for layer, tree in layers.items()}
        for kind, layers in fresh.items()
    }
    theirs = f"{run.module.head} for the classes {', '.join(run.class_names[:5])}"
    note = f"the head of {folder} is kept" if kept else f"a new head starts: {folder} has {theirs}"
    return module, variables, note


class Plan(NamedTuple):
    """What is the same in all phases; see `finetune`."""

    config: FinetuneConfig
    module: Classifier
    mesh: Mesh
    source: Files | Arrays | Batches
    held_out: Files | Arrays | Batches | None
    steps: int
    run: Run | None
    report: Callable[[str], None]

    @property
    def part(self) -> tuple[int, int]:
        """(the number of this process, how many there are)."""
        return jax.process_index(), jax.process_count()


def optimizer_of(plan: Plan, phase: Phase) -> optax.GradientTransformation:
    """Make the optimizer of a phase; the last batches that are accumulated make a step, too, where they are fewer."""
    batches, together = phase.epochs * plan.steps, plan.config.accumulate
    optimizer = phase.transformation(-(-batches // together))
    if together == 1:
        return optimizer
    whole, rest = divmod(batches, together)
    return optax.MultiSteps(
        optimizer, lambda updates: jnp.where(jnp.less(updates, whole), together, max(1, rest))
    ).gradient_transformation()


def train_phase(plan: Plan, number: int, phase: Phase, variables: Variables, progress: Progress) -> MutableVariables:
    """Train a phase from where `progress` is, which goes along; returns the variables after it.

    Raises:
        ValueError: the loss, or what trains, is not finite.
    """
    mask = phase_mask(plan.module, variables, phase)
    stream = flow(plan.module, trained_layers(mask), phase.batch_statistics)
    trained, frozen = partition_params(variables["params"], mask)
    optimizer = optimizer_of(plan, phase)
    opt_state = devices.replicate(optimizer.init(trained), plan.mesh)
    if plan.run and (progress.epoch or progress.step):
        opt_state = plan.run.restore("optimizer", opt_state)
    # A step consumes its state; the variables that came in stay as they are.
    state = TrainState(*jax.tree.map(jnp.copy, (trained, variables.get("batch_stats", {}), opt_state)))
    platform = plan.mesh.devices.flat[0].platform
    step = jax.jit(
        devices.traced_for(platform)(
            functools.partial(
                pixels_step,
                (plan.module, plan.config.pixels_for),
                optimizer,
                train=stream.training,
                label_smoothing=plan.config.label_smoothing,
            )
        ),
        donate_argnums=0,
        compiler_options=compiler_options(platform, jnp.dtype(plan.module.dtype), plan.module.remat),
    )
    source, held_out = plan.source, plan.held_out
    if should_cache(plan, stream):
        plan.report(f"phase {number + 1}: the features of the frozen part are computed once")
        source = keep_features(plan, variables, source, stream)
        held_out = held_out and keep_features(plan, variables, held_out, stream)
    batches = batches_of(plan, source, number)
    if progress.position is not None:
        batches.set_state(progress.position)
    key = jax.random.fold_in(jax.random.key(plan.config.seed), number)
    saved_at, alone = time.monotonic(), plan.part[1] == 1

    def overdue(seconds: float) -> bool:
        """Tell whether a checkpoint is, by the clock; processes save together, and theirs differ."""
        return plan.run is not None and alone and time.monotonic() - saved_at > seconds

    def whole() -> MutableVariables:
        return {
            **variables,
            "params": merge_params(state.trained, frozen),
            **collection("batch_stats", state.batch_stats),
        }

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
            if plan.config.checkpoint_every:
                due = (progress.total + len(under_way)) % plan.config.checkpoint_every == 0
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
            evaluation = validate(plan, whole(), held_out)
            row |= {"val_loss": evaluation.mean_loss, "val_accuracy": evaluation.top1}
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
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Params,
    inputs: StepInputs,
    *rest: Any,
    **options: Any,
) -> tuple[TrainState, tuple[Array, Array]]:
    """Do what `train_step` does, for pixels too."""
    module, model = module_and_model
    state, metrics = train_step(module, optimizer, state, frozen, preprocessed(inputs, model), *rest, **options)
    return state, (metrics["loss"], metrics["accuracy"])


def preprocessed(inputs: StepInputs, model: str) -> StepInputs:
    """Preprocess pixels as the model wants them; what is no integers is already."""
    if isinstance(inputs, Mapping) or not jnp.issubdtype(inputs.dtype, jnp.integer):
        return inputs
    return preprocess_input(jnp.asarray(inputs), model)


def collection(name: str, tree: Params) -> MutableVariables:
    """Return a collection of variables under its name; nothing where it is empty."""
    return {name: tree} if tree else {}


def local(variables: PyTree) -> PyTree:
    """Return variables as they are on one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), variables)


def check_finite(values: PyTree, progress: Progress, plan: Plan) -> None:
    """Raise ValueError where a number is NaN or infinite, with what to do."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(values)):
        place = f"phase {progress.phase + 1}, epoch {progress.epoch + 1}, step {progress.step}"
        kept = f"; the last good checkpoint is kept in {plan.run.folder}" if plan.run else ""
        raise ValueError(f"the loss is not finite any more ({place}): a lower learning_rate would do{kept}")


def in_words(row: Mapping[str, float]) -> str:
    """Write a row of the history."""
    return ", ".join(
        f"{name} {value:.4f}" for name, value in row.items() if name not in ("phase", "epoch", "seconds")
    ) + (f", {row['seconds']:.1f} s")


def batches_of(plan: Plan, source: DataSource | Batches, phase: int) -> Read | Replayed:
    """Make the endless training input of a phase."""
    if isinstance(source, Batches):
        return Replayed(source)
    process, processes = plan.part
    return training_batches(
        source,
        plan.config.batch_size // processes,
        seed=plan.config.seed + phase,
        workers=plan.config.workers,
        part=(process, processes),
    )


def should_cache(plan: Plan, stream: Flow) -> bool:
    """Tell whether to keep the outputs of the frozen part."""
    sets = [data for data in (plan.source, plan.held_out) if data is not None]
    shapes = {node.name: node for node in trace(plan.module).nodes}
    frozen = [shapes[name] for name in stream.frontier]
    if plan.config.cache_features is False or any(node.kind == "InputLayer" for node in frozen):
        return False
    if plan.config.cache_features is None:
        fixed = not any(isinstance(data, Batches) for data in sets) and plan.part[1] == 1
        augmented = isinstance(plan.source, Files) and plan.source.recipe.augment
        if not fixed or augmented:
            return False
        count = sum(len(data.labels) for data in sets if not isinstance(data, Batches))
        return 4 * count * sum(math.prod(node.shape) for node in frozen) <= CACHE_LIMIT
    return True


def keep_features(plan: Plan, variables: Variables, source: DataSource | Batches, stream: Flow) -> Features | Batches:
    """Compute what the trained part needs of the frozen one, for all images."""
    if isinstance(source, Batches):
        return source
    parts_of: dict[str, list[np.ndarray]] = {name: [] for name in stream.frontier}
    all_labels = []
    for images, labels in in_order(source, min(plan.config.batch_size, len(source.labels)), plan.config.workers):
        batch = features(
            plan.module,
            local(variables),
            images,
            stream.frontier,
            batch_size=plan.config.batch_size,
            **preprocess_option(images, plan.config.pixels_for),
        )
        for name, array in batch.items():
            parts_of[name].append(np.asarray(array))
        all_labels.append(labels)
    if isinstance(source, Files):
        source.check_left()
    return Features({name: np.concatenate(parts) for name, parts in parts_of.items()}, np.concatenate(all_labels))


def preprocess_option(images: Array | np.ndarray, model: str) -> dict[str, Any]:
    """Return `predict`'s option for images, where they are pixels."""
    return {"preprocess": model} if np.issubdtype(images.dtype, np.integer) else {}


def validate(plan: Plan, variables: Variables, source: DataSource | Batches) -> Evaluation:
    """Evaluate the network on validation images, each process on its share."""
    batches = in_order(source, plan.config.batch_size, plan.config.workers, plan.part)
    options = {"preprocess": plan.config.pixels_for, "batch_size": plan.config.batch_size, "mesh": devices.mesh()}
    try:
        evaluation = evaluate(plan.module, local(variables), batches, **options)
    except NotFinite as e:
        image = source.readable(e.index) if isinstance(source, Files) and plan.part[1] == 1 else f"image {e.index}"
        raise ValueError(
            f"the network's output for {image} of the validation images is not finite: a lower learning_rate would do"
        ) from e
    if plan.part[1] == 1:
        return evaluation
    from jax.experimental import multihost_utils

    confusion, loss, top5 = multihost_utils.process_allgather(
        (evaluation.confusion, np.float64(evaluation.loss), evaluation.in_top5)
    )
    return Evaluation(np.sum(confusion, 0), float(np.sum(loss)), int(np.sum(top5)))
