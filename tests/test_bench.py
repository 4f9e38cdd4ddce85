"""`fzoo bench`: what it runs, writes and merges; not how fast anything is."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import jax
import jax.numpy as jnp
import jsonschema
import networks
import numpy as np
import pytest
from PIL import Image
from tiers import slow, slow_but

import fzoo
from fzoo.bench import engines, report, runner, worker
from fzoo.bench.peaks import published_peak

SCHEMA = json.loads(Path(report.__file__).with_name("results.schema.json").read_text())
SMALL = ["MobileNet", "--size", "32", "--seconds", "0.1"]


def bench(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "fzoo.cli", "bench", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        timeout=300,
    )


def row(**values):
    """One as `runner.row` makes it."""
    job = engines.Job("fzoo", "MobileNet", 1, "inference", "float32", 224)
    times, in_flight_times = values.pop("times", [0.1, 0.2, 0.3]), values.pop("in_flight_times", [])
    measured = runner.Measured("cpu", "", times, in_flight_times, 0.5, 1.0, 100.0, np.nan)
    known = {"device": "cpu", "parameters": 10, "flops": 10**9, "layer": ""}
    shares = {"ceiling_gflop_s": 10.0, "utilisation": 0.5, "peak_tflop_s": None, "peak_share": None}
    return {**runner.row(job, "fzoo", known, measured), **shares, **values}


@pytest.mark.slow
def test_a_run_its_files_a_second_run_and_the_report(tmp_path):
    out = tmp_path / "new" / "out"
    done = bench(*SMALL, "-e", "fzoo", "-e", "keras-jax", "--batch", "2", "--out", out)
    assert done.returncode == 0 and done.stderr == ""
    assert [line.split("\t")[:3] for line in done.stdout.splitlines()] == [
        ["MobileNet", "2", "fzoo"],
        ["MobileNet", "2", "keras-jax"],
    ]
    found = json.loads((out / "results.json").read_text())
    assert found["machine"]["versions"]["fzoo"] == fzoo.__version__ and "keras" in found["machine"]["versions"]
    first = found["rows"]
    for each in first:
        assert each["status"] == "ok" and each["calls"] >= 1 and each["device"] == "cpu"
        assert min(each[key] for key in ("images_per_s", "p50_ms", "first_call_s", "peak_mib", "utilisation")) > 0
        assert each["p95_ms"] >= each["p50_ms"] and each["first_answer_s"] > each["first_call_s"]
        assert each["parameters"] == fzoo.spec("MobileNet").parameters
    assert sorted(path.name for path in out.iterdir()) == [
        "results.csv",
        "results.json",
        "results.md",
        "throughput.png",
    ]

    assert bench(*SMALL, "-e", "fzoo", "--batch", "1", "--out", out).returncode == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(r["batch"], r["engine"]) for r in rows] == [(1, "fzoo"), (2, "fzoo"), (2, "keras-jax")]
    assert rows[1:] == first
    with (out / "results.csv").open(newline="") as file:
        assert [each["engine"] for each in csv.DictReader(file)] == ["fzoo", "fzoo", "keras-jax"]

    for path in out.glob("*.png"):
        path.unlink()
    done = bench("--report", out)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 3 and done.stdout.splitlines()[2].split("\t")[11] == "1.00"
    for name in ("throughput", "batches"):
        assert len(np.unique(np.asarray(Image.open(out / f"{name}.png").convert("L")))) > 10


@pytest.mark.slow
def test_a_run_and_its_files(tmp_path, monkeypatch, command_line):
    """fzoo in a process of its own; the facts and the ceiling, which have others, are made up here."""
    start, ceiling = runner.start, runner.Worker.__new__(runner.Worker)
    ceiling.times, ceiling.in_flight_times, ceiling.spent = [1.0], [], 1.0
    ceiling.first, ceiling.stop = {"flops": 10**12}, lambda: None
    monkeypatch.setattr(runner, "prepared", lambda what, job, folder: worker.PREPARATIONS[what](job))
    monkeypatch.setattr(runner, "start", lambda job, *rest: ceiling if job.engine == "ceiling" else start(job, *rest))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    options = ["--batch", "2", "--in-flight", "3", "--out", tmp_path]
    code, output, errors = command_line("bench", *SMALL, "-e", "fzoo", *options)
    assert (code, errors) == (0, [])
    assert [line.split("\t")[:3] for line in output] == [["MobileNet", "2", "fzoo"]]
    (found,) = report.read_results(tmp_path)["rows"]
    assert found["status"] == "ok" and found["calls"] >= 1 and found["device"] == "cpu"
    assert (found["inputs"], found["precision"], found["in_flight"]) == ("device", "default", 3)
    assert found["ceiling_gflop_s"] == 1000 and found["utilisation"] == pytest.approx(found["gflop_s"] / 1000, 1e-3)
    assert found["first_answer_s"] > found["first_call_s"] > found["p50_ms"] / 1000 > 0
    assert found["compile_s"] == pytest.approx(found["first_call_s"] - found["p50_ms"] / 1000, abs=1e-3)
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)
    names = ["results.csv", "results.json", "results.md", "throughput.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.slow
def test_a_killed_process_is_one_row_and_the_others_go_on(monkeypatch):
    turn = runner.Worker.turn

    def deadly(self, seconds):
        if self.job.engine == "fzoo" and self.times:
            os.kill(self.process.pid, signal.SIGKILL)
        turn(self, seconds)

    monkeypatch.setattr(runner.Worker, "turn", deadly)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    rows = runner.bench(["MobileNet"], engines=["fzoo", "fzoo-optimized"], batches=[2], size=32, seconds=1.0, devices=2)
    assert [r["status"] for r in rows] == ["error", "ok"]
    assert "killed by SIGKILL" in rows[0]["reason"] and rows[0]["images_per_s"] is None
    assert rows[1]["calls"] > 1 and rows[1]["devices"] == 2


@pytest.mark.slow
def test_interrupted(tmp_path):
    """Ctrl-C: one line, and neither a process nor a file is left."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "fzoo.cli", "bench", *SMALL, "--seconds", "100", "-e", "fzoo"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path), "FZOO_TEST_MARK": mark},
    )

    def alive():
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                found += [path] if mark.encode() in path.read_bytes() else []
        return found

    for _ in range(600):
        if len(alive()) > 1:
            break
        time.sleep(0.1)
    assert len(alive()) > 1
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors == "fzoo: interrupted\n"
    for _ in range(100):  # what was killed may take its time to go
        if not alive():
            break
        time.sleep(0.1)
    assert alive() == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-e", "fzo"], "unknown engine 'fzo': did you mean fzoo"),
        (["--reference", "keras"], "unknown engine 'keras': did you mean keras-jax"),
        (["--task", "training"], "unknown task 'training': did you mean train"),
        (["--dtype", "float16"], "unknown dtype 'float16': did you mean bfloat16"),
        (["ResNet5"], "unknown model 'ResNet5'"),
        (["MobileNet", "--size", "31"], "32 x 32"),
        (["--batch", "3", "--devices", "2"], "a batch of 3 given, a positive multiple of 2 devices expected"),
        (["--inputs", "hosts"], "unknown place of the inputs 'hosts': did you mean host"),
        (["--precision", "high"], "unknown precision 'high': did you mean highest"),
        (
            ["--precision", "highest", "--dtype", "bfloat16"],
            "precision 'highest' is of float32, dtype 'bfloat16' given",
        ),
        (["--in-flight", "0"], "Invalid value for '--in-flight'"),
        (["--batch", "0"], "Invalid value for '--batch'"),
        (["--report", "nowhere"], "no nowhere/results.json"),
        (["--out", "broken", "-e", "fzoo"], "results.json is not what `fzoo bench --out` writes"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"rows": [1]}')
    code, output, (error,) = command_line("bench", *arguments)
    assert (code, output) == (2, [])
    assert error.startswith("fzoo: error: ") and message in error


