"""The process of one engine: it loads a model, and runs it whenever the parent says so.

The parent runs this file by its path: as a part of fzoo it would bring JAX into every engine's first answer and memory.
Lines of JSON come in and each is answered by one: first the `Job`, when its first result is there; then, any number of
times, the seconds to run for, by what every call took.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

TASKS = ("inference", "features", "train")
DTYPES = ("float32", "bfloat16")
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
    layer: str = ""
    mode: str = ""
    path: str = ""


class Running(NamedTuple):
    """A model that is ready: `call()` runs a batch and waits for its result.

    `flops` is the work of a call where it is not the model's.
    """

    call: Callable[[], object]
    device: str
    flops: int = 0


class Missing(Exception):
    """The engine does not offer this; the message says what."""


def get(name: str) -> Any:
    """A module that may not be installed."""
    return importlib.import_module(name)


def images(job: Job) -> Any:
    """(N, H, W, 3), float32, like preprocessed ones."""
    import numpy as np

    return np.random.default_rng(0).normal(size=(job.batch, job.size, job.size, 3)).astype(np.float32)


def labels(job: Job) -> Any:
    """(N,), of 1000 classes."""
    import numpy as np

    return np.random.default_rng(1).integers(0, 1000, job.batch).astype(np.int32)


# -- engines -----------------------------------------------------------------------------------------------------------


def start_fzoo(job: Job, optimized: bool = False) -> Running:
    """`fzoo.predict` and `fzoo.features`, or a training step in one `jax.jit`.

    Optimized: after `reuse_memory()`, the network that `optimize_for_inference` makes.
    """
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import fzoo

    if job.devices > 1:
        jax.config.update("jax_num_cpu_devices", job.devices)
    devices = jax.devices()[: job.devices]
    if len(devices) < job.devices:
        raise ValueError(f"--devices {job.devices} given, there are {len(devices)} of {devices[0].device_kind}")
    options = {"classifier_activation": None} if job.task == "train" else {}
    shape, dtype = (job.size, job.size, 3), jax.numpy.dtype(job.dtype)
    module, variables = fzoo.load(job.model, weights=None, input_shape=shape, dtype=dtype, **options)
    if optimized:
        fzoo.reuse_memory()
        module, variables = fzoo.optimize_for_inference(module, variables, dtype=dtype)
    x, y, place = images(job), labels(job), lambda array: array
    if job.devices > 1:
        mesh = Mesh(np.array(devices), ("batch",))
        variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, PartitionSpec("batch")))
    if job.task == "train":
        step = training(module, variables)
        return Running(lambda: step(place(x), place(y)), devices[0].device_kind)
    if job.task == "features":
        tap = functools.partial(fzoo.features, module, variables, layers=[job.layer], batch_size=job.batch)
        return Running(lambda: np.asarray(tap(images=place(x))[job.layer]), devices[0].device_kind)
    predict = functools.partial(fzoo.predict, module, variables, batch_size=job.batch)
    return Running(lambda: np.asarray(predict(place(x))), devices[0].device_kind)


def training(module: Any, variables: Any) -> Callable[[Any, Any], float]:
    """A step of SGD on (images, labels), which gives the loss; the state is updated in place."""
    import jax
    import optax

    from fzoo.compiler import compiler_options

    optimizer = optax.sgd(LEARNING_RATE)

    options = compiler_options(jax.devices()[0].platform, module.dtype)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def step(state, x, y):
        variables, moments, key = state
        key, dropout = jax.random.split(key)

        def loss_fn(params):
            logits, updates = module.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"], rngs={"dropout": dropout}
            )
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updates

        (loss, updates), gradients = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        changes, moments = optimizer.update(gradients, moments)
        params = optax.apply_updates(variables["params"], changes)
        return ({**variables, **updates, "params": params}, moments, key), loss

    state = (variables, optimizer.init(variables["params"]), jax.random.key(0))

    def call(x, y):
        nonlocal state
        state, loss = step(state, x, y)
        return float(loss)

    return call


def keras_model(job: Job) -> Any:
    """The model in Keras, with random weights; for features, up to the layer."""
    keras = get("keras")
    if job.dtype == "bfloat16":
        keras.config.set_dtype_policy("mixed_bfloat16")
    options = {"classifier_activation": None} if job.task == "train" else {}
    model = getattr(keras.applications, job.model)(weights=None, input_shape=(job.size, job.size, 3), **options)
    return keras.Model(model.input, model.get_layer(job.layer).output) if job.task == "features" else model


def start_keras(job: Job) -> Running:
    """`predict_on_batch` and `train_on_batch`, on the backend that KERAS_BACKEND names."""
    keras = get("keras")
    model = keras_model(job)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    how = {"xla": True, "graph": False}.get(job.mode, "auto")
    model.compile(optimizer=keras.optimizers.SGD(LEARNING_RATE), loss=loss, jit_compile=how)
    if keras.config.backend() == "jax":
        device = get("jax").devices()[0].device_kind
    else:
        device = "gpu" if get("tensorflow").config.list_physical_devices("GPU") else "cpu"
    x, y = images(job), labels(job)
    if job.task == "train":
        return Running(lambda: float(model.train_on_batch(x, y)), device)
    return Running(lambda: model.predict_on_batch(x), device)


#: torchvision's names, where it has the network. Its ResNet50 strides in the 3x3 convolutions: some 6 % more work.
TORCHVISION = {
    "DenseNet121": "densenet121",
    "DenseNet169": "densenet169",
    "DenseNet201": "densenet201",
    "InceptionV3": "inception_v3",
    "MobileNetV2": "mobilenet_v2",
    "ResNet50": "resnet50",
    "VGG16": "vgg16",
    "VGG19": "vgg19",
}


def start_torchvision(job: Job) -> Running:
    """torchvision's network of that name, channels last: eager, compiled, or traced and frozen."""
    if job.model not in TORCHVISION:
        raise Missing(f"torchvision has no {job.model}")
    if (job.task, job.mode) == ("train", "frozen"):
        raise Missing("what is frozen is not trained")
    torch = get("torch")
    special = {"InceptionV3": {"aux_logits": False, "init_weights": False}}
    network = get("torchvision.models").get_model(TORCHVISION[job.model], weights=None, **special.get(job.model, {}))
    device = "cuda" if torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS") != "cpu" else "cpu"
    to = functools.partial(dict, device=device, dtype=getattr(torch, job.dtype), memory_format=torch.channels_last)
    network = network.train(job.task == "train").to(**to())
    host = torch.from_numpy(images(job)).permute(0, 3, 1, 2)  # a view, channels last
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    if job.task == "train":
        targets = torch.from_numpy(labels(job)).long()
        optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE)
        forward = torch.compile(network) if job.mode == "compile" else network

        def step():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(forward(host.to(**to())).float(), targets.to(device))
            loss.backward()
            optimizer.step()
            return loss.item()

        return Running(step, name)
    with torch.inference_mode():
        if job.mode == "frozen":
            network = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(network, host.to(**to()))))
        elif job.mode == "compile":
            network = torch.compile(network)

    @torch.inference_mode()
    def call():
        return network(host.to(**to())).cpu()

    return Running(call, name)


