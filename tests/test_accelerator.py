"""`benchmarks/accelerator.py`: what it measures, and what it makes of processes that die; not how fast anything is."""

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

import fzoo
from fzoo.bench import engines, report

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"
SCHEMA = json.loads(Path(report.__file__).with_name("results.schema.json").read_text())


@pytest.fixture(scope="module")
def accelerator():
    """The script as a module; it keeps its process off accelerators."""
    spec = importlib.util.spec_from_file_location("accelerator", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.syspath_prepend(SCRIPT.parent)  # as where a script is run
        sys.modules["accelerator"] = module  # where its dataclasses look
        spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] in ("accelerator", "on_device")]:
        del sys.modules[name]


def answer(job, accelerator, seconds=0.5):
    """What a process says of a case."""
    times = {"times": [seconds, seconds], "in_flight_times": [seconds / 2]}
    return {
        "case": accelerator.key(job),
        "device": "NVIDIA H100 80GB HBM3",
        "first_call_s": 3.0,
        "peak_mib": 9.0,
        **times,
    }


class Script:
    """Stands for `Child`: each process says what a function of its cases and flags gives, and may then be dead."""

    def __init__(self, play):
        self.play, self.started = play, []

    def __call__(self, phase, jobs, small, threads, **env):
        self.started.append((len(jobs), threads, env.get("XLA_FLAGS", "")))
        said, code = self.play(jobs, threads, env.get("XLA_FLAGS", ""))
        process = SimpleNamespace(returncode=code)
        return SimpleNamespace(answers=lambda deadline: iter(said), process=process, death=lambda: f"exit code {code}")


def run(accelerator, monkeypatch, tmp_path, play, jobs, flags=""):
    """`measure` with such processes."""
    script = Script(play)
    monkeypatch.setattr(accelerator, "Child", script)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    results = accelerator.Results(tmp_path, False)
    results.device, results.platform = "NVIDIA H100 80GB HBM3", "gpu"
    again = accelerator.measure(results, jobs, False, time.monotonic() + 100, flags)
    return results, again, script.started


def test_cases(accelerator):
    """Of every network both types and tasks; the most important network first, and no case twice."""
    jobs = accelerator.cases(("fzoo-optimized", "fzoo"), accelerator.MODELS, False)
    assert len(set(jobs)) == len(jobs) and jobs[0].model == "ResNet50"
    assert {job.model for job in jobs if job.task == "train"} == set(accelerator.MODELS)
    for model in accelerator.MODELS:
        found = {(job.dtype, job.batch) for job in jobs if (job.model, job.task) == (model, "inference")}
        assert {("bfloat16", 256), ("float32", 256), ("bfloat16", 1)} <= found
    resnet = [job for job in jobs if job.model == "ResNet50"]
    assert {job.batch for job in resnet} >= {1, 64, 256, 1024}
    assert {(job.precision, job.inputs) for job in resnet} == {
        ("default", "device"),
        ("default", "host"),
        ("highest", "device"),
    }
    assert "fzoo-optimized" not in {job.engine for job in jobs if job.task == "train"}
    peers = accelerator.cases(("torchvision", "timm"), accelerator.MODELS, False)
    assert {job.mode for job in peers} == {"eager", "compile"}
    for job in jobs + peers:
        assert job.task in engines.ENGINES[job.engine].tasks
        fzoo.create(job.model, input_shape=(job.size, job.size, 3))


def test_tables_as_they_are_measured(accelerator, monkeypatch, tmp_path):
    """After each case all files are there, and what they hold is right."""
    jobs = accelerator.cases(("fzoo",), {"ResNet50": 224}, False)[:3]

    def play(jobs, threads, flags):
        def said():
            yield {"ceiling": "bfloat16 default", "gflop_s": 800_000}
            for count, job in enumerate(jobs, 1):
                yield answer(job, accelerator)
                rows = json.loads((tmp_path / "results.json").read_text())["rows"]
                assert len(rows) == count and rows[-1]["status"] == "ok"

        return said(), 0

    _, again, started = run(accelerator, monkeypatch, tmp_path, play, jobs)
    assert (again, started) == ([], [(3, 4, "")])
    found = json.loads((tmp_path / "results.json").read_text())
    jsonschema.validate(found, SCHEMA)
    (row,) = [r for r in found["rows"] if (r["task"], r["dtype"], r["batch"]) == ("inference", "bfloat16", 256)]
    assert (row["images_per_s"], row["p50_ms"], row["compile_s"]) == (1024, 500, 2.5)
    assert row["peak_share"] == pytest.approx(row["gflop_s"] / 989_400, 1e-3)
    assert row["utilisation"] == pytest.approx(row["gflop_s"] / 800_000, 1e-3)
    page = (tmp_path / "accelerator.md").read_text()
    assert page.startswith("# NVIDIA H100 80GB HBM3\n") and "bfloat16 default 800 TFLOP/s (81 % of its peak)" in page
    assert "| ResNet50, bfloat16, batch 256, images/s | 22,000 | 1,024 |" in page