def test_what_is_not_installed_names_the_command(monkeypatch, tmp_path, command_line):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("keras", "openvino") else find_spec(name)
    )
    said = []
    assert {"fzoo", "fzoo-optimized"} <= set(runner.available([], said.append))
    assert said[0] == "skipped, not installed: keras-jax: pip install 'fzoo[bench]'"
    assert "openvino" in said[1] and said[1].endswith(": pip install 'fzoo[peers]'")
    with pytest.raises(ModuleNotFoundError, match=r"keras-jax needs keras: pip install 'fzoo\[bench\]'"):
        runner.available(["fzoo", "keras-jax"], said.append)
    with pytest.raises(ModuleNotFoundError, match=r"openvino needs openvino.*: pip install 'fzoo\[peers\]'"):
        runner.available(["openvino"], said.append)

    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    message = "fzoo: error: the pictures are drawn by matplotlib: pip install 'fzoo[bench]'"
    assert command_line("bench", *SMALL, "--out", tmp_path / "out") == (2, [], [message])


def test_a_newer_row_replaces_one_of_the_same_key(tmp_path):
    older = [row(), row(engine="keras-jax"), row(model="VGG16")]
    report.write(tmp_path, older, {})
    newer = row(images_per_s=7.0)
    assert report.write(tmp_path, [newer], {"cores": 2}) == [newer, *older[1:]]
    assert report.read_results(tmp_path) == {"machine": {"cores": 2}, "rows": [newer, *older[1:]]}


