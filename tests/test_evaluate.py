"""How often a classifier is right: by the names of folders, and never by a tie, by NaN or by a class's number."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import network, random_images
from PIL import Image
from tiers import slow_but

import fzoo

OPTIONS = ["--model", "MobileNetV2", "-o", "alpha=0.35", "--size", 32]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """A network that is right on twelve images, one of each class: (its file, the images, its folder)."""
    folder = tmp_path_factory.mktemp("twelve")
    module, variables = network("MobileNetV2", alpha=0.35, input_shape=(32, 32, 3), classes=12)
    images = random_images((12, 32, 32, 3), pixels=True).astype(np.uint8)
    read = []
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
        read.append(fzoo.recipe("MobileNetV2", 32).load(folder / f"{i}.png"))
    pooled = np.asarray(
        fzoo.features(module, variables, np.stack(read), "global_average_pooling2d", preprocess="MobileNetV2")[
            "global_average_pooling2d"
        ]
    )
    head = {"kernel": np.linalg.pinv(pooled) @ (9 * np.eye(12)), "bias": np.zeros(12)}
    head = {name: array.astype(np.float32) for name, array in head.items()}
    variables = {**variables, "params": {**variables["params"], "predictions": head}}
    fzoo.save_keras_weights(module, variables, folder / "weights.h5")
    return module, variables, folder


def fill(twelve, root, names):
    """A folder of that name for each of the first images."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        (root / name / "image.png").write_bytes((twelve[2] / f"{i}.png").read_bytes())
    return root


@pytest.mark.parametrize("pad", slow_but([1, 3], 3), ids=["plain", "padded"])
def test_numbers_are_numbers(twelve, tmp_path, command_line, pad):
    """Of bare weights: class 10 is the eleventh, wherever its name is sorted; a part of the classes will do."""
    for count in (12, 11):
        data = fill(twelve, tmp_path / str(count), [f"{i:0{pad}d}" for i in range(count)])
        code, output, _ = command_line("evaluate", data, "-w", twelve[2] / "weights.h5", "--classes", 12, *OPTIONS)
        told = dict(line.split("\t")[:2] for line in output[:5])
        assert code == 0 and told["top-1"] == "100.00%" and told["images"] == f"{count} of {count} classes"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["seg_test", "train"], "holds seg_test/, a part of a data set by its name: "),
        (["1", "12"], "class folder '12' given, class folders named 0 to 11 expected"),
        (["cats", "dogs"], "class folder 'cats' given, class folders named 0 to 11 expected"),
        (["1", "01"], "class folders 01, 1 given, some of which are the same number"),
    ],
    ids=["parts", "beyond", "names", "twice"],
)
def test_folders_that_are_no_numbers(twelve, tmp_path, command_line, names, said):
    data = fill(twelve, tmp_path / "data", names)
    code, output, errors = command_line(
        "evaluate", data, "-w", twelve[2] / "weights.h5", "--classes", 12, *OPTIONS, "--out", tmp_path / "out.csv"
    )
    assert (code, output, len(errors)) == (2, [], 1) and said in errors[0]
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.slow
def test_classes_of_imagenet_have_names(twelve, tmp_path, command_line, offline):
    """Two folders of numbers are none of them."""
    index = {str(i): [f"n{i:08d}", f"label_{i}"] for i in range(1000)}
    (offline / "imagenet_class_index.json").write_text(json.dumps(index))
    module, variables = network("MobileNetV2", alpha=0.35, input_shape=(32, 32, 3))
    fzoo.save_variables(module, variables, tmp_path / "w.h5")
    data = fill(twelve, tmp_path / "d", ["2", "10"])
    for given in ([], ["--classes", 1000]):
        code, _, errors = command_line("evaluate", data, "-w", tmp_path / "w.h5", *OPTIONS, *given)
        assert code == 2 and "unknown class folder '10'" in errors[-1]
    data = fill(twelve, tmp_path / "e", ["n00000002", "n00000010"])
    code, output, _ = command_line("evaluate", data, "-w", tmp_path / "w.h5", *OPTIONS)
    assert code == 0 and output[0] == "images\t2 of 2 classes"


