"""The engines of the benchmark: how each loads a model, and runs a batch.

The process of an engine imports this file by its path, without fzoo, whose import would bring JAX into every engine's
first answer and memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

TASKS = ("inference", "features", "train")


DTYPES = ("float32", "bfloat16")


#: How products of float32 are computed: as JAX does by default (TF32 on GPUs that have it, bfloat16 on TPUs, float32 on
#: CPUs), or in float32 everywhere.
PRECISIONS = ("default", "highest")


#: Where a batch comes from, and its result goes: the device's memory, or the host's.
INPUTS = ("device", "host")


LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process has to do.

    Attributes:
        engine: a key of `ENGINES` or `PREPARATIONS`.
        model: Keras's name of it.
        batch: images in a call.
        task, dtype: of `TASKS` and `DTYPES`.
        size: height and width of the images, in pixels.
        devices: how many the batch is spread over.
        precision, inputs: of `PRECISIONS` and `INPUTS`.
        in_flight: calls under way at once where throughput is measured; 1 measures it one by one.
        layer: which one the task "features" taps.
        mode: which of the engine's modes.
        path: the ONNX file of the model, for the engines that read one.
    """

    engine: str
    model: str
    batch: int
    task: str
    dtype: str
    size: int
    devices: int = 1
    precision: str = "default"
    inputs: str = "device"
    in_flight: int = 1
    layer: str = ""
    mode: str = ""
    path: str = ""


class Running(NamedTuple):
    """A model that is ready.

    Attributes:
        start: begins a batch, and returns what stands for its result, which may still be under way.
        wait: waits for what `start` returned; for inputs from the host, until the result is there.
        device: its kind.
        flops: the work of a batch where it is not the model's.
        profile: begins a trace in a folder and ends it, as a context; None for an engine without.
    """

    start: Callable[[], Any]
    wait: Callable[[Any], object]
    device: str
    flops: int = 0
    profile: Callable[[str], contextlib.AbstractContextManager[Any]] | None = None

    def call(self) -> None:
        """Run a batch, and wait for its result."""
        self.wait(self.start())


def at_once(call: Callable[[], object], device: str) -> Running:
    """Make a call that returns when its result is there."""
    return Running(call, lambda result: result, device)


class Missing(Exception):
    """The engine does not offer this; the message says what."""


def get(name: str) -> Any:
    """Import a module that may not be installed."""
    return importlib.import_module(name)


def images(job: Job) -> Any:
    """Make images (N, H, W, 3), float32, like preprocessed ones."""
    import numpy as np

    return np.random.default_rng(0).standard_normal((job.batch, job.size, job.size, 3), np.float32)


def labels(job: Job) -> Any:
    """Make labels (N,), of 1000 classes."""
    import numpy as np

    return np.random.default_rng(1).integers(0, 1000, job.batch).astype(np.int32)


def start_fzoo(job: Job, optimized: bool = False, tuned: bool = False) -> Running:
    """Start `fzoo.predict` and `fzoo.features`, or a training step in one `jax.jit`.

    Optimized: after `reuse_memory()`, the network that `optimize_for_inference` makes; tuned: the one of `tune`, on a
    CPU. Of bfloat16 are the images, and but for training the kernels.
    """
    import jax

    import fzoo
    from fzoo.inference.devices import mesh, replicate, shard
    from fzoo.inference.folding import cast_kernels

    if job.devices > 1:
        with contextlib.suppress(RuntimeError):  # the backend of several jobs' process has started
            jax.config.update("jax_num_cpu_devices", job.devices)
    devices = jax.devices()[: job.devices]
    if len(devices) < job.devices:
        raise ValueError(f"--devices {job.devices} given, there are {len(devices)} of {devices[0].device_kind}")
    row = mesh(devices) if job.devices > 1 else None
    options = {"classifier_activation": None} if job.task == "train" else {}
    shape, dtype = (job.size, job.size, 3), jax.numpy.dtype(job.dtype)
    module, variables = fzoo.load(job.model, weights=None, input_shape=shape, dtype=dtype, **options)
    if tuned and devices[0].platform != "cpu":
        raise Missing("on a CPU alone")
    if optimized or tuned:
        fzoo.reuse_memory()
    if tuned:
        module, variables = fzoo.tune(module, variables, images(job), dtype=dtype)
    elif optimized:
        module, variables = fzoo.optimize_for_inference(module, variables, dtype=dtype)
    elif job.task != "train":
        variables = cast_kernels(variables, dtype)
    variables = jax.device_put(variables, devices[0]) if row is None else replicate(variables, row)
    x, y = images(job).astype(dtype), labels(job)

    def place(array: Any) -> Any:
        return jax.device_put(array, devices[0]) if row is None else shard(array, row)

    if job.inputs == "device":
        x, y = place(x), place(y)
    if job.task == "train":
        step = training(module, variables)
        return on_jax(job, lambda: step(place(x), place(y)))
    if job.task == "features":
        tap = functools.partial(fzoo.features, module, variables, layers=[job.layer], batch_size=job.batch, mesh=row)
        return on_jax(job, lambda: tap(images=x)[job.layer])
    return on_jax(job, lambda: fzoo.predict(module, variables, x, batch_size=job.batch, mesh=row))


