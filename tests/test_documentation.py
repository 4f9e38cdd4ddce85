"""Every code block of the README and of docs/ is run, the table of models is the zoo's, and every public name is told.

`KERAS_BACKEND=jax python tests/test_documentation.py` writes the table. The install commands in the README's shell
blocks are run by `.ci/run`, which also builds the site.
"""

import functools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import keras
import numpy as np
import pyarrow.parquet
import pytest
from networks import random_images, random_variables
from PIL import Image
from reference import build
from tiers import slow

import fzoo
from fzoo.apps import demo

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
TWELVE_JOBS = DOCS / "guides" / "twelve-jobs.md"

#: What has code to run.
PAGES = [README, *sorted(page for page in DOCS.rglob("*.md") if "results" not in page.parts)]
INSTALL = r"python3 -m venv \.venv && \. \.venv/bin/activate && pip install -e '\.\[(\w+)\]' && "


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@functools.cache
def measured() -> dict[str, str]:
    """Images a second of each name, as measured by `benchmarks/zoo.py`."""
    script = ROOT / "benchmarks" / "zoo.py"
    rates = runpy.run_path(str(script))["read_rates"](script.parent / "results" / "zoo")
    return {name: f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}" for name, rate in rates.items()}


def model_table() -> str:
    columns = "model", "input", "parameters", "depth", "weights", "top-1", "top-5", "images/s", "preprocessing"
    rows = [f"| {' | '.join(columns)} |", "|-|-|-|-|-|-|-|-|-|"]
    for name in fzoo.list_models(tagged=False):
        s = fzoo.spec(name)
        top1, top5 = ("-" if accuracy is None else f"{accuracy:.1%}" for accuracy in (s.top1, s.top5))
        rows.append(
            f"| [{name}]({s.paper}) | {s.input_size} (at least {s.min_size}) | {s.parameters:,} | {s.depth} | "
            f"{s.size_mb} MB | {top1} | {top5} | {measured().get(name, '-')} | {s.preprocessing} |"
        )
    return "\n".join(rows)


def tag_table() -> str:
    """The weights that have tags, those of each model together, beside Keras's own of the model."""
    columns = "weights", "top-1", "top-5", "Keras's top-1", "images/s", "input", "crop", "preprocessing", "licence"
    rows = [f"| {' | '.join(columns)} |", "|-|-|-|-|-|-|-|-|-|"]
    for name in fzoo.list_models(tagged=True):
        s = fzoo.spec(name)
        keras = fzoo.spec(name.partition(".")[0]).top1
        crop, rate = "none" if s.crop is None else f"{s.crop:g}", measured().get(name, "-")
        rows.append(
            f"| `{name}` | {s.top1:.1%} | {s.top5:.1%} | {'-' if keras is None else f'{keras:.1%}'} | "
            f"{rate} | {s.input_size} | {crop}, {s.interpolation} | {s.preprocessing} | {s.licence} |"
        )
    return "\n".join(rows)


MODELS = re.compile(r"(<!-- models: .*? -->\n).*?(<!-- /models -->)", re.DOTALL)
TAGS = re.compile(r"(<!-- tags: .*? -->\n).*?(<!-- /tags -->)", re.DOTALL)


def test_model_table():
    found = (DOCS / "models.md").read_text()
    assert model_table() in found and tag_table() in found, "run `KERAS_BACKEND=jax python tests/test_documentation.py`"