def test_rows_that_are_older_than_some_options(tmp_path):
    """They were measured with inputs from the host."""
    older = {key: value for key, value in row().items() if key not in report.OLDER}
    (tmp_path / "results.json").write_text(json.dumps({"machine": {}, "rows": [older]}))
    assert report.read_results(tmp_path)["rows"] == [older | report.OLDER]
    assert len(report.write(tmp_path, [row(), row(inputs="host")], {})) == 2
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)


def test_what_failed_is_a_row_of_the_schema(tmp_path):
    job = engines.Job("fzoo", "MobileNet", 1, "inference", "float32", 224)
    known = {"device": "cpu", "parameters": 10, "flops": 10**9, "layer": ""}
    shares = {"ceiling_gflop_s": None, "utilisation": None, "peak_tflop_s": None, "peak_share": None}
    found = runner.row(job, "fzoo", known, None, runner.NoAnswer("missing", "why")) | shares
    report.write(tmp_path, [found], runner.machine([]))
    jsonschema.validate(json.loads((tmp_path / "results.json").read_text()), SCHEMA)


def test_throughput_is_of_calls_in_flight():
    found = row(times=[0.2], in_flight_times=[0.05, 0.1, 0.1])
    assert (found["images_per_s"], found["p50_ms"], found["gflop_s"]) == (10, 200, 10)


def test_calls_in_flight():
    """So many are begun before the first is waited for, and none is left."""
    log: list[str] = []
    running = engines.Running(lambda: log.append("start"), lambda _: log.append("wait"), "cpu")
    assert worker.with_several_in_flight(running, 0, 3) > 0
    assert log == ["start"] * 3 + ["wait"] * 3
    log.clear()
    found = worker.turn(running, 0.01, 2)
    assert found["in_flight_times"][0] < 0.01 and len(found["times"]) > 1
    assert log.count("start") == log.count("wait")
    assert set(worker.turn(running, 0.001, 1)) == {"times"}


@pytest.mark.parametrize("inputs", engines.INPUTS)
@pytest.mark.parametrize("task", [slow(task) if task == "train" else task for task in engines.TASKS])
def test_where_inputs_come_from_and_results_go(task, inputs, monkeypatch):
    """And the same numbers, whether a batch is spread over devices or not."""
    given = []
    for name in ("predict", "features"):
        real = getattr(fzoo, name)

        def spy(*args, real=real, **options):
            given.append(options["images"] if "images" in options else args[2])
            return real(*args, **options)

        monkeypatch.setattr(fzoo, name, spy)
    layer = "conv_pw_3_relu" if task == "features" else ""
    results = []
    for devices in (1, 2):
        job = engines.Job("fzoo", "MobileNet", 2, task, "float32", 32, devices, inputs=inputs, layer=layer)
        running = engines.start_fzoo(job)
        started = running.start()
        assert isinstance(started, jax.Array) and len(started.devices()) == devices
        results.append(running.wait(started))
        assert isinstance(results[-1], jax.Array if inputs == "device" else np.ndarray)
    assert [isinstance(x, jax.Array) for x in given] == [inputs == "device"] * len(given)
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)


def test_types_and_precisions(monkeypatch):
    """Images and kernels of bfloat16; products in float32 only where that was asked for."""
    seen = []

    def spy(module, variables, images, **options):
        kernel = variables["params"]["conv1"]["kernel"]
        seen.append((images.dtype, kernel.dtype, module.dtype, jax.config.jax_default_matmul_precision))
        return images

    monkeypatch.setattr(fzoo, "predict", spy)
    for dtype, precision in (("float32", "default"), ("float32", "highest"), ("bfloat16", "default")):
        job = engines.Job("fzoo", "MobileNet", 1, "inference", dtype, 32, precision=precision)
        for optimized in (False, True):
            engines.start_fzoo(job, optimized).start()
    wide, narrow = jnp.dtype("float32"), jnp.dtype("bfloat16")
    assert seen[::2] == seen[1::2]
    assert seen[::2] == [(wide, wide, wide, None), (wide, wide, wide, "highest"), (narrow, narrow, narrow, None)]