@pytest.mark.slow
def test_a_run_goes_by_names(twelve, tmp_path, command_line):
    """Years are names: a run on 2019 to 2021 has no class 2022, and what it has is found by name; "é" has two forms."""
    phase = fzoo.Phase(1, trains="head", learning_rate=1e-6)
    names = ["2019", "2020", "Caf\u00e9, bar\u2028"[:-1]]
    data = fill(twelve, tmp_path / "data", names)
    options = {"weights": twelve[2] / "weights.h5", "alpha": 0.35, "size": 32, "batch_size": 2, "phases": (phase,)}
    out = tmp_path / "run"
    result = fzoo.finetune(data, "MobileNetV2", **options, validation_split=0, out=out)
    assert result.class_names == tuple(names)

    def answer(folder):
        code, output, _ = command_line("evaluate", folder, "--weights", out, "--out", tmp_path / "classes.csv")
        assert code == 0
        with (tmp_path / "classes.csv").open(newline="", encoding="utf-8") as file:
            return {row["class"]: (row["images"], row["top1"]) for row in csv.DictReader(file)}, output

    whole, _ = answer(data)
    assert set(whole) == set(names)
    decomposed = fill(twelve, tmp_path / "decomposed", [*names[:2], "Cafe\u0301, bar"])
    assert answer(decomposed)[0] == whole
    (tmp_path / "part").mkdir()
    (data / "2020").rename(tmp_path / "part" / "2020")
    assert answer(tmp_path / "part")[0] == {"2020": whole["2020"]}
    fill(twelve, tmp_path / "later", ["2020", "2021", "2022"])
    code, output, errors = command_line("evaluate", tmp_path / "later", "--weights", out)
    assert (code, output, len(errors)) == (2, [], 1) and "unknown class folder '2021'" in errors[0]


def with_head(twelve, kernel=0.0, bias=0.0):
    """The network with another last layer."""
    module, variables, _ = twelve
    head = {"kernel": jnp.full((1280, 12), kernel), "bias": jnp.broadcast_to(jnp.asarray(bias), (12,))}
    return module, {**variables, "params": {**variables["params"], "predictions": head}}


def batches(count=12, size=4):
    images = random_images((count, 32, 32, 3), pixels=True).astype(np.uint8)
    return [(images[i : i + size], np.arange(i, i + size) % 12) for i in range(0, count, size)]


def test_a_tie_is_not_right(twelve):
    """Of a constant network no class is the likeliest, and none among the five likeliest, whichever comes first."""
    found = fzoo.evaluate(*with_head(twelve), batches(), preprocess="MobileNetV2", batch_size=4)
    assert (found.images, found.top1, found.top5) == (12, 0.0, 0.0)
    assert np.trace(found.confusion) == 0 and found.mean_loss == pytest.approx(np.log(12))
    # Classes 0 to 4 above the others, of which four are alike: each of the five is among the five likeliest.
    bias = [3.0, 2.0, 2.0, 2.0, 2.0, *[1.0] * 7]
    found = fzoo.evaluate(*with_head(twelve, bias=bias), batches(), preprocess="MobileNetV2", batch_size=4)
    assert (np.trace(found.confusion), found.confusion[0, 0], found.in_top5) == (1, 1, 5)


@pytest.mark.slow
def test_the_accuracy_of_training_has_no_ties(twelve):
    """The same rule in a step."""
    module, variables = with_head(twelve)
    state = fzoo.TrainState(variables["params"], variables["batch_stats"], optax.sgd(0.0).init(variables["params"]))
    images = fzoo.preprocess_input(batches(4)[0][0], "MobileNetV2")
    masked = jax.tree.map(lambda _: optax.MaskedNode(), variables["params"])
    for labels in (jnp.zeros(4, int), jnp.full(4, 11)):
        _, metrics = fzoo.train_step(module, optax.sgd(0.0), state, masked, images, labels, jax.random.key(0))
        assert float(metrics["accuracy"]) == 0


@pytest.mark.slow
def test_nan_is_an_error(twelve, tmp_path, command_line):
    """Of all images, and of one: it is named; on the command line by its file."""
    module, variables = with_head(twelve, bias=np.nan)
    with pytest.raises(ValueError, match=r"^the network's output for image 0 is not finite"):
        fzoo.evaluate(module, variables, batches(), preprocess="MobileNetV2")
    (a, b, _), (module, variables, _) = batches(), twelve
    bad = fzoo.preprocess_input(b[0].astype(np.float32), "MobileNetV2")
    bad[2, 5, 5] = np.nan
    good = fzoo.preprocess_input(a[0].astype(np.float32), "MobileNetV2")
    with pytest.raises(ValueError, match="output for image 6 is not finite"):
        fzoo.evaluate(module, variables, [(good, a[1]), (bad, b[1])])
    fzoo.save_keras_weights(*with_head(twelve, bias=np.nan), tmp_path / "nan.h5")
    data = fill(twelve, tmp_path / "data", ["0", "1"])
    (data / "0" / "broken.png").write_bytes(b"no image")
    code, output, errors = command_line("evaluate", data, "-w", tmp_path / "nan.h5", "--classes", 12, *OPTIONS)
    assert (code, output, len(errors)) == (2, [], 2)
    assert "skipped:" in errors[0] and f"output for {data}/0/image.png is not finite" in errors[1]


def test_labels_and_images_are_as_many(twelve):
    images, labels = batches()[0]
    with pytest.raises(ValueError, match="4 images and 3 labels given"):
        fzoo.evaluate(*twelve[:2], [(images, labels[:3])], preprocess="MobileNetV2")