def test_every_public_name_is_told():
    told = set(re.findall(r"^::: fzoo\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert told | {"__version__", "devices"} == set(fzoo.__all__)


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to(DOCS)) for page in PAGES if page != README}
    assert set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)) == pages


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """To files, as they are in a checkout."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.resolve() if page.name == "design.md" else page).parent.joinpath(target).exists(), target


def random_weights(folder: Path, url: str) -> Path:
    """A file for the model that the URL is of, in the layout of the published one."""
    (name,) = [n for n in fzoo.list_models() if any(f.url == url for f in fzoo.spec(n).weight_files)]
    path = folder / f"{name}-{url.rsplit('/', 1)[1]}"
    if path.exists():
        return path
    options = {"include_top": "notop" not in url}
    if name == "InceptionV3":  # trained in a recipe: by large features its loss would be zero after two steps
        module, variables = fzoo.load(name, weights=None, **options)
    else:
        module = fzoo.create(name, **options)
        variables = random_variables(module, statistics={})
    fzoo.save_variables(module, variables, path, layout="torch" if fzoo.spec(name).tag else "keras")
    return path


#: The recipes that take least, with what is in them; those with the other networks are slow, and those of some pages.
QUICK = ("VGG16", "VGG19", "ResNet50", "load_model", "ten.h5", '"weights": None')
LONG_PAGES = ("devices", "nnx", "streams", "training-loops")


#: Libraries that call fzoo, and that the tests do without where they are not installed.
CALLERS = ("ray", "datasets")


def imported(block: str) -> list[str]:
    """Which of these a block has."""
    return [name for name in CALLERS if f"import {name}\n" in block]


def needs(block: str) -> list[str]:
    """List what a recipe writes or reads ONNX with."""
    written = ["onnx"] if ".onnx" in block else []
    return written + [package for package in ("onnxruntime", "openvino") if f"import {package}" in block]


def is_quick(page: Path, block: str) -> bool:
    """Whether a recipe is run by default."""
    return page.stem not in LONG_PAGES and any(name in block for name in QUICK)


def recipes() -> list[Any]:
    """The blocks of Python, by their page and the model that each loads."""
    return [
        (pytest.param if is_quick(page, block) else slow)(
            block,
            id=", ".join([page.stem, *re.findall(r'load(?:_model)?\("(\w+)', block)]),
            marks=[pytest.mark.filterwarnings("ignore")] if imported(block) else [],
        )
        for page in PAGES
        if page != TWELVE_JOBS
        for block in blocks("python", page)
    ]


@pytest.fixture
def recipe_folder(tmp_path, monkeypatch, offline):
    """Where recipes run: with a photograph, and files of random weights that stand in for the published ones."""
    (pixels,) = random_images((1, 150, 200, 3), pixels=True)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "parrot.jpg")
    index = {str(i): [f"n{i:08d}", f"label_{i}"] for i in range(1000)}
    (offline / "imagenet_class_index.json").write_text(json.dumps(index))
    monkeypatch.setattr("fzoo.pretrained.fetch", lambda url, *rest: random_weights(tmp_path, url))
    monkeypatch.chdir(tmp_path)
    return tmp_path


#: What each of the twelve jobs must leave: the shapes of a name.
JOBS = {
    "1": ("maps", {"block_13_expand_relu": (2, 6, 6, 576)}),
    "2": ("loss", ()),
    "3": ("average", None),
    "4": ("found", (6, 2048)),
    "5": ("metrics", {"accuracy": (), "loss": ()}),
    "6": ("maps", {8: (1, 12, 12, 32), 16: (1, 6, 6, 96), 32: (1, 3, 3, 320)}),
    "7": ("maps", (1, 12, 12, 1280)),
    "8": ("probabilities", (2, 5)),
    "9": ("features", (1, 1280)),
    "10": ("found", None),
    "11": ("module", None),
    "12": ("gradients", None),
}

#: Those that take long.
LONG_JOBS = ("5", "10", "11", "12")

#: The heading of a job, its number, and its program.
JOB = re.compile(r"^## ((\d+)\..*?)$.*?```python\n(.*?)```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("title", "number", "block"),
    [(slow if job[1] in LONG_JOBS else pytest.param)(*job, id=job[1]) for job in JOB.findall(TWELVE_JOBS.read_text())],
)
def test_twelve_jobs(title, number, block, recipe_folder):
    """Each does what it says, in as many lines as the table says."""
    if number == "11":
        pytest.importorskip("onnx", reason="onnx is not installed")
    namespace: dict[str, Any] = {"__name__": "job"}
    exec(compile(block, "block", "exec"), namespace)
    name, shapes = JOBS[number]
    left = namespace[name]
    if shapes is not None:
        assert jax.tree.map(jnp.shape, left) == shapes
    elif number == "3":  # it moved from the weights, and is not those of the last step
        first = namespace["variables"]["params"]["conv_pw_12"]["kernel"]
        last = namespace["state"].trained["conv_pw_12"]["kernel"]
        assert np.abs(left["conv_pw_12"]["kernel"] - first).max() < 0.1 * np.abs(last - first).max()
        assert not np.array_equal(left["conv_pw_12"]["kernel"], first)
    elif number == "10":
        assert list(left["name"]) == ["parrot", "none"] and [bool(error) for error in left["error"]] == [False, True]
    elif number == "11":
        assert {path.suffix for path in recipe_folder.glob("*.*x") if path.stat().st_size > 1 << 20} == {".onnx"}
        assert (recipe_folder / "any-size.stablehlo").stat().st_size > 1 << 20
    else:
        assert left["conv1_conv"]["kernel"].shape == (7, 7, 6, 64) and np.abs(left["conv1_conv"]["kernel"]).max() > 0
    code = [line for line in block.splitlines() if re.match(r"\s*[^\s#]", line) and not line.endswith("# data")]
    lines = sum(not re.match(r"\s*(import|from) ", line) for line in code)
    anchor = re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    assert f"| [{title}](#{anchor}) | {lines} | " in TWELVE_JOBS.read_text()


def test_all_twelve_jobs_are_run():
    assert [number for _, number, _ in JOB.findall(TWELVE_JOBS.read_text())] == list(JOBS)


@pytest.mark.parametrize("block", recipes())
def test_recipe(block, recipe_folder, tmp_path):
    """As it stands, but for the download."""
    if "flowers.keras" in block:
        layers = keras.layers
        keras.Sequential([keras.Input((32, 32, 3)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)]).save(
            "flowers.keras"
        )

    for library in needs(block):
        pytest.importorskip(library, reason=f"{library} is not installed")
    for library in imported(block):
        pytest.importorskip(library, reason=f"{library} is not installed")
        (tmp_path / "photos").mkdir()
        shutil.copy("parrot.jpg", "photos")

    namespace: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(block, "block", "exec"), namespace)

    if ".onnx" in block:
        assert (tmp_path / "mobilenet.onnx").stat().st_size > 1 << 20
        assert "probabilities" not in namespace or namespace["probabilities"].shape == (3, 1000)
    elif "block4_pool" in block:
        assert namespace["features"].shape == (1, 14, 14, 512)
    elif "distance" in block:
        found = namespace["distance"](namespace["variables"], namespace["noise"], namespace["noise"][::-1])
        assert found.shape == (2,) and (found > 0).all()
    elif "VGG16" in block:
        assert namespace["features"].shape == (1, 7, 7, 512)
    elif "mesh" in block:
        assert namespace["probabilities"].shape == (6, 1000) and namespace["mesh"].size == 2
    elif "decode_predictions(probabilities)" in block and "nnx" in block:
        expected = fzoo.predict(namespace["module"], namespace["variables"], namespace["images"])
        np.testing.assert_allclose(namespace["probabilities"], expected, atol=1e-4 * np.abs(expected).max())
        assert namespace["maps"]["block_13_expand_relu"].shape == (1, 14, 14, 576)
    elif "nnx.DiffState" in block or "eqx" in block:  # what a mask marks has moved, and nothing else
        after = fzoo.from_nnx(namespace["model"].backbone)[1] if "nnx" in block else namespace["model"].variables
        same = jax.tree.map(np.array_equal, after["params"], namespace["variables"]["params"])
        moved = {layer for layer, arrays in same.items() if not all(jax.tree.leaves(arrays))}
        assert moved and all(all(jax.tree.leaves(namespace["mask"]["params"][layer])) for layer in moved)
    elif "checkpointer" in block:
        states = (fzoo.from_nnx(namespace[name])[1] for name in ("model", "again"))
        assert all(jax.tree.leaves(jax.tree.map(np.array_equal, *states)))
    elif '"weights": None' in block:
        assert np.isfinite(namespace["metrics"]["loss"] if "metrics" in namespace else namespace["loss"])
    elif "Predictor" in block and "found" in namespace:
        assert len(namespace["found"]["label"][0]) == (3 if "ResNet50" in block else 1)
    elif "make_predict_fn" in block:
        files = np.array([Path("parrot.jpg").read_bytes()] * 2, object)
        found = namespace["make_predict_fn"]()(files)
        assert found["probability"].shape == found["label"].shape == (2, 3)
    elif "write_parquet" in block:
        rows = pyarrow.parquet.read_table("classes").to_pylist()
        assert len(rows) == 1 and rows[0]["path"].endswith("parrot.jpg") and rows[0]["error"] == ""
    elif "batches()" in block:
        assert namespace["probabilities"].shape == (3, 1000) and namespace["found"]["avg_pool"].shape == (3, 2048)
    elif "optimize_for_inference" in block:
        assert namespace["probabilities"].shape == (4, 1000)
    elif "trainable_mask" in block:
        before, after = namespace["pretrained"]["params"], namespace["params"]["backbone"]
        names = fzoo.layer_names(namespace["backbone"])
        moved = {
            name for name in before if any(not np.array_equal(before[name][a], after[name][a]) for a in before[name])
        }
        assert moved and all(names.index(name) >= names.index("mixed8") for name in moved)
        assert np.isfinite(namespace["loss"])
    elif "vecdot" in block:
        assert namespace["similarity"](namespace["variables"], *(namespace["noise"],) * 2) == pytest.approx(1, abs=1e-4)


def run(command: str, folder: Path) -> str:
    """A shell command with this environment's programs first, compiled as for a user."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env={**env, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands(block: str) -> list[list[str]]:
    return [shlex.split(line) for line in block.splitlines() if line.startswith("fzoo ")]


