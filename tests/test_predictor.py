"""`Predictor`: what batch engines call."""

import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import keras
import networks
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from reference import randomise
from tiers import slow_but

import fzoo
from fzoo.inference.batches import compiled
from fzoo.jobs import predictor as predictors

OPTIONS = {"alpha": 0.25, "classes": 5, "size": 32}
COMMAND = ["-m", "MobileNet", "-o", "alpha=0.25", "--size", "32", "--classes", "5", "-w", "weights.h5"]
TAP = "conv_pw_3_relu"
BAD = "04.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`weights.h5`, and `images/` of 12, of which one is cut off."""
    folder = tmp_path_factory.mktemp("predictor")
    network = networks.network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fzoo.save_keras_weights(*network, folder / "weights.h5")
    (folder / "images").mkdir()
    for i in range(12):
        (pixels,) = networks.random_images((1, 30 + i, 40, 3), i, pixels=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{i:02}.png")
    (folder / "images" / BAD).write_bytes((folder / "images" / BAD).read_bytes()[:400])
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.fixture
def files(folder):
    return sorted((folder / "images").iterdir())


@pytest.fixture
def predictor():
    return fzoo.Predictor("MobileNet", weights="weights.h5", top=3, **OPTIONS)


@pytest.fixture(scope="module")
def classified(folder):
    """What the job of `fzoo classify` writes: {name: predictions}."""
    module, variables = fzoo.load(
        "MobileNet", weights=folder / "weights.h5", alpha=0.25, classes=5, input_shape=(32, 32, 3)
    )
    out = folder / "classes.jsonl"
    fzoo.run_job(module, variables, [folder / "images"], out, top=3, preprocess="MobileNet")
    rows = read_lines(out)
    assert len(rows) == 11
    return {row["image"].rpartition("/")[2]: row["predictions"] for row in rows}


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_rows(batch, classified, count=12):
    """Each row is what `fzoo classify` says of its image, or has the reason why it can't be read."""
    assert len(batch["name"]) == count
    for name, wnids, labels, p, error in zip(
        *(batch[column] for column in ("name", "wnid", "label", "probability", "error")), strict=True
    ):
        if name == BAD:
            assert labels == wnids == [""] * 3 and np.isnan(p).all() and error.startswith("cannot read the image")
            continue
        wanted = classified[name]
        assert error == "" and labels == [row["label"] for row in wanted] and wnids == [row["wnid"] for row in wanted]
        np.testing.assert_allclose(p, [row["probability"] for row in wanted], rtol=1e-4, atol=1e-6)


def as_batch(files, images=None):
    return {"name": [file.name for file in files], "image": images or [file.read_bytes() for file in files]}


@pytest.mark.parametrize("batch_size", slow_but([None, 5, 64], 5))
def test_classes_are_those_of_classify(files, classified, command_line, batch_size):
    """With those that can't be read in their places."""
    predictor = fzoo.Predictor("MobileNet", weights="weights.h5", top=3, batch_size=batch_size, **OPTIONS)
    found = predictor(as_batch(files))
    assert list(found) == ["name", "wnid", "label", "probability", "error"]
    check_rows(found, classified)
    assert len({tuple(labels) for labels in found["label"]}) > 2
    code, lines, _ = command_line("classify", "images", *COMMAND, "--top", 1, "--json")
    (said,) = [json.loads("\n".join(lines))]
    assert code == 1 and [row["predictions"][0]["label"] for row in said] == [x[0] for x in found["label"] if x[0]]


def test_whatever_an_image_is(files, classified, predictor):
    """Bytes, paths, Pillow's images, Hugging Face's dictionaries, pixels: as rows of lists or of NumPy's arrays."""
    good = [file for file in files if file.name != BAD]
    pixels = [np.asarray(Image.open(file)) for file in good]
    ragged = np.empty(len(good), object)
    ragged[:] = pixels
    for images in (
        [memoryview(file.read_bytes()) for file in good],
        np.array([file.read_bytes() for file in good], object),
        [str(file) for file in good],
        good,
        [Image.open(file) for file in good],
        [{"bytes": file.read_bytes(), "path": None} for file in good],
        [{"bytes": None, "path": str(file)} for file in good],
        pixels,
        ragged,
    ):
        check_rows(predictor({"name": [file.name for file in good], "image": images}), classified, 11)


def test_pixels_of_the_networks_size_are_taken_as_they_are(predictor, folder):
    pixels = networks.random_images((6, 32, 32, 3), pixels=True).astype(np.uint8)
    module, variables = fzoo.load("MobileNet", weights="weights.h5", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    wanted = np.sort(fzoo.predict(module, variables, pixels), axis=1)[:, :-4:-1]
    found = predictor({"image": pixels})
    np.testing.assert_allclose(np.stack(found["probability"]), wanted, rtol=1e-4, atol=1e-6)
    grey = pixels[..., :1]
    shown = predictor({"image": np.repeat(grey, 3, axis=3)})["probability"].tolist()
    for images in (grey, grey[..., 0]):
        np.testing.assert_allclose(np.stack(predictor({"image": images})["probability"]), shown, rtol=1e-5)


def test_features_of_layers(files, predictor):
    found = fzoo.Predictor("MobileNet", weights="weights.h5", layers=[TAP, "predictions"], batch_size=4, **OPTIONS)(
        as_batch(files)
    )
    assert list(found) == ["name", TAP, "predictions", "error"] and found[TAP].dtype == np.float32
    assert found[TAP].shape == (12, 8, 8, 32) and found["predictions"].shape == (12, 5)
    bad = found["name"].index(BAD)
    assert np.isnan(found[TAP][bad]).all() and not np.isnan(np.delete(found[TAP], bad, 0)).any()
    p = np.stack(predictor(as_batch(files))["probability"])[:, 0]
    np.testing.assert_allclose(np.delete(found["predictions"].max(1), bad), np.delete(p, bad), rtol=1e-4)


def test_no_rows_and_none_that_can_be_read(predictor):
    found = predictor({"name": [], "image": []})
    assert {name: len(column) for name, column in found.items()} == dict.fromkeys(found, 0)
    found = predictor({"image": [None, b"", b"text"]})
    assert found["label"].tolist() == [[""] * 3] * 3 and found["error"][0] == "no image in this row"
    assert all("Pillow" in error or "no image" in error for error in found["error"])


def test_what_is_kept(files, predictor):
    batch = {**as_batch(files[:2]), "label": [3, 4]}
    with pytest.raises(ValueError, match=r"^the batch has a column 'label', and so have the results: prefix="):
        predictor(batch)
    renamed = fzoo.Predictor("MobileNet", weights="weights.h5", top=1, prefix="predicted_", **OPTIONS)(batch)
    assert list(renamed) == ["name", "label", *(f"predicted_{x}" for x in ("wnid", "label", "probability", "error"))]
    assert renamed["label"] == [3, 4]
    bare = fzoo.Predictor("MobileNet", weights="weights.h5", top=1, keep=False, **OPTIONS)(batch)
    assert list(bare) == ["wnid", "label", "probability", "error"]


@pytest.mark.wrong_types
def test_bad_arguments_are_told_at_once(tmp_path, monkeypatch):
    """In one line, before any weights are read."""
    monkeypatch.setattr(predictors, "load_network", None)
    (tmp_path / "empty.h5").write_bytes(b"nothing")
    for model, options, match in (
        ("MobilNet", {}, "^no such file, and unknown model 'MobilNet': did you mean MobileNet"),
        ("", {}, "model='' given"),
        (3, {}, "model=3 given"),
        ("missing.keras", {}, "no such file: missing.keras"),
        (tmp_path / "empty.h5", {}, "empty.h5"),
        ("MobileNet", {"weights": "missing.h5"}, "no such weights file: missing.h5"),
        ("MobileNet", {"weights": None}, "weights=None given"),
        ("MobileNet", {"alfa": 1}, "unknown option of MobileNet 'alfa'"),
        ("MobileNet", {"layers": "conv_pw_77"}, "unknown layer 'conv_pw_77'"),
        ("MobileNet", {"layers": []}, "no layers given"),
        ("MobileNet", {"top": 0}, "top=0 given"),
        ("MobileNet", {"top": True}, "top=True given"),
        ("MobileNet", {"batch_size": -1}, "batch_size=-1 given"),
        ("MobileNet", {"size": 0}, "size=0 given"),
        ("MobileNet", {"size": 20}, "32 x 32 is the least"),
        ("MobileNet", {"preprocess": "half"}, "preprocess='half' given: unknown model"),
        ("MobileNet", {"size": 64, "recipe": fzoo.Recipe(64)}, "which says the size"),
        ("MobileNet", {"input_shape": (64, 64, 3)}, "size="),
        ("MobileNet", {"dtype": "int8"}, "int8"),
    ):
        with pytest.raises((ValueError, OSError, TypeError), match=match) as raised:
            fzoo.Predictor(model, **options)
        assert "\n" not in str(raised.value)


@pytest.mark.wrong_types
def test_bad_batches(predictor):
    pixels = np.zeros((2, 40, 40, 3), np.uint8)
    for batch, match in (
        ([pixels], "list given, a mapping"),
        ({"picture": pixels}, "no column 'image' in a batch of picture: image_column=..."),
        ({"image": "photo.jpg"}, "'image' is str, a column of images expected"),
        ({"image": pixels.astype(np.float32)}, r"pixels of float32 and shape \(40, 40, 3\) given"),
        ({"image": pixels.transpose(0, 3, 1, 2)}, r"shape \(3, 40, 40\) given"),
        ({"image": [3]}, "an image that is int given"),
    ):
        with pytest.raises(ValueError, match=match):
            predictor(batch)


@pytest.fixture
def loads(monkeypatch):
    """A list that grows with every network that is loaded."""
    found, load = [], predictors.load_network
    monkeypatch.setattr(predictors, "load_network", lambda request: found.append(request) or load(request))
    predictors.keep_loaded.cache_clear()
    return found


def test_it_is_pickled_as_its_arguments(files, classified, predictor, loads):
    """The copy gives the same, and the network is loaded once for both."""
    before = pickle.dumps(predictor)
    check_rows(predictor(as_batch(files)), classified)
    after = pickle.dumps(predictor)
    assert len(before) < 4000 and len(after) < 4000
    for pickled in (before, after):
        check_rows(pickle.loads(pickled)(as_batch(files)), classified)
    assert len(loads) == 1


def test_a_file_that_was_changed_is_loaded_again(tmp_path, files):
    first = networks.network("MobileNet", seed=1, alpha=0.25, classes=5, input_shape=(32, 32, 3))
    second = networks.network("MobileNet", seed=2, alpha=0.25, classes=5, input_shape=(32, 32, 3))
    found = []
    for network in (first, second):
        fzoo.save_keras_weights(*network, tmp_path / "w.h5")
        found.append(fzoo.Predictor("MobileNet", weights=tmp_path / "w.h5", **OPTIONS)(as_batch(files[:2])))
    assert np.abs(np.stack(found[0]["probability"]) - np.stack(found[1]["probability"])).max() > 1e-3


def test_threads_share_it(files, classified, predictor, loads):
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(predictor, [as_batch(files)] * 6):
            check_rows(found, classified)
    assert len(loads) == 1


def test_one_compilation(files, predictor):
    predictor(as_batch(files))
    programs = compiled.cache_info().currsize
    sizes = predictor.batch_size
    for count in (1, 3, 12, 7):
        predictor(as_batch(files[:count]))
    assert predictor.batch_size == sizes and compiled.cache_info().currsize == programs


def in_another_process(predictor, batch):
    return predictor(batch)


@pytest.mark.slow
def test_in_another_process(files, classified, predictor):
    """As workers of a cluster are: nothing of this one is there."""
    predictor(as_batch(files[:1]))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        check_rows(pool.apply(in_another_process, (predictor, as_batch(files))), classified)


def test_optimized_and_of_another_dtype(files, predictor):
    plain = np.stack(predictor(as_batch(files))["probability"])
    for options, tolerance in (({"optimize": True}, 1e-3), ({"dtype": jnp.bfloat16}, 1e-1)):
        found = fzoo.Predictor("MobileNet", weights="weights.h5", top=3, **OPTIONS, **options)(as_batch(files))
        found = np.stack(found["probability"])
        assert not np.array_equal(found, plain) and np.nanmax(np.abs(found - plain)) < tolerance


def test_whole_models_and_recipes(tmp_path, files):
    """A user's Keras file, by what it shows, or as it is told."""
    layers = keras.layers
    model = randomise(
        keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                layers.Rescaling(1 / 255),
                layers.Conv2D(4, 3),
                layers.Flatten(),
                layers.Dense(3, name="end"),
            ]
        )
    )
    model.save(tmp_path / "user.keras")
    good = [file for file in files if file.name != BAD]
    found = fzoo.Predictor(tmp_path / "user.keras", layers=["end"], batch_size=4)(as_batch(good))
    recipe = fzoo.Recipe((16, 16), "bilinear", crop=None)
    wanted = model.predict(np.stack([recipe.load(file) for file in good]).astype(np.float32), verbose=0)
    np.testing.assert_allclose(found["end"], wanted, rtol=1e-3, atol=1e-4)
    other = fzoo.Recipe((16, 16), "nearest", crop=0.5)
    found = fzoo.Predictor(tmp_path / "user.keras", layers=["end"], recipe=other)(as_batch(good))
    wanted = model.predict(np.stack([other.load(file) for file in good]).astype(np.float32), verbose=0)
    np.testing.assert_allclose(found["end"], wanted, rtol=1e-3, atol=1e-4)


