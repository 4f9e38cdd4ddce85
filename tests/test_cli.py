"""The command line, as processes."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from PIL import Image
from reference import keras_model, save_weights_only

import fzoo

OPTIONS = ["-m", "MobileNet", "-o", "alpha=0.25", "--size", "32", "--classes", "4"]


def run(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "fzoo.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **env},
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Keras file, and photographs that can be read and that can't."""
    folder = tmp_path_factory.mktemp("cli")
    model = keras_model("MobileNet", alpha=0.25, input_shape=(32, 32, 3), classes=4)
    save_weights_only(model, folder / "weights.h5")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.bmp"):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / name)
    data = (folder / "b.jpg").read_bytes()
    (folder / "corrupt.jpg").write_bytes(data[: len(data) // 2])
    (folder / "truncated.h5").write_bytes((folder / "weights.h5").read_bytes()[:5000])
    (folder / "text.h5").write_text("not weights")
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    return folder


def test_list_and_info():
    done = run("list", "VGG*")
    assert done.returncode == 0
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[:3] for row in rows] == [["VGG16", "224", "138,357,544"], ["VGG19", "224", "143,667,240"]]
    done = run("info", "ResNet50")
    assert "caffe" in done.stdout and "2cb95161c43110f7111970584f804107" in done.stdout


def on_a_terminal(*args, cwd=None):
    primary, secondary = pty.openpty()
    env = {**os.environ, "COLUMNS": "120"}
    command = [sys.executable, "-m", "fzoo.cli", *map(str, args)]
    process = subprocess.Popen(command, stdout=secondary, env=env, cwd=cwd)
    assert process.wait(timeout=120) == 0
    os.close(secondary)
    text = os.read(primary, 1 << 16).decode()
    os.close(primary)
    return text


def test_tables_on_a_terminal(folder):
    text = on_a_terminal("list")
    assert "top-1 %" in text and "NASNetLarge" in text and "\t" not in text
    (folder / "cat[final].png").write_bytes((folder / "a.png").read_bytes())  # which is no markup
    text = on_a_terminal("classify", "cat[final].png", *OPTIONS, "-w", "weights.h5", cwd=folder)
    assert "cat[final].png" in text


def test_summary():
    done = run("summary", "VGG16")
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[1] == ["block1_conv1", "Conv2D", "224 x 224 x 64", "1,792", "173,408,256", "input_layer"]
    assert rows[-1] == ["VGG16 at 224 x 224: 23 layers, 138,357,544 parameters, 30.941 GFLOPs an image"]


def test_classify(folder):
    images = [folder / "a.png", folder / "b.jpg", folder / "c.bmp"]
    common = [*images, *OPTIONS, "-w", folder / "weights.h5", "--top", "2"]
    done = run("classify", *common, "--labels", folder / "labels.txt", "--json", "--batch-size", "2")
    assert done.returncode == 0 and done.stderr == ""
    found = json.loads(done.stdout)
    assert [each["image"] for each in found] == [str(path) for path in images]

    keras.utils.clear_session()
    model = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=4)
    model.load_weights(folder / "weights.h5")
    for each in found:
        pixels = np.asarray(keras.utils.load_img(each["image"], target_size=(32, 32)), np.float32)
        expected = np.asarray(model(keras.applications.mobilenet.preprocess_input(pixels)[None]))[0]
        best = np.argsort(-expected)[:2]
        assert [p["label"] for p in each["predictions"]] == [["ant", "bee", "cat", "dog"][i] for i in best]
        assert [p["probability"] for p in each["predictions"]] == pytest.approx(expected[best].tolist(), abs=1e-5)

    plain = run("classify", *common).stdout.splitlines()
    assert len(plain) == 6
    assert plain[0].split("\t")[0] == str(images[0]) and plain[0].split("\t")[2] in "0123"