def start_onnxruntime(job: Job) -> Running:
    """ONNX Runtime on the CPU."""
    onnxruntime, x = get("onnxruntime"), images(job)
    options = onnxruntime.SessionOptions()
    options.add_free_dimension_override_by_name("n", job.batch)
    session = onnxruntime.InferenceSession(job.path, options, providers=["CPUExecutionProvider"])
    return Running(lambda: session.run(None, {"images": x}), "cpu")


def start_openvino(job: Job, precision: str = "") -> Running:
    """OpenVINO on the CPU, a request at a time on all cores."""
    openvino, x = get("openvino"), images(job)
    core = openvino.Core()
    precision = precision or {"float32": "f32", "bfloat16": "bf16"}[job.dtype]
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise Missing("this processor has no bfloat16, OpenVINO would compute in float32")
    model = core.read_model(job.path)
    model.reshape(list(x.shape))
    options = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return Running(lambda: request.infer([x], share_inputs=True)[0], "cpu")


def start_ceiling(job: Job) -> Running:
    """The fastest matrix product: what the device does at best with the arithmetic of a convolution."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    device = jax.devices()[0]
    sizes = (512, 1024, 2048) if device.platform == "cpu" else (2048, 4096, 8192)
    best, fastest = Running(lambda: None, device.device_kind), 0.0
    for n in sizes:
        a = np.random.default_rng(0).normal(size=(n, n)).astype(np.float32)
        calls: list[Callable[[], object]] = [functools.partial(np.matmul, a, a)] if device.platform == "cpu" else []
        for dtype in {"float32", job.dtype}:
            product, b = jax.jit(jnp.matmul), jnp.asarray(a, dtype)
            calls.append(lambda product=product, b=b: product(b, b).block_until_ready())
        for call in calls:
            call()
            speed = 2 * n**3 / min(timed(call) for _ in range(3))
            if speed > fastest:
                best, fastest = Running(call, device.device_kind, 2 * n**3), speed
    return best


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
        converted: whether it reads an ONNX file that is converted from the Keras model.
        spread: whether it can spread a batch over devices.
    """

    start: Callable[[Job], Running]
    packages: tuple[str, ...] = ()
    extra: str = "peers"
    tasks: tuple[str, ...] = TASKS
    dtypes: tuple[str, ...] = DTYPES
    modes: tuple[str, ...] = ("",)
    env: Mapping[str, str] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    converted: bool = False
    spread: bool = False


_INFERENCE = ("inference", "features")
_CONVERTER = ("tensorflow", "tf2onnx", "onnx", "keras")