def test_numbers_that_are_not_finite_are_an_error(tmp_path, files):
    """They are never taken for an image that can't be read."""
    module, variables = networks.network("MobileNet", seed=3, alpha=0.25, classes=5, input_shape=(32, 32, 3))
    variables = {**variables, "params": {**variables["params"]}}
    head = dict(variables["params"]["conv_preds"])
    variables["params"]["conv_preds"] = {**head, "bias": np.full_like(head["bias"], np.nan)}
    fzoo.save_keras_weights(module, variables, tmp_path / "nan.h5")
    with pytest.raises(ValueError, match="the network gives nan for the image of row 0 of the batch"):
        fzoo.Predictor("MobileNet", weights=tmp_path / "nan.h5", **OPTIONS)(as_batch(files))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_on_ray_with_a_worker_that_is_killed(tmp_path, folder, monkeypatch):
    """A folder of images to Parquet by two workers: nothing lost, nothing twice, and what `fzoo classify` writes."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fzoo[ray]'")
    images, started = tmp_path / "photos", tmp_path / "started"
    images.mkdir()
    started.mkdir()
    for i in range(40):
        (pixels,) = networks.random_images((1, 30 + i, 40, 3), i, pixels=True)
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{i:02}.png")
    (images / BAD).write_bytes((images / BAD).read_bytes()[:400])
    module, variables = fzoo.load("MobileNet", weights="weights.h5", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    fzoo.run_job(module, variables, [images], tmp_path / "c.jsonl", top=3, preprocess="MobileNet")
    classified = {row["image"].rpartition("/")[2]: row["predictions"] for row in read_lines(tmp_path / "c.jsonl")}

    class Watched(fzoo.Predictor):
        """Says in which process it is, and takes its time."""

        def __call__(self, batch):
            (started / str(os.getpid())).touch()
            time.sleep(0.5)
            return super().__call__(batch)

    def kill_one():
        while len(list(started.iterdir())) < 2:
            time.sleep(0.05)
        time.sleep(0.7)  # in the middle of a batch
        os.kill(int(min(started.iterdir()).name), signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    options = {**OPTIONS, "weights": str(folder / "weights.h5"), "top": 3, "image_column": "bytes"}
    with ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False):
        killer.start()
        files = ray.data.read_binary_files(str(images), include_paths=True, override_num_blocks=10)
        pool = ray.data.ActorPoolStrategy(size=2)
        rows = files.map_batches(
            Watched, fn_constructor_args=("MobileNet",), fn_constructor_kwargs=options, batch_size=4, compute=pool
        )
        rows.write_parquet(str(tmp_path / "classes"))
        function = fzoo.Predictor("MobileNet", **options)  # in tasks, instead of actors
        few = files.limit(5).map_batches(function, batch_size=2).take_all()
    killer.join()
    assert len(list(started.iterdir())) == 3  # the two, and the one that came for the one that was killed
    table = pyarrow.parquet.read_table(tmp_path / "classes")
    assert [str(field.type) for field in table.schema][1:] == ["list<element: string>"] * 2 + [
        "list<element: float>",
        "string",
    ]
    columns = table.to_pydict()
    columns["name"] = [path.rpartition("/")[2] for path in columns["path"]]
    assert sorted(columns["name"]) == sorted(file.name for file in images.iterdir())
    check_rows(columns, classified, 40)
    for row in few:
        if not row["error"]:
            assert list(row["label"]) == [x["label"] for x in classified[row["path"].rpartition("/")[2]]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_datasets_of_hugging_face(files, classified, predictor, monkeypatch, tmp_path):
    """Its images are Pillow's, or the bytes where they are not decoded; its `map` has worker processes."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    good = [file for file in files if file.name != BAD]
    for decode, those in ((True, good), (False, files)):
        rows = datasets.Dataset.from_dict({"name": [file.name for file in those], "image": list(map(str, those))})
        rows = rows.cast_column("image", datasets.Image(decode=decode))
        found = rows.map(predictor, batched=True, batch_size=5, remove_columns=["image"], keep_in_memory=True)
        assert found.features["probability"] == datasets.List(datasets.Value("float32"))
        check_rows(found.to_dict(), classified, len(those))