def test_a_process_that_dies(accelerator, monkeypatch, tmp_path):
    """Those that were compiled together are tried one by one, and what killed it is left out."""
    jobs = accelerator.cases(("fzoo",), {"ResNet50": 224}, False)[:4]
    deadly = jobs[1]

    def play(jobs, threads, flags):
        names = [accelerator.key(job) for job in jobs]
        if deadly not in jobs:
            return [answer(job, accelerator) for job in jobs], 0
        if threads > 1:
            return [{"begin": name} for name in names], -6
        before = jobs[: jobs.index(deadly)]
        said = [each for job in before for each in ({"begin": accelerator.key(job)}, answer(job, accelerator))]
        return [*said, {"begin": accelerator.key(deadly)}], -6

    results, again, started = run(accelerator, monkeypatch, tmp_path, play, jobs)
    assert again == [deadly] and started == [(4, 4, ""), (4, 1, ""), (2, 1, "")]
    assert sorted(row["status"] for row in results.rows) == ["error", "ok", "ok", "ok"]
    assert "exit code -6" in (tmp_path / "accelerator.md").read_text()

    level = "--xla_gpu_autotune_level=0"
    again = accelerator.measure(results, again, False, time.monotonic() + 100, level)
    assert len(results.rows) == 4 and again == [deadly]  # it dies of that, too

    monkeypatch.setattr(accelerator, "Child", Script(lambda jobs, *_: ([answer(job, accelerator) for job in jobs], 0)))
    assert accelerator.measure(results, again, False, time.monotonic() + 100, level) == []
    assert {row["status"] for row in results.rows} == {"ok"} and level in (tmp_path / "accelerator.md").read_text()


def test_what_is_left_when_the_time_is_up(accelerator, monkeypatch, tmp_path):
    jobs = accelerator.cases(("fzoo",), {"ResNet50": 224}, False)[:3]

    def play(jobs, threads, flags):
        def said():
            yield answer(jobs[0], accelerator)
            monkeypatch.setattr(time, "monotonic", lambda: 1e12)

        return said(), -9

    results, again, _ = run(accelerator, monkeypatch, tmp_path, play, jobs)
    assert (len(results.rows), again) == (1, [])
    assert "2 cases were left when the time was up" in (tmp_path / "accelerator.md").read_text()


def test_on_a_tpu_there_are_no_peers(accelerator, tmp_path):
    results = accelerator.Results(tmp_path, False)
    results.platform = "tpu"
    assert accelerator.installed_peers(results) == [] and results.notes == ["No peers on a TPU"]


@pytest.mark.parametrize(("given", "message"), [([], "--out names the folder"), (["--out", "file"], "is a file")])
def test_bad_arguments(accelerator, given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["accelerator.py", *given])
    with pytest.raises(SystemExit) as ended:
        accelerator.main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


#: Hides what a bare machine lacks from every process that is started with this folder on its path.
BARE = """
import sys
for name in ("keras", "igraph", "tensorflow", "typer", "matplotlib", "grain", "beartype", "pytest"):
    sys.modules[name] = None
"""


@pytest.mark.slow
def test_end_to_end_on_a_bare_machine(tmp_path):
    """All phases on the CPU, without what fzoo's extras bring."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        SCRIPT,
        "--small",
        "--model",
        "MobileNetV2",
        "--family",
        "MobileNet",
        "--family",
        "VGG16",
    ]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--out", out, "--minutes", "8"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with (out / "errors.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 and {row["status"] for row in rows} == {"ok"}
    assert all(float(row["error"]) > 0 for row in rows if row["dtype"] == "bfloat16")
    assert len({row["size"] for row in rows}) == 2
    found = json.loads((out / "results.json").read_text())
    jsonschema.validate(found, SCHEMA)
    ours = [row for row in found["rows"] if row["engine"].startswith("fzoo")]
    assert {row["status"] for row in ours} == {"ok"} and {row["task"] for row in ours} == {"inference", "train"}
    assert {row["inputs"] for row in ours} == {"device", "host"}
    assert (out / "accelerator.md").read_text() in done.stdout
    done = subprocess.run([*command, "--out", out], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "holds results already" in done.stderr