def test_features(folder):
    out = folder / "features.npz"
    images = [folder / name for name in ("a.png", "corrupt.jpg", "b.jpg")]
    layers = ["--layer", "conv_pw_3_relu", "--layer", "dropout"]
    done = run("features", *images, *OPTIONS, "-w", folder / "weights.h5", *layers, "--out", out)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 2 and "corrupt.jpg" in done.stderr and "1 of 3 images skipped" in done.stderr
    with np.load(out) as arrays:
        assert arrays["images"].tolist() == [str(folder / "a.png"), str(folder / "b.jpg")]
        assert arrays["conv_pw_3_relu"].shape == (2, 8, 8, 32)
        module, variables = fzoo.load(
            "MobileNet", weights=folder / "weights.h5", alpha=0.25, input_shape=(32, 32, 3), classes=4
        )
        x = np.stack([fzoo.load_image(folder / name, 32) for name in ("a.png", "b.jpg")])
        x = fzoo.preprocess_input(x, "MobileNet")
        expected = fzoo.features(module, variables, x, ["dropout"], batch_size=32)["dropout"]
        np.testing.assert_allclose(arrays["dropout"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["classify", "a.png", "-m", "ResNet5"], "did you mean ResNet50"),
        (["info", "VGG61"], "did you mean VGG19"),
        (["list", "Nothing*"], "no model matches"),
        (["classify", "a.png", "-m", "VGG16", "--size", "31"], "32 x 32"),
        (["classify", "a.png", *OPTIONS, "-w", "truncated.h5"], "truncated.h5 is not a readable Keras weights file"),
        (["classify", "a.png", *OPTIONS, "-w", "text.h5"], "neither an HDF5 file"),
        (["classify", "a.png", "-m", "VGG16", "-w", "weights.h5"], "block1_conv1/kernel (3, 3, 3, 64) is missing"),
        (["classify", "a.png", *OPTIONS[:-1], "5", "-w", "weights.h5"], "4 classes, the model 5"),
        (["classify", "a.png", *OPTIONS, "-w", "missing.h5"], "no such weights file: missing.h5"),
        (["classify", "a.png", *OPTIONS, "-w", "."], "is a directory"),
        (["classify", "missing.png", *OPTIONS, "-w", "weights.h5"], "no such image: missing.png"),
        (["classify", ".", *OPTIONS, "-w", "weights.h5"], "is a directory"),
        (["classify", "corrupt.jpg", *OPTIONS, "-w", "weights.h5"], "cannot read the image corrupt.jpg"),
        (["classify", "corrupt.jpg", "text.h5", *OPTIONS, "-w", "weights.h5"], "none of the 2 images"),
        (["classify"], "no images given"),
        (["classify", "a.png", "--top", "0"], "Invalid value for '--top'"),
        (["classify", "a.png", "--nope"], "No such option: --nope"),
        (["info"], "Missing argument"),
        (["nosuch"], "No such command 'nosuch'"),
        (["summary", "VGG16", "--size", "0"], "input_shape=(0, 0, 3)"),
        (["summary", "VGG16", "-o", "classes=10"], "unknown option of VGG16 'classes'"),
        (["summary", "MobileNet", "-o", "alpha=0"], "alpha=0 given"),
        (["demo", "--seed", "-1"], "Invalid value for '--seed'"),
        (["demo", "--out", "a.png"], "File exists"),
        (["list", "--version", "x"], "No such option"),
        (["classify", "a.png", "-o", "alpha"], "NAME=VALUE"),
        (["classify", "a.png", *OPTIONS, "-w", "weights.h5", "--labels", "text.h5"], "1 names, 4 expected"),
        (["features", "a.png", *OPTIONS, "-w", "weights.h5"], "--layer NAME"),
        (
            ["features", "a.png", *OPTIONS, "-w", "weights.h5", "--layer", "conf1", "--out", "x.npz"],
            "did you mean conv1",
        ),
        (
            ["features", "a.png", *OPTIONS, "-w", "weights.h5", "--layer", "conv1", "--out", "no/x.npz"],
            "no such directory",
        ),
        (["classify", "a.png"], "could not download"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, offline, arguments, message, monkeypatch):
    monkeypatch.chdir(folder)
    done = run(*arguments, HTTPS_PROXY="http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("fzoo: error: ") and message in last
    assert all(line.startswith("fzoo: ") for line in done.stderr.splitlines())
    assert not list(folder.glob("*x.npz*")) and not list(folder.glob(".x.npz*"))


def test_interrupted(tmp_path):
    """Ctrl-C in the middle of training: one line, and nothing that looks whole."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fzoo.cli", "demo", "--out", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "fzoo: interrupted"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("command", ["summary NASNetMobile | head -1", "list | true"])
def test_a_closed_pipe_is_quiet(command):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = f"set -o pipefail; {sys.executable} -m fzoo.cli {command}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fzoo.cli", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "fzoo: error: [Errno 28] No space left on device\n"


def test_a_missing_extra_names_the_command(tmp_path):
    (tmp_path / "sklearn.py").write_text("raise ModuleNotFoundError('sklearn')")
    done = run("demo", "--out", tmp_path / "out", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.strip() == "fzoo: error: the digits come with scikit-learn: pip install 'fzoo[demo]'"