def test_a_trace(tmp_path):
    running = engines.start_fzoo(engines.Job("fzoo", "MobileNet", 1, "inference", "float32", 32))
    assert worker.profiled(running, str(tmp_path)) == {"profile": str(tmp_path)}
    assert any(path.stat().st_size > 10_000 for path in tmp_path.rglob("*.xplane.pb"))
    assert worker.profiled(engines.at_once(lambda: None, "cpu"), str(tmp_path)) == {"profile": None}


def test_published_peaks():
    for kind, dtype, precision, peak in (
        ("NVIDIA H100 80GB HBM3", "float32", "default", 494.7),
        ("NVIDIA H100 80GB HBM3", "float32", "highest", 66.9),
        ("NVIDIA H100 PCIe", "bfloat16", "default", 756),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", "default", 312),
        ("NVIDIA L4", "float32", "default", 60),
        ("Tesla T4", "bfloat16", "default", None),
        ("TPU v5 lite", "bfloat16", "default", 197),
        ("TPU v5p", "float32", "default", 459),
        ("TPU v6 lite", "float32", "highest", None),
        ("cpu", "float32", "default", None),
    ):
        assert published_peak(kind, dtype, precision) == peak, kind


def test_a_table_is_of_one_kind_of_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "instruction_sets", lambda: ("AVX2",))
    report.write(tmp_path, [row()], {"processor": "x", "instruction_sets": ["AVX2"], "cores": 2})
    assert (tmp_path / "results.md").read_text().startswith("Processor: x (AVX2), 2 cores\n\n| model |")
    report.check(tmp_path)
    monkeypatch.setattr(report, "instruction_sets", lambda: ("AVX2", "AVX-512"))
    with pytest.raises(ValueError, match="a processor with AVX2, this one has AVX2, AVX-512: another folder expected"):
        report.check(tmp_path)


def test_the_table():
    rows = [
        row(),
        row(engine="keras-jax", images_per_s=2.5),
        row(engine="openvino", images_per_s=10.0),
        row(engine="torchvision", images_per_s=None, status="missing"),
        row(engine="fzoo", batch=16, images_per_s=1234.5),
    ]
    assert (rows[0]["images_per_s"], rows[0]["p50_ms"], rows[0]["p95_ms"], rows[0]["gflop_s"]) == (5, 200, 290, 5)
    headers, cells = report.table(rows)
    at = {header: i for i, header in enumerate(headers)}
    assert [c[at["images/s"]] for c in cells] == ["5.00", "2.50", "10.0", "-", "1,234"]
    assert [c[at["× keras-jax"]] for c in cells] == ["2.00", "1.00", "4.00", "-", "-"]
    assert [c[at["× fastest peer"]] for c in cells] == ["0.500", "0.250", "1.00", "-", "-"]
    assert "dtype" not in headers and "dtype" in report.table([*rows, row(dtype="bfloat16")])[0]


