"""Batch jobs: what comes out, whatever happens on the way."""

import csv
import errno
import fcntl
import functools
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time

import h5py
import jax
import networks
import numpy as np
import pyarrow.parquet
import pytest
from hurry import COMPILER_OPTIONS
from PIL import Image
from test_devices import EIGHT

import fzoo
from fzoo.images.files import ImageFile
from fzoo.images.recipe import Recipe
from fzoo.images.walk import find_images
from fzoo.inference import devices
from fzoo.jobs import pipeline as jobs
from fzoo.jobs import shards
from fzoo.jobs.listing import Entry, Listing
from fzoo.jobs.network import describe_value, fingerprint

SMALL = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 5}
OPTIONS = ["-m", "MobileNet", "-o", "alpha=0.25", "--size", "32", "--classes", "5"]
TAP = "conv_pw_3_relu"


@pytest.fixture(scope="module")
def network():
    return networks.network("MobileNet", **SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network):
    """`weights.h5`, and `images/` of 30 in two folders, of which 2 can't be read."""
    folder = tmp_path_factory.mktemp("jobs")
    fzoo.save_keras_weights(*network, folder / "weights.h5")
    for i in range(30):
        path = folder / "images" / ("b" if i % 2 else "a") / f"{i:02}.{'png' if i % 3 else 'bmp'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        (pixels,) = networks.random_images((1, 20 + i, 40, 3), i, pixels=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    (folder / "images" / "a" / "10.png").write_bytes(b"not an image")
    (folder / "images" / "a" / "notes.txt").write_text("not taken")
    (folder / "images" / "b" / "11.png").write_bytes((folder / "images" / "b" / "13.png").read_bytes()[:60])
    return folder


BAD = ["images/a/10.png", "images/b/11.png"]


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def command(*args):
    return [sys.executable, "-m", "fzoo.cli", *map(str, args), *OPTIONS, "-w", "weights.h5"]


def run(*args, **env):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **env}
    return subprocess.run(command(*args), capture_output=True, text=True, env=env, timeout=600)


def names_of(*given):
    return [image.name for image in find_images(given)]


def good():
    return [name for name in names_of("images") if name not in BAD]


def computed(network, pixels):
    """What the layers give for pixels, without any of what is tested here."""
    module, variables = network
    apply = functools.partial(module.apply, method="endpoints")
    x = pixels.astype(np.float32) / np.float32(127.5) - 1
    return jax.jit(apply, static_argnums=2, compiler_options=COMPILER_OPTIONS)(variables, x, (TAP, "predictions"))


@pytest.fixture(scope="module")
def rows(network, folder):
    """{layer: {name: the row of each image that can be read}}; no two are alike."""
    names = sorted(path for path in (folder / "images").rglob("*.*") if path.suffix in (".png", ".bmp"))
    names = [path for path in names if str(path.relative_to(folder)) not in BAD]
    found = computed(network, np.stack([fzoo.load_image_for(path, "MobileNet", 32) for path in names]))
    for outputs in found.values():
        assert networks.differences(outputs)[0] > 0.01
    names = [str(path.relative_to(folder)) for path in names]
    return {layer: dict(zip(names, np.asarray(outputs), strict=True)) for layer, outputs in found.items()}


def expected(rows, names, layer=TAP):
    return np.stack([rows[layer][name] for name in names])


