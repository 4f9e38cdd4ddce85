"""The command line: most of it in this process, and what is about processes in some of their own."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
from networks import assert_alive, differences, random_variables
from PIL import Image
from reference import assert_close, assert_equal, keras_model, outputs, random_images, save_weights_only
from test_download import Server
from tiers import slow

import fzoo

OPTIONS = ["--keras-pixels", "-m", "MobileNet", "-o", "alpha=0.25", "--size", "32", "--classes", "4"]


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
    pixels = random_images((3, 40, 50, 3), pixels=True).astype(np.uint8)
    for name, image in zip(("a.png", "b.jpg", "c.bmp"), pixels, strict=True):
        Image.fromarray(image).save(folder / name)
    data = (folder / "b.jpg").read_bytes()
    (folder / "corrupt.jpg").write_bytes(data[: len(data) // 2])
    (folder / "truncated.h5").write_bytes((folder / "weights.h5").read_bytes()[:5000])
    (folder / "text.h5").write_text("not weights")
    (folder / "labels.txt").write_text("ant\nbee\ncat\ndog\n")
    (folder / "empty").mkdir()
    return folder


def test_list_and_info(command_line):
    code, output, errors = command_line("list", "VGG1[69]")
    assert (code, errors) == (0, [])
    rows = [line.split("\t") for line in output]
    assert [row[:3] for row in rows] == [["VGG16", "224", "138,357,544"], ["VGG19", "224", "143,667,240"]]
    code, output, _ = command_line("info", "ResNet50")
    assert code == 0 and "preprocessing\tcaffe" in output and "2cb95161c43110f7111970584f804107" in "".join(output)


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


def test_a_table_where_output_is_a_terminal(monkeypatch, command_line):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    code, output, _ = command_line("list")
    text = "\n".join(output)
    assert code == 0 and "top-1 %" in text and "NASNetLarge" in text and "\t" not in text


@pytest.mark.slow
def test_tables_on_a_terminal(folder):
    text = on_a_terminal("list", "NASNet*")
    assert "top-1 %" in text and "NASNetLarge" in text and "\t" not in text
    (folder / "cat[final].png").write_bytes((folder / "a.png").read_bytes())  # which is no markup
    text = on_a_terminal("classify", "cat[final].png", *OPTIONS, "-w", "weights.h5", cwd=folder)
    assert "cat[final].png" in text


def test_summary(command_line):
    code, output, errors = command_line("summary", "VGG16")
    assert (code, errors) == (0, [])
    rows = [line.split("\t") for line in output]
    assert rows[1] == ["block1_conv1", "Conv2D", "224 x 224 x 64", "1,792", "173,408,256", "input_layer"]
    assert rows[-1] == ["VGG16 at 224 x 224: 23 layers, 138,357,544 parameters, 30.941 GFLOPs an image"]


def keras_predictions(folder, names):
    """What Keras makes of the file: (images, classes)."""
    keras.utils.clear_session()
    model = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=4)
    model.load_weights(folder / "weights.h5")
    pixels = np.stack([keras.utils.load_img(folder / name, target_size=(32, 32)) for name in names])
    images = keras.applications.mobilenet.preprocess_input(pixels.astype(np.float32))
    return outputs(model, images, [model.layers[-1].name])[model.layers[-1].name]


def assert_classes(found, expected):
    """The JSON of two classes for each image."""
    for each, p in zip(found, expected, strict=True):
        best = np.argsort(-p)[:2]
        assert [q["label"] for q in each["predictions"]] == [["ant", "bee", "cat", "dog"][i] for i in best]
        assert [q["probability"] for q in each["predictions"]] == pytest.approx(p[best].tolist(), abs=1e-4)


def test_classify(folder, command_line):
    names = ["a.png", "b.jpg", "c.bmp"]
    images = [folder / name for name in names]
    common = [*images, *OPTIONS, "-w", folder / "weights.h5", "--top", "2"]
    code, output, errors = command_line(
        "classify", *common, "--labels", folder / "labels.txt", "--json", "--batch-size", "2"
    )
    assert (code, errors) == (0, [])
    found = json.loads("\n".join(output))
    assert [each["image"] for each in found] == [str(path) for path in images]
    expected = keras_predictions(folder, names)
    assert_alive(expected)
    assert_classes(found, expected)

    code, output, errors = command_line("classify", *common, "--batch-size", "2")
    assert (code, errors, len(output)) == (0, [], 6)
    rows = [line.split("\t") for line in output]
    assert [row[0] for row in rows[::2]] == [str(path) for path in images]
    assert [row[2] for row in rows[::2]] == [str(p.argmax()) for p in expected]


@pytest.mark.slow
def test_classify_in_a_process(folder):
    images = [folder / "a.png", folder / "b.jpg", folder / "c.bmp"]
    common = [*images, *OPTIONS, "-w", folder / "weights.h5", "--top", "2"]
    done = run("classify", *common, "--labels", folder / "labels.txt", "--json", "--batch-size", "2")
    assert done.returncode == 0 and done.stderr == ""
    assert_classes(json.loads(done.stdout), keras_predictions(folder, [path.name for path in images]))
    plain = run("classify", *common).stdout.splitlines()
    assert len(plain) == 6
    assert plain[0].split("\t")[0] == str(images[0]) and plain[0].split("\t")[2] in "0123"


def test_features(folder, command_line):
    out = folder / "features.npz"
    images = [folder / name for name in ("a.png", "corrupt.jpg", "b.jpg")]
    layers = ["--layer", "conv_pw_3_relu", "--layer", "dropout"]
    code, output, errors = command_line(
        "features", *images, *OPTIONS, "-w", folder / "weights.h5", *layers, "--out", out
    )
    assert code == 1 and output[0] == "conv_pw_3_relu\tfloat32 (2, 8, 8, 32)"
    assert len(errors) == 2 and "corrupt.jpg" in errors[0] and "1 of 3 images skipped" in errors[1]
    with np.load(out) as arrays:
        assert arrays["images"].tolist() == [str(folder / "a.png"), str(folder / "b.jpg")]
        assert arrays["conv_pw_3_relu"].shape == (2, 8, 8, 32)
        module, variables = fzoo.load(
            "MobileNet", weights=folder / "weights.h5", alpha=0.25, input_shape=(32, 32, 3), classes=4
        )
        x = np.stack([fzoo.load_image(folder / name, 32) for name in ("a.png", "b.jpg")])
        x = fzoo.preprocess_input(x, "MobileNet")
        expected = np.asarray(fzoo.features(module, variables, x, ["dropout"])["dropout"])
        assert differences(expected)[0] > 0.01
        assert_close(arrays["dropout"], expected, "dropout")


@pytest.mark.slow
def test_convert(folder, tmp_path, command_line):
    out = tmp_path / "w.safetensors"
    assert command_line("convert", folder / "weights.h5", out) == (0, [str(out)], [])
    model = ["-m", "MobileNet", "-o", "alpha=0.25", "--classes", "4"]
    assert command_line("convert", out, tmp_path / "w.h5", *model) == (0, [str(tmp_path / "w.h5")], [])
    module = fzoo.create("MobileNet", alpha=0.25, classes=4)
    assert_equal(
        fzoo.load_keras_weights(module, tmp_path / "w.h5"), fzoo.load_keras_weights(module, folder / "weights.h5")
    )
    _, (*arrays, summary), _ = command_line("convert", "--dry-run", folder / "weights.h5")
    assert "conv1\tconv1/conv1/kernel\t3 x 3 x 3 x 8\tfloat32\tparams/conv1/kernel" in arrays
    assert f"legacy h5, {len(arrays)} arrays" in summary
    assert 'fits fzoo.create("MobileNet", alpha=0.25, classes=4)' in summary


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "weights.h5"], "the name of a file to write expected"),
        (["convert", "missing.h5", "x.npz"], "x.npz: a name that ends in"),  # before anything is read
        (["convert", "missing.h5", "no/x.npz.h5"], "no such directory"),
        (["convert", "missing.h5", "x.npz.h5"], "no such weights file: missing.h5"),
        (["convert", "text.h5", "--dry-run"], "neither an HDF5 file"),
        (["convert", ".", "--dry-run"], "is a directory"),
        (["convert", "weights.h5", "x.npz.h5", "--classes", "3"], "--model NAME expected"),
        (["convert", "weights.h5", "x.npz.h5", "-m", "VGG16"], "does not fit this VGG"),
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
        (["classify", "empty", *OPTIONS, "-w", "weights.h5"], "empty is a directory of no images"),
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
def test_bad_input_is_one_line_and_exit_code_2(folder, offline, arguments, message, monkeypatch, command_line):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    code, output, errors = command_line(*arguments)
    assert (code, output) == (2, []), errors
    assert errors[-1].startswith("fzoo: error: ") and message in errors[-1]
    assert all(line.startswith("fzoo: ") for line in errors)
    assert not list(folder.glob("*x.npz*")) and not list(folder.glob(".x.npz*"))


@pytest.mark.slow
def test_interrupted_in_a_callback():
    """JAX has Python call it at each garbage collection, and what is raised there is ignored."""
    code = """