@pytest.mark.parametrize(
    "models",
    [
        ("MobileNet", "ResNet50", "VGG16"),
        slow(tuple(fzoo.list_models(tagged=False)[::2])),  # more than fit beside a plot of the usual height
    ],
)
def test_plots_of_every_kind(tmp_path, models):
    rows = [
        row(model=model, engine=engine, batch=batch, size=fzoo.spec(model).input_size, images_per_s=batch + 3.0, **more)
        for model in models
        for engine in engines.ENGINES
        for batch in (1, 4)
        for more in ({}, {"task": "train", "dtype": "bfloat16"})
    ]
    paths = report.plot(tmp_path, rows)
    assert [path.name for path in paths] == ["throughput.png", "accuracy.png", "batches.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert report.plot(tmp_path, []) == []
    assert report.spread_apart([1, 1, 1.5, 9], 2) == pytest.approx([-5 / 6, 7 / 6, 19 / 6, 9])


@pytest.mark.slow
def test_a_training_step_learns():
    options = {"classes": 4, "input_shape": (32, 32, 3), "classifier_activation": None, "dropout": 0}
    module, variables = networks.network("MobileNet", alpha=0.25, **options)
    step = engines.training(module, jax.tree.map(jnp.array, variables))  # which are updated in place
    x = networks.random_images((4, 32, 32, 3))
    losses = [float(step(x, np.arange(4))) for _ in range(40)]
    assert np.isfinite(losses).all() and min(losses[-10:]) < losses[0] / 2


@pytest.mark.parametrize("name", slow_but(["MobileNetV2", "DenseNet121", "InceptionV3", "VGG16"], "MobileNetV2"))
def test_the_layer_in_the_middle(name):
    """It can be tapped, and about half of the work is before it."""
    size = fzoo.spec(name).input_size
    known = {task: worker.facts(engines.Job("facts", name, 1, task, "float32", size)) for task in engines.TASKS}
    assert known["train"]["flops"] == 3 * known["inference"]["flops"]
    assert 0.3 < known["features"]["flops"] / known["inference"]["flops"] < 0.8
    assert known["features"]["layer"] in fzoo.layer_names(fzoo.create(name))
    assert known["features"]["device"] == jax.devices()[0].device_kind


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchvision", "timm"])
@pytest.mark.parametrize("task", ["inference", "train"])
def test_engines_of_pytorch(engine, task, monkeypatch, tmp_path):
    skip_without(engine)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for inputs, dtype in (("device", "float32"), ("host", "bfloat16")):
        options = {"engines": [engine], "batches": [2], "size": 32, "seconds": 0.1, "task": task}
        monkeypatch.setattr(runner, "ENGINES", {engine: dataclasses.replace(engines.ENGINES[engine], modes=("eager",))})
        (found,) = runner.bench(["MobileNetV2"], **options, inputs=inputs, dtype=dtype, profile=tmp_path)
        assert found["status"] == "ok", found["reason"]
        assert (tmp_path / f"MobileNetV2-{task}-{dtype}-2-{engine}" / "trace.json").stat().st_size > 10_000


def skip_without(engine):
    for package in engines.ENGINES[engine].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_that_read_onnx(engine, monkeypatch):
    skip_without(engine)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (found,) = runner.bench(["MobileNet"], engines=[engine], batches=[2], size=32, seconds=0.1, task="features")
    assert found["status"] == "ok", found["reason"]


@pytest.fixture(scope="module")
def zoo():
    """`benchmarks/zoo.py`'s names."""
    return runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "zoo.py"))


def test_what_has_a_speed_of_its_own(zoo):
    """Options of the graph, and the size; other weights have the graph's."""
    names = ("ConvNeXtTiny", "ConvNeXtTiny.tv_in1k", "ConvNeXtTiny.fb_in22k_ft_in1k_384")
    plain, same, larger = map(zoo["graph_of"], names)
    assert plain == same != larger
    plain, other, same = map(zoo["graph_of"], ("ResNet50", "ResNet50.tv2_in1k", "ResNet50.a1_in1k"))
    assert other == same != plain  # a stride elsewhere, and no biases


def test_rates_go_by_the_graph(zoo, tmp_path):
    assert zoo["read_rates"](tmp_path) == {}
    rows = [{"model": "ConvNeXtTiny.fb_in1k", "images_per_s": 12.5, "status": "ok"}]
    rows.append({"model": "VGG16", "images_per_s": None, "status": "error"})
    defaults = dict.fromkeys(report.KEY, "") | {"size": 224, "devices": 1, "batch": 4, "engine": "fzoo"}
    (tmp_path / "results.json").write_text(json.dumps({"machine": {}, "rows": [defaults | row for row in rows]}))
    rates = zoo["read_rates"](tmp_path)
    assert rates["ConvNeXtTiny.tv_in1k"] == rates["ConvNeXtTiny"] == 12.5
    assert not {"VGG16", "ConvNeXtSmall", "ConvNeXtTiny.fb_in22k_ft_in1k_384"} & rates.keys()


def test_the_best_are_beaten_by_none(zoo, tmp_path):
    rates = {"VGG16": 10.0, "ResNet50": 5.0, "MobileNet": 10.0, "VGG19": 4.0}
    top1 = {"VGG16": 71.3, "ResNet50": 74.9, "MobileNet": 70.4, "VGG19": 71.3}
    assert zoo["frontier"](rates, top1) == ["VGG16", "ResNet50"]
    figure = zoo["draw"](rates)
    figure.savefig(tmp_path / "zoo.png")
    assert [text.get_text() for text in figure.axes[0].texts] == ["VGG16", "ResNet50"]


def test_what_is_far_below_its_family_is_suspected(zoo):
    names = ("EfficientNetB0", "EfficientNetB1", "EfficientNetB2", "VGG16", "VGG19")
    rates = (44.0, 96.0, 93.0, 200.0, None)
    rows = [{"model": n, "gflop_s": r, "status": "ok" if r else "error"} for n, r in zip(names, rates, strict=True)]
    assert zoo["suspects"](rows) == ["EfficientNetB0"]