def on_jax(job: Job, start: Callable[[], Any]) -> Running:
    """Make a call of JAX's, which returns before its result is there; products are as precise as the job says."""
    import jax
    import numpy as np

    def started() -> Any:
        with jax.default_matmul_precision("highest" if job.precision == "highest" else None):
            return start()

    wait = jax.block_until_ready if job.inputs == "device" else np.asarray
    return Running(started, wait, jax.devices()[0].device_kind, profile=jax.profiler.trace)


def training(module: Any, variables: Any) -> Callable[[Any, Any], Any]:
    """Make a step of SGD on (images, labels), which gives the loss; the state is updated in place."""
    import jax
    import optax

    from fzoo.inference.compiler import compiler_options
    from fzoo.inference.devices import traced_for

    optimizer = optax.sgd(LEARNING_RATE)

    platform = jax.devices()[0].platform
    options = compiler_options(platform, module.dtype)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    @traced_for(platform)
    def step(state, x, y):
        variables, moments, key = state
        key, dropout = jax.random.split(key)

        def loss_fn(params):
            logits, updates = module.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
            )
            logits = logits.astype(jax.numpy.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

        (loss, updates), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        changes, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(variables["params"], changes)
        return ({**variables, **updates, "params": params}, moments, key), loss

    state = (variables, optimizer.init(variables["params"]), jax.random.key(0))
    # All of it where the variables are: left to JAX, what the first step returns would be of another kind, and the
    # second step compiled again.
    at = jax.tree.leaves(variables)[0].sharding
    state = jax.device_put(state, at)

    def call(x, y):
        nonlocal state
        state, loss = step(state, x, y)
        return loss

    return call


def keras_model(job: Job) -> Any:
    """Make the model in Keras, with random weights; for features, up to the layer."""
    keras = get("keras")
    if job.dtype == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    options = {"classifier_activation": None} if job.task == "train" else {}
    if not hasattr(keras.applications, job.model):
        raise Missing(f"Keras {keras.__version__} has no {job.model}")
    model = getattr(keras.applications, job.model)(weights=None, input_shape=(job.size, job.size, 3), **options)
    return keras.Model(model.input, model.get_layer(job.layer).output) if job.task == "features" else model


def start_keras(job: Job) -> Running:
    """Start Keras on the backend that KERAS_BACKEND names.

    `predict_on_batch` and `train_on_batch` for inputs from the host; on JAX, what is on the device goes through its
    `stateless_call` in a `jax.jit`.
    """
    keras = get("keras")
    model = keras_model(job)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    jit_compile = {"xla": True, "graph": False}.get(job.mode, "auto")
    model.compile(optimizer=keras.optimizers.SGD(LEARNING_RATE), loss=loss, jit_compile=jit_compile)
    x, y = images(job), labels(job)
    if keras.config.backend() != "jax":
        device = "gpu" if get("tensorflow").config.list_physical_devices("GPU") else "cpu"
        if device == "gpu" and job.inputs == "device":
            raise Missing("Keras on TensorFlow gives its results on the host: --inputs host")
        call = (lambda: float(model.train_on_batch(x, y))) if job.task == "train" else lambda: model.predict_on_batch(x)
        return at_once(call, device)
    jax = get("jax")
    if job.inputs == "device":
        x, y = jax.device_put((x.astype(jax.numpy.dtype(job.dtype)), y))
    if job.task == "train":
        return on_jax(job, lambda: model.train_on_batch(x, y))
    if job.inputs == "host":
        return on_jax(job, lambda: model.predict_on_batch(x))
    state = [[v.value for v in group] for group in (model.trainable_variables, model.non_trainable_variables)]
    forward = jax.jit(lambda *given: model.stateless_call(*given, training=False)[0])
    return on_jax(job, lambda: forward(*state, x))


#: torchvision's names, where it has the network. Its ResNet50 strides in the 3x3 convolutions: some 6 % more work.
TORCHVISION = {
    "ConvNeXtBase": "convnext_base",
    "ConvNeXtLarge": "convnext_large",
    "ConvNeXtSmall": "convnext_small",
    "ConvNeXtTiny": "convnext_tiny",
    "DenseNet121": "densenet121",
    "DenseNet169": "densenet169",
    "DenseNet201": "densenet201",
    **{f"EfficientNetB{i}": f"efficientnet_b{i}" for i in range(8)},
    "InceptionV3": "inception_v3",
    "MobileNetV2": "mobilenet_v2",
    "MobileNetV3Large": "mobilenet_v3_large",
    "MobileNetV3Small": "mobilenet_v3_small",
    "ResNet50": "resnet50",
    "VGG16": "vgg16",
    "VGG19": "vgg19",
}


#: timm's.
TIMM = {
    **{name: theirs for name, theirs in TORCHVISION.items() if name.startswith(("ConvNeXt", "DenseNet", "Eff", "VGG"))},
    "InceptionResNetV2": "inception_resnet_v2",
    "InceptionV3": "inception_v3",
    "MobileNetV2": "mobilenetv2_100",
    "MobileNetV3Large": "mobilenetv3_large_100",
    "MobileNetV3Small": "mobilenetv3_small_100",
    "NASNetLarge": "nasnetalarge",
    "ResNet50": "resnet50",
    "ResNet50V2": "resnetv2_50",
    "Xception": "xception",
}


def start_torchvision(job: Job) -> Running:
    """Start torchvision's network of that name."""
    if job.model not in TORCHVISION:
        raise Missing(f"torchvision has no {job.model}")
    special = {"InceptionV3": {"aux_logits": False, "init_weights": False}}.get(job.model, {})
    return start_torch(
        job, lambda: get("torchvision.models").get_model(TORCHVISION[job.model], weights=None, **special)
    )


def start_timm(job: Job) -> Running:
    """Start timm's network of that name."""
    if job.model not in TIMM:
        raise Missing(f"timm has no {job.model}")
    return start_torch(job, lambda: get("timm").create_model(TIMM[job.model], pretrained=False))


def start_torch(job: Job, build: Callable[[], Any]) -> Running:
    """Start a network of PyTorch's, channels last: eager, compiled, or traced and frozen.

    In training with bfloat16, parameters are float32, as fzoo's are. On a GPU, cuDNN tries its algorithms first
    (`benchmark`), as XLA does, and an event marks the end of each call.
    """
    if (job.task, job.mode) == ("train", "frozen"):
        raise Missing("what is frozen is not trained")
    torch = get("torch")
    device = "cuda" if torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = job.precision == "default"
    torch.backends.cudnn.benchmark = True
    dtype, mixed = getattr(torch, job.dtype), job.task == "train" and job.dtype == "bfloat16"
    network = build().train(job.task == "train")
    network = network.to(device, torch.float32 if mixed else dtype, memory_format=torch.channels_last)
    host = torch.from_numpy(images(job)).permute(0, 3, 1, 2).to(dtype)  # a view, channels last
    targets = torch.from_numpy(labels(job)).long()
    if job.inputs == "device":
        host, targets = host.to(device), targets.to(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"

    def ended(result: Any) -> tuple[Any, Any]:
        event = torch.cuda.Event() if device == "cuda" else None
        if event is not None:
            event.record()
        return result, event

    def wait(started: tuple[Any, Any]) -> Any:
        result, event = started
        if event is not None:
            event.synchronize()
        return result.cpu() if job.inputs == "host" else result

    @contextlib.contextmanager
    def profile(folder: str) -> Iterator[None]:
        with torch.profiler.profile() as profiler:
            yield
        Path(folder).mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))

    if job.task == "train":
        optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE)
        forward = torch.compile(network) if job.mode == "compile" else network

        def step():
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=mixed):
                logits = forward(host.to(device))
            loss = torch.nn.functional.cross_entropy(logits.float(), targets.to(device))
            loss.backward()
            optimizer.step()
            return ended(loss.detach())

        return Running(step, wait, name, profile=profile)
    with torch.inference_mode():
        if job.mode == "frozen":
            traced = torch.jit.trace(network, host.to(device))
            network = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        elif job.mode == "compile":
            network = torch.compile(network)

    @torch.inference_mode()
    def start():
        return ended(network(host.to(device)))

    return Running(start, wait, name, profile=profile)