ENGINES = {
    "fzoo": Engine(start_fzoo, spread=True),
    "fzoo-optimized": Engine(functools.partial(start_fzoo, optimized=True), tasks=_INFERENCE, spread=True),
    "keras-jax": Engine(start_keras, ("keras",), "bench", env={"KERAS_BACKEND": "jax"}),
    "keras-tensorflow": Engine(
        start_keras, ("keras", "tensorflow"), modes=("graph", "xla"), env={"KERAS_BACKEND": "tensorflow"}
    ),
    "torchvision": Engine(
        start_torchvision,
        ("torch", "torchvision"),
        tasks=("inference", "train"),
        modes=("eager", "frozen", "compile"),
        env={"TORCHINDUCTOR_FREEZING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
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

CEILING = "ceiling"


# -- what is done once, in a process of its own ------------------------------------------------------------------------


#: Classes of layers whose output is there in any form of a network: no convolution that a BN may be folded into.
TAPPED = ("Activation", "ReLU", "Add", "MaxPooling2D")


def facts(job: Job) -> dict[str, Any]:
    """What is known of a model without running it.

    Its parameters, its FLOPs for an image (three times those of the forward pass to train), for features the layer
    where half of them are done, and JAX's device.
    """
    import jax

    import fzoo
    from fzoo.layers import trace

    found = trace(fzoo.create(job.model, input_shape=(job.size, job.size, 3)))
    nodes = {node.name: node for node in found.nodes}
    flops, done, layer = sum(node.flops for node in found.nodes), 0, ""
    if job.task == "features":
        for node in found.nodes:
            done += node.flops
            if done >= flops / 2 and node.kind in TAPPED:
                layer = node.name
                break
        needed, stack = set(), [layer]
        while stack:
            name = stack.pop()
            if name not in needed:
                needed.add(name)
                stack.extend(nodes[name].inputs)
        flops = sum(nodes[name].flops for name in needed)
    device = jax.devices()[0]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(found.variables)),
        "flops": flops * (3 if job.task == "train" else 1),
        "layer": layer,
        "device": device.device_kind,
        "platform": device.platform,
    }


def convert(job: Job) -> dict[str, Any]:
    """Write the Keras model to `path` as ONNX.

    Kernels of dense layers are arguments until the graph is converted: tf2onnx copies constants many times over,
    which takes minutes for VGG's.
    """
    keras, tf, tf2onnx, onnx = (get(name) for name in ("keras", "tensorflow", "tf2onnx", "onnx"))
    model = keras_model(dataclasses.replace(job, dtype="float32"))
    kernels = {f"kernel_{i}": v for i, v in enumerate(v for v in model.trainable_variables if len(v.shape) == 2)}

    @tf.function
    def call(x, *arrays):
        with keras.StatelessScope(state_mapping=list(zip(kernels.values(), arrays, strict=True))):
            return model(x, training=False)

    signature = [tf.TensorSpec((None, job.size, job.size, 3), tf.float32, name="images")]
    signature += [tf.TensorSpec(v.shape, tf.float32, name=name) for name, v in kernels.items()]
    graph = tf2onnx.convert.from_function(call, input_signature=signature, opset=17)[0]
    inputs = [i for i in graph.graph.input if i.name not in kernels]
    inputs[0].type.tensor_type.shape.dim[0].dim_param = "n"
    del graph.graph.input[:]
    graph.graph.input.extend(inputs)
    for name, v in kernels.items():
        graph.graph.initializer.append(get("onnx.numpy_helper").from_array(v.numpy(), name))
    onnx.save(graph, job.path)
    return {}


PREPARATIONS = {"facts": facts, "convert": convert}


# -- the process -------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turn(call: Callable[[], object], seconds: float) -> list[float]:
    """Call for some seconds, once at least; what each call took."""
    start, times = time.perf_counter(), []
    while not times or time.perf_counter() - start < seconds:
        times.append(timed(call))
    return times


def memory() -> dict[str, float]:
    """The most memory that this process has held, in MiB, and that its JAX device has, where JAX knows."""
    # Not ru_maxrss alone: on Linux it counts the parent, as which every process begins.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")]
    found = {"peak_mib": peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if "jax" in sys.modules:
        stats = sys.modules["jax"].devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found["device_peak_mib"] = stats["peak_bytes_in_use"] / 2**20
    return found


def one_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def main() -> None:
    """Answer on what was standard output; whatever else is printed there goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")

    requests = iter(sys.stdin.readline, "")
    try:
        job = Job(**json.loads(next(requests)))
        if job.engine in PREPARATIONS:
            return answer(**PREPARATIONS[job.engine](job))
        running = start_ceiling(job) if job.engine == CEILING else ENGINES[job.engine].start(job)
        answer(first_call_s=timed(running.call), device=running.device, flops=running.flops)
        for request in requests:
            times = turn(running.call, float(request))
            answer(times=times, **memory())
    except Missing as e:
        answer(missing=str(e))
    except Exception as e:
        answer(error=one_line(e))


if __name__ == "__main__":
    main()