import gc, signal, time
from fzoo.cli.console import command
from fzoo.cli.main import main

def callback(phase, info):
    gc.callbacks.remove(callback)
    signal.raise_signal(signal.SIGINT)

@command
def wait():
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(2)

main()
"""
    done = subprocess.run([sys.executable, "-c", code, "wait"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "fzoo: interrupted\n")


def test_help_lists_the_commands_in_their_order(command_line):
    code, output, errors = command_line("--help")
    assert (code, errors) == (0, [])
    listed = [line.split()[0] for line in output[output.index("Commands:") + 1 :] if line.strip()]
    assert listed[0] == "list" and listed[-1] == "demo" and len(listed) == 14


@pytest.mark.slow
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


@pytest.mark.parametrize("command", [slow("summary NASNetMobile | head -1"), "list | true"])
def test_a_closed_pipe_is_quiet(command):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = f"set -o pipefail; {sys.executable} -m fzoo.cli {command}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=env)
    assert done.stderr == "" and done.returncode in (0, 141)


@pytest.mark.slow
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fzoo.cli", "list"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "fzoo: error: [Errno 28] No space left on device\n"


def test_a_missing_extra_names_the_command(tmp_path, monkeypatch, command_line):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, errors = command_line("demo", "--out", tmp_path / "out")
    assert code == 2
    assert errors == ["fzoo: error: the digits come with scikit-learn: pip install 'fzoo[demo]'"]


MOBILENET = ["mobilenet_2_5_224_tf.h5", "mobilenet_2_5_224_tf_no_top.h5"]


@pytest.fixture(scope="module")
def mobilenets(tmp_path_factory):
    """Files for which no hash is published, with the top and without."""
    folder = tmp_path_factory.mktemp("published")
    for name in MOBILENET:
        module = fzoo.create("MobileNet", alpha=0.25, include_top="no_top" not in name)
        fzoo.save_keras_weights(module, random_variables(module, statistics={}), folder / name)
    return folder


@pytest.fixture
def mirror(monkeypatch, tmp_path, mobilenets):
    """A folder to download from."""
    folder = shutil.copytree(mobilenets, tmp_path / "mirror")
    monkeypatch.setenv("FZOO_WEIGHTS_URL", folder.as_uri())
    return folder


def test_download(offline, mirror, monkeypatch, command_line):
    (mirror / "imagenet_class_index.json").write_text("{}")
    monkeypatch.setattr("fzoo.images.labels.CLASS_INDEX_HASH", "md5:99914b932bd37a50b983c5e7c90ae93b")
    arguments = ("download", "mobilenet", "-o", "alpha=0.25")
    names = [*MOBILENET, "imagenet_class_index.json"]
    for state in ("downloaded", "cached"):
        checked = dict.fromkeys(MOBILENET, "no hash is published; its structure was checked")
        rows = [
            f"{offline / name}\t{(mirror / name).stat().st_size}\t{state}\t{checked.get(name, 'hash is right')}"
            for name in names
        ]
        assert command_line(*arguments) == (0, rows, [])
    assert sorted(path.name for path in offline.iterdir()) == sorted(names)
    # Without the top no names of classes are asked for.
    assert command_line(*arguments, "--no-include-top") == (0, rows[1:2], [])
    assert command_line(*arguments, "--include-top") == (0, rows[::2], [])
    # Another size is another file, which this mirror has not.
    code, output, errors = command_line(*arguments, "--size", "128", "--no-include-top")
    assert (code, output) == (2, []) and "mobilenet_2_5_128_tf_no_top.h5 (no such file)" in errors[0]


def test_download_goes_on_after_a_failure(offline, mirror, command_line):
    (mirror / MOBILENET[0]).unlink()
    code, output, (*errors, last) = command_line("download", "MobileNet", "-o", "alpha=0.25")
    assert code == 1
    assert [line.split("\t")[0] for line in output] == [str(offline / MOBILENET[1])]
    for error, name in zip(errors, (MOBILENET[0], "imagenet_class_index.json"), strict=True):
        assert error.startswith("fzoo: could not download file://") and str(offline / name) in error
    assert last == "fzoo: 2 of 3 files could not be had"


def test_download_all(offline, mirror, command_line):
    for path in mirror.iterdir():
        path.unlink()
    code, output, errors = command_line("download", "--all")
    published = [fzoo.spec(name) for name in fzoo.list_models() if fzoo.spec(name).weight_files]
    files = {
        next(file.name for file in record.weight_files if file.is_state_dict or file.include_top == top)
        for record in published
        for top in (True, False)
    }
    count = len(files) + 1
    assert (code, output, len(errors)) == (2, [], count + 2)
    assert re.fullmatch(rf"fzoo: {count} files, about \d+,\d{{3}} MB, in .*", errors[0])
    assert errors[-1] == f"fzoo: {count} of {count} files could not be had"
    code, output, errors = command_line("download", "vgg1?", "VGG16", "--no-include-top")
    assert [line.split("mirror/")[1].split(" ")[0] for line in errors[:-1]] == [
        f"{name}_weights_tf_dim_ordering_tf_kernels_notop.h5" for name in ("vgg16", "vgg19")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "names of models or --all expected"),
        (["--all", "VGG16"], "names of models or --all expected"),
        (["VGG16", "VGG61"], "unknown model 'VGG61': did you mean VGG19"),
        (["Nothing*"], "unknown model 'Nothing*'"),
        (["MobileNet", "-o", "alpha=0.3"], "no ImageNet weights of MobileNet for alpha=0.3"),
        (["VGG16", "-o", "alpha=0.5"], "unknown option of VGG16 'alpha'"),
        (["VGG16", "--size", "96"], "are for 224 x 224, 96 x 96 given"),
        (["VGG16", "--size", "x"], "Invalid value for '--size'"),
    ],
)
def test_download_of_what_is_not_there(offline, mirror, command_line, arguments, message):
    code, output, (error,) = command_line("download", *arguments)
    assert (code, output) == (2, []) and error.startswith("fzoo: error: ") and message in error
    assert list(offline.iterdir()) == []


def test_download_from_a_bad_mirror(offline, monkeypatch, command_line):
    monkeypatch.setenv("FZOO_WEIGHTS_URL", "ftp://example.org")
    code, output, (error,) = command_line("download", "VGG16")
    assert (code, output) == (2, []) and "FZOO_WEIGHTS_URL='ftp://example.org' given" in error


@pytest.mark.slow
@pytest.mark.parametrize("model", ["MobileNet", "VGG16"])
def test_download_interrupted(offline, model):
    """Ctrl-C: what came is kept only where a hash will tell whether the rest belongs to it."""
    name = next(file.name for file in fzoo.spec(model).weight_files if not file.include_top)
    with Server() as server:
        server.script[name] = ["stall"]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        process = subprocess.Popen(
            [sys.executable, "-m", "fzoo.cli", "download", model, "--no-include-top"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "NO_PROXY": "127.0.0.1",
                "FZOO_WEIGHTS_URL": f"http://127.0.0.1:{server.server_port}",
            },
        )
        part = offline / f".{name}.part"
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        server.ended.set()
        server.shutdown()
        thread.join()
    assert (process.returncode, output, errors) == (130, "", "fzoo: interrupted\n")
    assert list(offline.iterdir()) == ([part] if model == "VGG16" else [])