def start_onnxruntime(job: Job) -> Running:
    """Start ONNX Runtime on the CPU."""
    onnxruntime, x = get("onnxruntime"), images(job)
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("batch", job.batch)
    session = onnxruntime.InferenceSession(job.path, options, providers=["CPUExecutionProvider"])
    return at_once(lambda: session.run(None, {"images": x}), "cpu")


def start_openvino(job: Job, precision: str = "") -> Running:
    """Start OpenVINO on the CPU, a request at a time on all cores."""
    x = images(job)
    request = openvino_request(job.path, x.shape, precision or OPENVINO[job.dtype])
    return at_once(lambda: request.infer([x], share_inputs=True)[0], "cpu")


#: OpenVINO's words for a dtype.
OPENVINO = {"float32": "f32", "bfloat16": "bf16"}


def openvino_request(path: str, shape: Sequence[int], precision: str, **options: Any) -> Any:
    """Compile an ONNX file for images of a shape, in a precision of `OPENVINO`, with options of OpenVINO's.

    Raises:
        Missing: this processor can't compute so.
    """
    core = get("openvino").Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Missing("this processor has no bfloat16, OpenVINO would compute in float32")
    model = core.read_model(path)
    model.reshape(list(shape))
    options |= {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", options).create_infer_request()


@dataclasses.dataclass(frozen=True)
class Engine:
    """How an engine is started.

    Attributes:
        start: loads the model.
        packages: what has to be installed for it.
        extra: of fzoo's, with which they are.
        tasks, dtypes: what it offers.
        modes: ways to run it, of which the fastest counts.
        env: environment variables.
        converted: whether it reads an ONNX file, which `fzoo.export` writes.
        many_devices: whether it can spread a batch over devices.
    """

    start: Callable[[Job], Running]
    packages: tuple[str, ...] = ()
    extra: str = "peers"
    tasks: tuple[str, ...] = TASKS
    dtypes: tuple[str, ...] = DTYPES
    modes: tuple[str, ...] = ("",)
    env: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    converted: bool = False
    many_devices: bool = False


_INFERENCE = ("inference", "features")


_CONVERTER = ("onnx",)
_INDUCTOR = {"TORCHINDUCTOR_FREEZING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


ENGINES = {
    "fzoo": Engine(start_fzoo, many_devices=True),
    "fzoo-optimized": Engine(functools.partial(start_fzoo, optimized=True), tasks=_INFERENCE, many_devices=True),
    "fzoo-tuned": Engine(functools.partial(start_fzoo, tuned=True), tasks=_INFERENCE, many_devices=True),
    "keras-jax": Engine(start_keras, ("keras",), "bench", env={"KERAS_BACKEND": "jax"}),
    "keras-tensorflow": Engine(
        start_keras, ("keras", "tensorflow"), modes=("graph", "xla"), env={"KERAS_BACKEND": "tensorflow"}
    ),
    "torchvision": Engine(
        start_torchvision,
        ("torch", "torchvision"),
        tasks=("inference", "train"),
        modes=("eager", "frozen", "compile"),
        env=_INDUCTOR,
    ),
    "timm": Engine(
        start_timm,
        ("torch", "timm"),
        tasks=("inference", "train"),
        modes=("eager", "compile"),
        env=_INDUCTOR,
    ),
    "onnxruntime": Engine(
        start_onnxruntime, ("onnxruntime", *_CONVERTER), tasks=_INFERENCE, dtypes=("float32",), converted=True
    ),
    "openvino": Engine(start_openvino, ("openvino", *_CONVERTER), tasks=_INFERENCE, converted=True),
    "openvino-bf16": Engine(
        functools.partial(start_openvino, precision="bf16"),
        ("openvino", *_CONVERTER),
        tasks=_INFERENCE,
        converted=True,
    ),
}