def test_the_commands_are_known(command_line):
    """With their options; the slow tests run them."""
    first, second, *rest = [block for page in PAGES for block in blocks("sh", page)]
    assert [re.match(INSTALL, block)[1] for block in (first, second)] == ["demo", "test"]
    assert re.sub(INSTALL, "", second).strip() == "pytest"
    found = commands("\n".join([re.sub(INSTALL, "", first), *rest]))
    assert {command[1] for command in found} >= {"demo", "finetune", "evaluate", "classify", "features", "convert"}
    for _, *arguments in found:
        code, output, errors = command_line(*arguments, "--help")
        assert (code, errors) == (0, []) and f"fzoo {arguments[0]} " in "".join(output[:3])


def read_back(folder: Path, accuracy: float) -> tuple[Any, np.ndarray, np.ndarray]:
    """What Keras reads from the demo's files predicts as fzoo does: (Keras's network, images, its predictions)."""
    model = build(keras.applications.MobileNet, alpha=0.25, input_shape=(32, 32, 3), classes=10)
    model.load_weights(folder / "mobilenet_digits.h5")
    digits = demo.load_digits()
    images = fzoo.preprocess_input(digits.test_images, "MobileNet")
    theirs = model.predict(images, verbose=0)
    assert np.ptp(theirs, 0).max() > 0.1
    assert np.mean(theirs.argmax(1) == digits.test_labels) == pytest.approx(accuracy, abs=5e-4)
    options = {"alpha": 0.25, "classes": 10, "input_shape": (32, 32, 3)}
    module, variables = fzoo.load("MobileNet", weights=folder / "mobilenet_digits.h5", **options)
    np.testing.assert_allclose(fzoo.predict(module, variables, images), theirs, atol=1e-4)
    sheet = np.asarray(Image.open(folder / "digits.png"))
    assert sheet.shape[1] > 600 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100
    return model, images, theirs