def test_what_spark_calls(files, classified, predictor):
    """`predict_batch_udf` takes a function that makes one from NumPy's arrays to a dictionary of these."""

    def make_predict_fn():
        def predict(images: np.ndarray) -> dict[str, np.ndarray]:
            found = predictor({"image": images})
            return {name: np.array(column.tolist()) for name, column in found.items()}

        return predict

    found = make_predict_fn()(np.array([file.read_bytes() for file in files], object))
    assert {name: (x.shape, x.dtype.kind) for name, x in found.items()} == {
        "wnid": ((12, 3), "U"),
        "label": ((12, 3), "U"),
        "probability": ((12, 3), "f"),
        "error": ((12,), "U"),
    }
    found = {name: column.tolist() for name, column in found.items()}
    check_rows({"name": [file.name for file in files], **found}, classified)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_on_spark(files, classified, predictor, monkeypatch):
    """In two processes of a real one: the rows of `fzoo classify`, whatever the order of the partitions."""
    pytest.importorskip("pyspark", reason="Spark is not installed")
    from pyspark.ml.functions import predict_batch_udf
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructType

    def make_predict_fn():
        def predict(images: np.ndarray) -> dict[str, np.ndarray]:
            found = predictor({"image": images})
            return {name: np.array(column.tolist()) for name, column in found.items()}

        return predict

    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    kinds = "wnid array<string>, label array<string>, probability array<float>, error string"
    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    try:
        classify = predict_batch_udf(make_predict_fn, return_type=StructType.fromDDL(kinds), batch_size=3)
        given = [(file.name, bytearray(file.read_bytes())) for file in files]
        rows = spark.createDataFrame(given, ["name", "image"]).repartition(3)
        rows = rows.select("name", classify("image").alias("found")).select("name", "found.*").toPandas()
    finally:
        spark.stop()
    rows = rows.set_index("name").loc[[file.name for file in files]].reset_index()
    check_rows({name: [list(x) if np.ndim(x) else x for x in rows[name]] for name in rows}, classified)