def assert_rows(found, theirs):
    np.testing.assert_allclose(found, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("ending", ["npz", "h5", "parquet"])
def test_features(network, rows, tmp_path, ending, batch_size):
    """All rows in the order of the images, whatever the shards and batches; the others in the file of errors."""
    out = tmp_path / f"x.{ending}"
    options = {"preprocess": "MobileNet", "shard_size": 7, "batch_size": batch_size}
    report = fzoo.run_job(*network, ["images"], out, layers=[TAP, "predictions"], **options)
    assert (report.images, report.done, report.failed, report.joined) == (30, 30, 2, True)
    if ending == "npz":
        with np.load(out) as arrays:
            images, found = arrays["images"].tolist(), dict(arrays)
    elif ending == "h5":
        with h5py.File(out) as file:
            images, found = file["images"].asstr()[:].tolist(), {name: file[name][:] for name in file}
    else:
        table = pyarrow.parquet.read_table(out)
        images = table["image"].to_pylist()
        shape = json.loads(table.schema.field(TAP).metadata[b"shape"])
        found = {name: np.array(table[name].to_pylist(), np.float32) for name in (TAP, "predictions")}
        found[TAP] = found[TAP].reshape(-1, *shape)
    assert images == good()
    for layer in (TAP, "predictions"):
        assert_rows(found[layer], expected(rows, good(), layer))
    errors = [json.loads(line) for line in (tmp_path / f"x.{ending}.errors.jsonl").read_text().splitlines()]
    assert [error["image"] for error in errors] == BAD
    assert all("cannot read the image images/" in error["error"] for error in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        out.name,
        f"{out.name}.errors.jsonl",
        f"{out.name}.job.jsonl",
    ]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_classes(network, rows, tmp_path, ending):
    out = tmp_path / f"x.{ending}"
    fzoo.run_job(*network, ["images"], out, top=2, preprocess="MobileNet", shard_size=8, batch_size=4)
    if ending == "jsonl":
        found = [
            (row["image"], p["wnid"], p["label"], p["probability"])
            for row in map(json.loads, out.read_text().splitlines())
            for p in row["predictions"]
        ]
    elif ending == "csv":
        found = list(csv.reader(out.read_text().splitlines()))[1:]
    else:
        found = [tuple(row.values()) for row in pyarrow.parquet.read_table(out).to_pylist()]
    probabilities = expected(rows, good(), "predictions")
    best = np.argsort(-probabilities, axis=1)[:, :2]
    assert [row[0] for row in found] == [name for name in good() for _ in range(2)]
    assert [(row[1], row[2]) for row in found] == [("-", str(i)) for i in best.ravel()]
    found = np.array([float(row[3]) for row in found])
    assert_rows(found, np.take_along_axis(probabilities, best, 1).ravel())


def tar(path, names, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name in names:
            archive.add(name)
        archive.addfile(tarfile.TarInfo("label.cls"), io.BytesIO())
    return path


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_an_archive_is_the_same_as_its_files(network, rows, tmp_path, ending):
    names = names_of("images")
    archive = tar(tmp_path / f"images.{ending}", names, "w:gz" if ending == "tar.gz" else "w")
    report = fzoo.run_job(
        *network, [archive], tmp_path / "x.npz", layers=TAP, preprocess="MobileNet", shard_size=8, batch_size=4
    )
    assert report.failed == 2
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].tolist() == [f"{archive}/{name}" for name in good()]
        assert_rows(arrays[TAP], expected(rows, good()))
    errors = (tmp_path / "x.npz.errors.jsonl").read_text()
    assert f"cannot read the image {archive}/{BAD[0]}: not an image" in errors


def test_what_a_kill_may_leave(network, rows, tmp_path, monkeypatch):
    """Whatever is in the job's folder when a file gets its name or goes: the result is that of a job in one go."""
    work, left = tmp_path / "work", []
    work.mkdir()
    out, parts = work / "x.npz", work / "x.npz.parts"
    options = {"layers": TAP, "preprocess": "MobileNet", "shard_size": 8, "batch_size": 8}

    def spied(function):
        def call(path, *args, **keywords):
            if parts.name in str(path) or ".npz" in str(path):
                left.append(shutil.copytree(work, tmp_path / f"{len(left)}"))
            return function(path, *args, **keywords)

        return call

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink"):
            patch.setattr(os, name, spied(getattr(os, name)))
        fzoo.run_job(*network, ["images"], out, **options)
    with np.load(out) as arrays:
        whole = arrays[TAP]
    assert_rows(whole, expected(rows, good()))
    errors = (work / "x.npz.errors.jsonl").read_bytes()
    shards = [len(list((folder / parts.name).glob("0*.npz"))) for folder in left]
    assert {0, 1, 2, 3, 4} == set(shards) and sum(any(folder.rglob("*.tmp")) for folder in left) > 8
    assert sum((folder / out.name).exists() for folder in left) > 1  # the job is done, and its folder is not gone
    for folder, count in zip(left, shards, strict=True):
        shutil.rmtree(work)
        shutil.copytree(folder, work)
        begun = parts.exists()
        report = fzoo.run_job(*network, ["images"], out, **options)
        assert report.joined and report.failed == 2 and report.done == 30 - report.before
        assert report.before == (30 if (folder / out.name).exists() and begun else min(8 * count, 30))
        with np.load(out) as arrays:
            assert arrays["images"].tolist() == good()
            np.testing.assert_array_equal(arrays[TAP], whole)
        assert (work / "x.npz.errors.jsonl").read_bytes() == errors and not parts.exists()
        assert not list(work.glob("*.old-*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, 10])
def test_killed_job_goes_on(network, tmp_path, kills):
    """kill -9 at random moments: nothing is lost, nothing is twice, and the result is that of a job in one go."""
    names = good()
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in (names + BAD) * 4 * kills))
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    args = ("features", f"@{tmp_path}/list.txt", "--layer", TAP, "--shard-size", 20, "--batch-size", 4)
    at_once = subprocess.run(command(*args, "--out", tmp_path / "whole.npz"), env=env, capture_output=True, timeout=600)
    assert at_once.returncode == 1
    parts, rng, shards = tmp_path / "x.npz.parts", random.Random(0), []
    for _ in range(kills):
        process = subprocess.Popen(
            ["nice", "-n", "10", *command(*args, "--out", tmp_path / "x.npz")],  # so that the kill comes in time
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        before, moment = len(list(parts.glob("*.npz"))), rng.uniform(0, 0.05)
        while process.poll() is None and len(list(parts.glob("*.npz"))) < before + rng.randint(1, 4):
            time.sleep(0.002)
        time.sleep(moment)
        assert process.poll() is None, "it ended before it could be killed: more images are needed"
        process.kill()
        process.wait()
        shards.append(len(list(parts.glob("*.npz"))))
        assert not (tmp_path / "x.npz").exists()
    assert shards == sorted(shards) and len(set(shards)) == kills and shards[-1] < 6 * kills
    done = subprocess.run(command(*args, "--out", tmp_path / "x.npz"), env=env, capture_output=True, timeout=600)
    assert done.returncode == 1 and f"of {120 * kills:,} images" in done.stdout.decode()
    assert done.stderr.decode().splitlines()[-1].startswith(f"fzoo: {8 * kills} of {120 * kills} images skipped")
    with np.load(tmp_path / "whole.npz") as whole, np.load(tmp_path / "x.npz") as resumed:
        assert whole["images"].tolist() == resumed["images"].tolist() == names * 4 * kills
        np.testing.assert_array_equal(whole[TAP], resumed[TAP])
    errors = [(tmp_path / f"{name}.npz.errors.jsonl").read_bytes() for name in ("whole", "x")]
    assert errors[0] == errors[1] and errors[0].count(b"\n") == 8 * kills
    assert not parts.exists()


def test_another_job_on_the_same_output(network, tmp_path, command_line):
    """Shards are kept for the same job, and from another one, or from another process."""
    out, parts = tmp_path / "x.jsonl", tmp_path / "x.jsonl.parts"
    args = ("classify", "images", "--out", out, "--batch-size", "8", *OPTIONS, "-w", "weights.h5")

    def interrupt(report, failures):
        if any(parts.glob("*.npz")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fzoo.run_job(
            *network, ["images"], out, preprocess="MobileNet", shard_size=8, batch_size=8, workers=1, watch=interrupt
        )
    kept = sorted(parts.glob("*.npz"))
    assert kept and not out.exists()
    with (parts / "lock-0").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, output, errors = command_line(*args)
    assert (code, output) == (2, []) and f"another process is at work on {out}" in errors[-1]
    code, output, errors = command_line(*args, "--top", "1")
    assert (code, output) == (2, []) and "another job (other: top): --restart" in errors[-1]
    assert sorted(parts.glob("*.npz")) == kept and not out.exists()
    code, output, errors = command_line(*args)
    assert code == 1 and f"{30 - 8 * len(kept)} of 30 images" in output[0] and not parts.exists()
    assert [json.loads(line)["image"] for line in out.read_text().splitlines()] == good()


@pytest.mark.slow
def test_interrupted_and_another_job(tmp_path):
    """Ctrl-C is one line; the shards are kept for the same job, and from another one."""
    out, env = tmp_path / "x.jsonl", {**os.environ, "JAX_PLATFORMS": "cpu"}
    (tmp_path / "list.txt").write_text("images\n" * 2000)  # a minute's work and more, on whatever machine
    args = ("classify", f"@{tmp_path}/list.txt", "--out", out, "--shard-size", "10", "--batch-size", "2")
    process = subprocess.Popen(command(*args), env=env, stderr=subprocess.PIPE, text=True)
    parts = tmp_path / "x.jsonl.parts"
    while not list(parts.glob("*.npz")):
        assert process.poll() is None
        time.sleep(0.01)
    second = run(*args)
    assert second.returncode == 2 and f"another process is at work on {out}" in second.stderr
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130 and errors.splitlines()[-1] == "fzoo: interrupted"
    kept = len(list(parts.glob("*.npz")))
    assert kept and not out.exists()

    other = run(*args, "--top", "1")
    assert other.returncode == 2 and "another job (other: top): --restart" in other.stderr
    assert len(list(parts.glob("*.npz"))) == kept
    fewer = run("classify", "images", "--out", out, "--restart")
    assert fewer.returncode == 1 and len(out.read_text().splitlines()) == 28 and not parts.exists()


def test_a_disk_that_fills_up(network, rows, tmp_path):
    """A small tmpfs: one line, what is whole is kept, and the job goes on when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a tmpfs can't be mounted here")
    options = {"layers": TAP, "preprocess": "MobileNet", "shard_size": 6, "batch_size": 6}
    try:
        ballast = disk / "ballast"
        for room, ending in ((120_000, "npz"), (400_000, "npz"), (400_000, "h5"), (400_000, "parquet")):
            out = disk / f"x.{ending}"
            ballast.write_bytes(bytes((1 << 20) - room))
            with pytest.raises(OSError, match=rf"x\.{ending} can't be written: No space left on device; .* is kept"):
                fzoo.run_job(*network, ["images"], out, **options)
            kept = sorted(path.name for path in (disk / f"x.{ending}.parts").glob("*"))
            shards = len([name for name in kept if name.endswith(".npz")])
            assert 0 < shards < 5 if room == 120_000 else shards == 5
            assert not any("tmp" in name or "joined" in name for name in kept) and not out.exists()
            ballast.unlink()
            report = fzoo.run_job(*network, ["images"], out, **options)
            assert report.before == 6 * shards and report.joined
            if ending == "npz":
                with np.load(out) as arrays:
                    assert_rows(arrays[TAP], expected(rows, good()))
            out.unlink()
    finally:
        subprocess.run(["umount", "-l", disk], check=True)  # what the errors' tracebacks hold may be open yet


@pytest.mark.slow
def test_two_devices_equal_one(network):
    """`predict` and `features` themselves, where no device has a whole part of the last batch."""
    pixels = networks.random_images((21, 32, 32, 3), pixels=True).astype(np.uint8)
    theirs = np.asarray(computed(network, pixels)["predictions"])
    module, variables = network
    for mesh in (devices.mesh(), devices.mesh(jax.devices()[1:])):
        options = {"preprocess": "MobileNet", "batch_size": 5, "mesh": mesh}
        for v in (variables, devices.replicate(variables, mesh)):
            assert_rows(fzoo.predict(module, v, pixels, **options), theirs)
        taps = fzoo.features(module, variables, pixels, ["predictions"], **options)["predictions"]
        assert_rows(taps, theirs)
        assert_rows(fzoo.predict(module, variables, pixels[:1], **options), theirs[:1])
    whole = fzoo.predict(module, variables, pixels[:6], preprocess="MobileNet", batch_size=6, mesh=devices.mesh())
    assert [s.data.shape for s in whole.addressable_shards] == [(3, 5)] * 2


@pytest.mark.slow
def test_eight_devices_equal_one(rows, tmp_path):
    """Also `predict` and `features` themselves, for any count and batch size."""
    args = ("features", "images", "--layer", TAP, "--layer", "predictions", "--batch-size", "12", "--shard-size", "9")
    assert run(*args, "--out", tmp_path / "x.npz", **EIGHT).returncode == 1
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].tolist() == good()
        for layer in (TAP, "predictions"):
            assert_rows(arrays[layer], expected(rows, good(), layer))
    script = f"""
import numpy as np, jax, fzoo
from fzoo import devices
module, variables = fzoo.load("MobileNet", weights="weights.h5", **{SMALL})
images = np.random.default_rng(2).integers(0, 256, (21, 32, 32, 3), np.uint8)
expected = fzoo.predict(module, variables, images, preprocess="MobileNet")
for mesh in (devices.mesh(), devices.mesh(3), devices.mesh(jax.devices()[5:6])):
    for count, batch_size in ((21, None), (21, 5), (1, None), (16, 16)):
        options = {{"preprocess": "MobileNet", "batch_size": batch_size, "mesh": mesh}}
        for v in (variables, devices.replicate(variables, mesh)):
            found = fzoo.predict(module, v, images[:count], **options)
            np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-6)
        taps = fzoo.features(module, variables, images[:count], ["predictions"], **options)["predictions"]
        np.testing.assert_allclose(taps, expected[:count], rtol=1e-4, atol=1e-6)
whole = fzoo.predict(module, variables, images[:16], preprocess="MobileNet", batch_size=16, mesh=devices.mesh())
assert [s.data.shape for s in whole.addressable_shards] == [(2, 5)] * 8
"""
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **EIGHT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_share_a_job(rows, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, env = tmp_path / "x.npz", {**os.environ, "JAX_PLATFORMS": "cpu"}
    args = ("features", "images", "--layer", TAP, "--out", out, "--shard-size", "4", "--batch-size", "4")
    processes = [
        subprocess.Popen(
            command(*args, "--distributed", f"127.0.0.1:{port},{i},2"),
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=600) for process in processes]
    assert {process.returncode for process in processes} <= {0, 1}, said
    assert sorted(TAP in output for output, _ in said) == [False, True], said  # one of them has put it together
    assert sum("share of" in errors for _, errors in said) == 1
    with np.load(out) as arrays:
        assert arrays["images"].tolist() == good()
        assert_rows(arrays[TAP], expected(rows, good()))
    assert not (tmp_path / "x.npz.parts").exists()


def test_each_process_has_its_share(network, tmp_path):
    """Shards are dealt out; who is done last joins them, and a process alone takes what another left."""
    options = {"layers": TAP, "preprocess": "MobileNet", "shard_size": 8, "batch_size": 8}
    first = fzoo.run_job(*network, ["images"], tmp_path / "x.npz", process=(1, 2), **options)
    assert (first.joined, first.done) == (False, 14)
    second = fzoo.run_job(*network, ["images"], tmp_path / "x.npz", **options)
    assert (second.joined, second.done, second.before, second.failed) == (True, 16, 14, 2)
    late = fzoo.run_job(*network, ["images"], tmp_path / "x.npz", process=(4, 5), **options)  # of four shards
    assert (late.joined, late.done) == (False, 0)
    assert not (tmp_path / "x.npz.parts").exists()


def test_rows_come_while_the_job_runs(network, rows, monkeypatch):
    go_on = threading.Event()

    load = Recipe.load

    def wait_and_load(recipe, path):
        assert path != BAD[0] or go_on.wait(60)
        return load(recipe, path)

    monkeypatch.setattr(Recipe, "load", wait_and_load)
    given = ["images/b", *["images/a/*.bmp"] * 4, BAD[0]]
    found = jobs.classify(*network, given, preprocess="MobileNet", batch_size=4, workers=1, top=1)
    name, ((_, label, probability),) = next(found)
    best = rows["predictions"][name]
    assert (name, label, probability) == ("images/b/01.png", str(best.argmax()), pytest.approx(best.max(), rel=1e-4))
    go_on.set()
    assert [name, *(name for name, _ in found)] == [name for name in names_of(*given) if name not in BAD]


def test_the_json_array_is_whole(tmp_path, command_line):
    (tmp_path / "list.txt").write_text("images\n" * 20)
    args = ("classify", f"@{tmp_path}/list.txt", "--json", "--batch-size", "8")
    code, output, errors = command_line(*args, *OPTIONS, "-w", "weights.h5")
    assert code == 1
    assert [row["image"] for row in json.loads("\n".join(output))] == good() * 20
    assert sum("skipped: " in line for line in errors) == 10 and errors[-1] == "fzoo: 40 of 600 images skipped"


@pytest.mark.slow
def test_stdout_streams(tmp_path):
    """Rows come while the job runs; the JSON array is whole at the end."""
    (tmp_path / "list.txt").write_text("images\n" * 20)
    done = run("classify", f"@{tmp_path}/list.txt", "--json", "--batch-size", "8")
    assert done.returncode == 1
    assert [row["image"] for row in json.loads(done.stdout)] == good() * 20
    assert done.stderr.count("skipped: ") == 10 and done.stderr.splitlines()[-1] == "fzoo: 40 of 600 images skipped"

    (tmp_path / "long.txt").write_text("images/b\n" * 300)  # more lines than a pipe holds: the process waits for us
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    args = ("classify", f"@{tmp_path}/long.txt", "--batch-size", "16", "--workers", "1", "--top", "1")
    quiet = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command(*args), **quiet) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("images/b/01.png\t")
        assert process.poll() is None
        rest = process.stdout.read().splitlines()
    assert process.returncode == 1 and len(rest) == 300 * 14 - 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "images", "--out", "x.npz"], "ends in .jsonl, .csv, .parquet expected, for classes"),
        (["features", "images", "--layer", "conv1", "--out", "x.csv"], ".npz, .h5, .parquet expected, for the outputs"),
        (["classify", "images", "--restart"], "--out FILE expected"),
        (["classify", "images", "--json", "--out", "x.jsonl"], "--json is for printing"),
        (["classify", "images", "--out", "x.jsonl", "--devices", "50"], "50 devices asked for, 1 to 2 expected"),
        (["classify", "images", "--out", "x.jsonl", "--distributed", "here"], "auto or HOST:PORT,PROCESS,COUNT"),
        (["classify", "images", "--crop", "2"], "value for '--crop'"),
        (["classify", "images", "--interpolation", "nearst"], "did you mean nearest"),
        (["classify", "images", "--background", "whit"], "a colour such as 'white'"),
        (["classify", *BAD, "--out", "x.jsonl"], "none of the 2 images could be read: see x.jsonl.errors.jsonl"),
        (["classify", BAD[0], "--out", "x.jsonl"], f"cannot read the image {BAD[0]}"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(command_line, arguments, message):
    code, output, errors = command_line(*arguments, *OPTIONS, "-w", "weights.h5")
    assert (code, output) == (2, [])
    assert errors[-1].startswith("fzoo: error: ") and message in "\n".join(errors)
    assert not [path for path in os.listdir() if path.startswith("x.") and "errors" not in path]


def test_a_crop(network, tmp_path):
    options = {"layers": TAP, "recipe": Recipe((32, 32), "lanczos", 0.7), "preprocess": "MobileNet"}
    report = fzoo.run_job(*network, ["images/b"], tmp_path / "x.npz", **options)
    names = [name for name in names_of("images/b") if name not in BAD]
    pixels = np.stack([fzoo.load_image(name, 32, "lanczos", crop=0.7) for name in names])
    assert report.failed == 1
    with np.load(tmp_path / "x.npz") as arrays:
        assert_rows(arrays[TAP], np.asarray(computed(network, pixels)[TAP]))


def test_memory_is_bounded_by_what_is_ahead(network):
    """Not by the number of images: only so many are opened before results are taken."""
    seen = []

    def endless():
        while True:
            seen.append(Entry(ImageFile("images/a/00.bmp", "images/a/00.bmp")))
            yield seen[-1]

    wanted = jobs.Network(*network, None, 1, "MobileNet", devices.mesh())
    reading = jobs.prepare(wanted, ["images"], batch_size=4, workers=2)
    found = jobs.stream(wanted, reading, jobs.cut(endless(), 8, 4), jobs.Report())
    for taken in range(1, 6):
        assert len(next(found).names) == 4
        assert len(seen) <= 4 * taken + 8 * 4
    found.close()


def test_the_report_says_which_was_slower(network, monkeypatch):
    wanted = jobs.Network(*network, None, 1, "MobileNet", devices.mesh())
    reading = jobs.prepare(wanted, ["images"], batch_size=4, workers=1)

    def report_of(reading, slow):
        report = jobs.Report(images=30)
        list(jobs.stream(slow, reading, jobs.cut(reading.images, 30, 4), report))
        return report

    class SlowNetwork(jobs.Network):
        def __call__(self, pixels):
            time.sleep(0.1)
            return super().__call__(pixels)

    slow_network = SlowNetwork(*network, None, 1, "MobileNet", devices.mesh())
    assert report_of(reading, slow_network).bottleneck == "computing"

    class Slow(jobs.Loader):
        def __call__(self, source, pixels):
            time.sleep(0.03)
            return super().__call__(source, pixels) + 0.03

    report = report_of(reading._replace(load=Slow(*reading.load)), wanted)
    assert report.bottleneck == "decoding" and report.decoding < report.computing
    assert "the bottleneck was decoding (decoding " in str(report) and report.done == 30


def test_a_fingerprint(network):
    """It is the network's and its weights'; sets, of which an optimised network has some, are in order."""
    module, variables = fzoo.optimize_for_inference(*network)
    assert "frozenset" in repr(module.prepared) and "frozenset" not in repr(describe_value(module))
    other = networks.network("MobileNet", seed=1, **SMALL)
    found = [fingerprint(*each) for each in ((module, variables), network, other, (module, network[1]))]
    assert len(set(found)) == 4 and fingerprint(*network) == found[1]


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_each_process(network):
    module, variables = fzoo.optimize_for_inference(*network)
    script = f"""
import fzoo
from fzoo.jobs.network import fingerprint
network = fzoo.load("MobileNet", weights="weights.h5", **{SMALL})
print(fingerprint(*fzoo.optimize_for_inference(*network)))
"""
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint(module, variables) != fingerprint(*network)


def test_names_that_are_no_text(network, tmp_path):
    """File names are bytes; they come out as they are, or escaped where a format has only Unicode."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bmp")
    shutil.copy("images/a/00.bmp", name)
    for ending, found in {
        "csv": lambda path: next(iter(path.read_bytes().splitlines()[1:])).split(b",")[0],
        "jsonl": lambda path: os.fsencode(json.loads(path.read_text())["image"]),
        "parquet": lambda path: pyarrow.parquet.read_table(path)["image"][0].as_py().replace("\\xe9", "\udce9"),
    }.items():
        fzoo.run_job(*network, [name], tmp_path / f"x.{ending}", top=1, preprocess="MobileNet")
        assert os.fsencode(found(tmp_path / f"x.{ending}")) == os.fsencode(name)
    for ending in ("npz", "h5", "parquet"):
        fzoo.run_job(*network, [name], tmp_path / f"x.{ending}", layers=TAP, preprocess="MobileNet")
    with np.load(tmp_path / "x.npz") as arrays:
        assert arrays["images"].tolist() == [name]
    with h5py.File(tmp_path / "x.h5") as file:
        assert file["images"][0] == os.fsencode(name)


def test_a_folder_that_is_not_a_jobs(network, tmp_path):
    out = tmp_path / "x.csv"
    parts = tmp_path / "x.csv.parts"
    for text in (None, "{", "[]", "{}"):
        parts.mkdir(exist_ok=True)
        (parts / "00000000.npz").write_bytes(b"")
        if text is not None:
            (parts / "job.json").write_text(text)
        with pytest.raises(ValueError, match="another job"):
            fzoo.run_job(*network, ["images"], out, preprocess="MobileNet")
        assert (parts / "00000000.npz").exists()
    assert fzoo.run_job(*network, ["images"], out, preprocess="MobileNet", restart=True).done == 30
    assert not parts.exists()


def test_bad_arguments(network, tmp_path):
    for options, message in (
        ({"top": 0}, "top=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"workers": 0}, "workers=0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"labels": [("-", "one")]}, "1 labels given, 5 expected"),
        ({"layers": "conv1", "out": "x.npz", "recipe": Recipe((31, 31))}, "32, 32, 3 expected"),
        ({"layers": "conf1", "out": "x.npz"}, "did you mean conv1"),
        ({"restart": True, "process": (0, 2)}, "restart given with several processes"),
        ({"preprocess": "VGG16"}, "MobileNet takes 'tf'"),
    ):
        options = {"preprocess": "MobileNet", **options}
        with pytest.raises(ValueError, match=message):
            fzoo.run_job(*network, ["images"], tmp_path / options.pop("out", "x.csv"), **options)
        assert not list(tmp_path.iterdir())


def test_without_pyarrow(network, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fzoo\[parquet\]'"):
        fzoo.run_job(*network, ["images"], tmp_path / "x.parquet", preprocess="MobileNet")


@pytest.mark.wrong_types
def test_a_lock_is_let_go(tmp_path):
    """A job that failed in this process can be called again in it."""
    for _ in range(2):
        with pytest.raises(OSError, match="can't be written") as error:
            held = shards.Shards(tmp_path / "x.npz", {}, Listing.write([]), 1)
            try:
                held.write(0, shards.Shard(["a"], {"x": Broken()}, [], [(0, 0)], [True]))
            finally:
                held.close()
        assert isinstance(error.value.__cause__, OSError) and error.value.__cause__.errno == errno.EIO


class Broken:
    def __array__(self, *args, **kwargs):
        raise OSError(errno.EIO, "broken")