def accuracy_in(said: str) -> float:
    return float(re.search(r"accuracy on held-out digits +([\d.]+)%", said)[1]) / 100


@pytest.mark.slow
def test_the_demo(tmp_path, monkeypatch, command_line):
    """On some of the digits, in small batches: it learns, is saved for Keras, and read back by both."""
    digits = demo.load_digits()
    few = digits._replace(train_images=digits.train_images[:320], train_labels=digits.train_labels[:320])
    monkeypatch.setattr(demo, "load_digits", lambda seed=0: few)
    monkeypatch.setattr(demo, "train", functools.partial(demo.train, batch_size=8))
    code, output, errors = command_line("demo", "--out", tmp_path, "--epochs", "3")
    assert (code, errors) == (0, [])
    said = "\n".join(output)
    first, _, last = map(float, re.findall(r"loss ([\d.]+)", said))
    accuracy = accuracy_in(said)
    assert last < 0.8 * first and accuracy > 0.2
    read_back(tmp_path, accuracy)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_newcomers_path(tmp_path):
    """As a user does it, with the commands that come after the demo."""
    first, _, shown = blocks("sh")
    (conversions,), (listed,) = (blocks("sh", DOCS / "guides" / page) for page in ("weights.md", "command-line.md"))
    accuracy = accuracy_in(run(re.sub(INSTALL, "", first).strip(), tmp_path))
    assert accuracy >= 0.95
    model, images, theirs = read_back(tmp_path / "digits", accuracy)

    said = run(shown, tmp_path)
    assert "\t7\t" in said.split("digit_7.png")[1].splitlines()[0]
    assert (tmp_path / "digits" / "features.npz").is_file()

    assert (tmp_path / "digits" / "digits.safetensors").is_file() and "ResNet152V2" in said
    run(listed, tmp_path)

    said = run(conversions, tmp_path)
    assert 'fits fzoo.create("MobileNet", classes=10, input_shape=(32, 32, 3), alpha=0.25)' in said
    model.load_weights(tmp_path / "digits" / "mobilenet_digits.weights.h5")
    np.testing.assert_allclose(model.predict(images, verbose=0), theirs, atol=1e-6)
    program = jax.export.deserialize(bytearray((tmp_path / "digits" / "digits.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(images[:5]), theirs[:5], atol=1e-4)


@pytest.mark.slow
def test_fine_tuning_commands(tmp_path):
    """On a few images of noise, dark and bright."""
    rng = np.random.default_rng(0)
    for name, most in (("dark", 80), ("bright", 256)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(rng.integers(0, most, (32, 32, 3), np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    said = run(blocks("sh", DOCS / "guides" / "fine-tune.md")[0], tmp_path)
    assert "accuracy on held-out images" in said and "shorter side to 37 by bicubic" in said
    rows = (tmp_path / "run" / "classes.csv").read_text().splitlines()
    assert sum("dark/" in row or "bright/" in row for row in rows) >= 20


if __name__ == "__main__":
    page = DOCS / "models.md"
    text = MODELS.sub(lambda m: f"{m[1]}{model_table()}\n{m[2]}", page.read_text())
    page.write_text(TAGS.sub(lambda m: f"{m[1]}{tag_table()}\n{m[2]}", text))
