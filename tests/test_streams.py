"""`predict` and `features` of streams of batches."""

import itertools
import weakref

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from networks import assert_alive, network, random_images
from reference import randomise

import fzoo
from fzoo.inference import devices
from fzoo.inference.batches import IN_FLIGHT


@pytest.fixture(scope="module")
def small():
    return network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))


@pytest.fixture(scope="module")
def pixels():
    return random_images((40, 32, 32, 3), pixels=True).astype(np.uint8)


@pytest.fixture(scope="module")
def expected(small, pixels):
    """Of all pixels, with the layer `conv_pw_2`."""
    wanted = fzoo.features(*small, pixels, ["conv_pw_2", "predictions"])
    assert_alive(wanted["predictions"][:8])
    return jax.tree.map(np.asarray, wanted)


def parts(array, sizes):
    """Batches of these sizes, one after the other."""
    starts = np.cumsum([0, *sizes])
    return [array[a:b] for a, b in itertools.pairwise(starts)]


def assert_parts(found, whole, sizes):
    assert [len(part) for part in found] == list(sizes)
    for part, wanted in zip(found, parts(whole, sizes), strict=True):
        assert type(part) is np.ndarray and part.flags.writeable
        np.testing.assert_allclose(part, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, memoryview], ids=["numpy", "jax", "others"])
@pytest.mark.parametrize("batch_size", [None, 1, 4, 16])
@pytest.mark.parametrize("sizes", [(8, 8, 8, 8, 8), (8, 8, 3), (3, 0, 20, 1, 9, 0, 7), (0, 0, 5), (1,)])
def test_results_are_those_of_the_batches(small, pixels, expected, sizes, batch_size, kind):
    """In their order, as many of each."""

    class Other:
        """Of a library such as TensorFlow."""

        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return np.asarray(self.array, dtype)

    kind = Other if kind is memoryview else kind
    stream = (kind(part) for part in parts(pixels, sizes))
    found = fzoo.predict(*small, stream, batch_size=batch_size)
    assert iter(found) is found
    assert_parts(found_list := list(found), expected["predictions"], sizes)
    assert found_list[0].dtype == np.float32


def test_features_give_dictionaries(small, pixels, expected):
    sizes = (6, 6, 2, 9)
    found = list(fzoo.features(*small, iter(parts(pixels, sizes)), ["conv_pw_2", "predictions"]))
    for name in ("conv_pw_2", "predictions"):
        assert_parts([part[name] for part in found], expected[name], sizes)
    with pytest.raises(ValueError, match="no layers given"):
        fzoo.features(*small, iter([]), [])
    with pytest.raises(ValueError, match="conv_pw_77"):
        next(fzoo.features(*small, iter([pixels]), "conv_pw_77"))


def test_one_compilation(small, pixels, compilations):
    """For whatever sizes, and none for a stream of the same batch size after it."""
    module, variables = small
    sizes = (7, 7, 3, 1, 12, 0, 2)
    assert len(list(fzoo.predict(module, variables, iter(parts(pixels, sizes))))) == 7
    assert len(compilations) == 1
    assert len(list(fzoo.predict(module, variables, iter(parts(pixels, (1, 2, 3))), batch_size=7))) == 3
    assert len(compilations) == 1


def test_a_list_is_a_stream(small, pixels, expected):
    """Of what a network of one input takes; what is no batch in it is told before anything is computed."""
    for kind in (list, tuple):
        assert_parts(list(fzoo.predict(*small, kind(parts(pixels, (8, 8, 2))))), expected["predictions"], (8, 8, 2))
    with pytest.raises(ValueError, match=r"^batch 0 of the list given: images of shape \(32, 32, 3\) given, "):
        fzoo.predict(*small, [pixels[0], pixels[1]])
    with pytest.raises(ValueError, match=r"images of shape \(40,\) given"):
        fzoo.predict(*small, (pixels, np.zeros(40, np.float32)))


def test_no_batches(small):
    assert list(fzoo.predict(*small, iter([]))) == [] == list(fzoo.features(*small, [], "conv1"))


@pytest.mark.parametrize("batch_size", [None, 6])
def test_an_array_on_disk_is_read_a_slice_at_a_time(small, pixels, expected, tmp_path, monkeypatch, batch_size):
    module, variables = small
    with h5py.File(tmp_path / "images.h5", "w") as file:
        dataset = file.create_dataset("images", data=pixels)
        read = []
        get = h5py.Dataset.__getitem__
        monkeypatch.setattr(h5py.Dataset, "__getitem__", lambda self, key: read.append(key) or get(self, key))
        monkeypatch.setattr(h5py.Dataset, "__array__", None)
        found = fzoo.predict(module, variables, dataset, batch_size=batch_size)
        assert read == []
        sizes = (32, 8) if batch_size is None else (6, 6, 6, 6, 6, 6, 4)
        assert_parts(list(found), expected["predictions"], sizes)
        assert read == [slice(i, i + sizes[0]) for i in range(0, 40, sizes[0])]
        monkeypatch.undo()
        assert list(fzoo.predict(module, variables, file.create_dataset("none", data=pixels[:0]))) == []
        with pytest.raises(ValueError, match=r"images of shape \(32, 32, 3\) given"):
            fzoo.predict(module, variables, file.create_dataset("one", data=pixels[0]))
    np.save(tmp_path / "images.npy", pixels)
    whole = fzoo.predict(module, variables, np.load(tmp_path / "images.npy", mmap_mode="r"), batch_size=8)
    assert isinstance(whole, jax.Array)  # NumPy's own arrays on disk are arrays
    np.testing.assert_allclose(whole, expected["predictions"], rtol=1e-4, atol=1e-6)


def test_few_batches_are_in_memory(small):
    """However many there are, and whether or not their results are kept."""
    references, most = [], 0

    class Batch(np.ndarray):
        """An array that is known when it goes."""

    def batches():
        nonlocal most
        for i in range(12):
            batch = np.full((13, 32, 32, 3), i, np.uint8).view(Batch)
            references.append(weakref.ref(batch))
            most = max(most, sum(reference() is not None for reference in references))
            yield batch
            del batch

    kept, results = [], []
    for found in fzoo.predict(*small, batches()):
        kept.append(found)
        results.append(sum(x.shape == (13, 5) for x in jax.live_arrays()))
    assert len(kept) == 12 and 1 <= most <= 2
    assert max(results) <= 2 * IN_FLIGHT  # on a CPU, JAX has one array for the device and one for the host


def test_a_stream_may_fill_the_same_array_again(small, pixels, expected):
    """Memory at a multiple of 64 bytes is what JAX on a CPU computes on without a copy."""
    memory = np.zeros(8 * 32 * 32 * 3 + 64, np.uint8)
    batch = memory[-memory.ctypes.data % 64 :][: 8 * 32 * 32 * 3].reshape(8, 32, 32, 3)

    def batches():
        for part in parts(pixels, (8,) * 5):
            batch[:] = part
            yield batch
            batch[:] = 77

    assert_parts(list(fzoo.predict(*small, batches())), expected["predictions"], (8,) * 5)


def test_the_next_batch_is_taken_before_a_result_is_waited_for(small, pixels):
    """So that it is read and moved while the last one is computed; no more are."""
    taken = []

    def batches():
        for i in range(6):
            taken.append(i)
            yield pixels[:4]

    results = fzoo.predict(*small, batches())
    assert taken == []
    counts = [len(taken) for _ in results]
    assert counts == [2, 3, 4, 5, 6, 6]


class Broken(Exception):
    """Of a stream's own."""


@pytest.mark.parametrize("sizes", [(8, 8), (8, 3), (3, 1, 1)])
def test_an_error_comes_after_the_results_before(small, pixels, expected, sizes):
    def failing():
        yield from parts(pixels, sizes)
        raise Broken("the disk is gone")

    def bad(last):
        yield from parts(pixels, sizes)
        yield last

    for stream, error, match in (
        (failing(), Broken, "^the disk is gone$"),
        (bad(pixels[0]), ValueError, r"images of shape \(32, 32, 3\) given"),
        (bad(pixels[:4, :20]), ValueError, r"images of shape \(\d, 20, 32, 3\) given"),
        (bad((pixels, [1])), ValueError, r"a tuple of 2 given, .*\(images for images, labels in batches\)"),
        (bad({"image": pixels, "label": 3}), ValueError, r"image, label given, .*\(batch\[\"image\"\] for batch"),
        (bad(pixels.astype(np.int32) + 300), ValueError, "pixels from 0 to 255 expected"),
        (bad("images"), ValueError, "an array of images expected, str given"),
        (bad(None), ValueError, "an array of images expected, NoneType given"),
    ):
        found = []
        with pytest.raises(error, match=match) as raised:
            for result in fzoo.predict(*small, stream):
                found.append(result)
        assert_parts(found, expected["predictions"], sizes)
        assert "\n" not in str(raised.value)


def test_arguments_are_checked_at_the_call(small):
    module, variables = small
    for options, match in (({"batch_size": 0}, "batch_size=0 given"), ({"preprocess": "half"}, "half")):
        with pytest.raises(ValueError, match=match):
            fzoo.predict(module, variables, iter([]), **options)
    with pytest.raises(ValueError, match="inside of a jitted function"):
        jax.jit(lambda v, x: list(fzoo.predict(module, v, iter([x]))))(variables, np.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match="inside of a jitted function"):
        jax.jit(lambda x: list(fzoo.predict(module, variables, iter([x]))))(np.zeros((1, 32, 32, 3), np.float32))


def test_warned_once(small, pixels):
    """Of floats that were not preprocessed."""
    stream = (part for part in parts(pixels.astype(np.float32), (8, 8, 8)))
    with pytest.warns(UserWarning, match="MobileNet takes from -1 to 1") as warned:
        list(fzoo.predict(*small, stream))
    assert len(warned) == 1


@pytest.mark.slow
def test_another_shape_or_dtype_on_the_way(pixels, compilations):
    """Each is compiled once."""
    module, variables = network("MobileNet", alpha=0.25, include_top=False, pooling="avg", input_shape=(None, None, 3))
    floats = fzoo.preprocess_input(pixels[:3], "MobileNet")
    wide = random_images((3, 32, 48, 3), seed=4, pixels=True).astype(np.uint8)
    batches = [pixels[:3], pixels[3:4], wide, floats, pixels[4:9], wide[:1]]
    wanted = [np.asarray(fzoo.predict(module, variables, batch, batch_size=3)) for batch in batches]
    compilations.clear()
    found = list(fzoo.predict(module, variables, iter(batches)))
    assert compilations == []  # three programs, which `predict` has compiled before
    for part, result in zip(found, wanted, strict=True):
        np.testing.assert_allclose(part, result, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sizes", [(8, 8, 3), (7, 7), (1, 1, 1)])
def test_on_a_mesh(small, pixels, expected, sizes):
    module, variables = small
    found = fzoo.predict(module, variables, iter(parts(pixels, sizes)), mesh=devices.mesh())
    assert_parts(list(found), expected["predictions"], sizes)


def test_several_inputs(tmp_path):
    """A stream of tuples or of mappings; a tuple alone is a batch."""
    layers = keras.layers
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((5,), name="b")
    flat = layers.Flatten()(layers.Conv2D(4, 3, name="conv")(a))
    model = randomise(keras.Model([a, b], layers.Dense(3, name="end")(layers.Concatenate()([flat, b]))))
    model.save(tmp_path / "two.keras")
    module, variables = fzoo.load_model(tmp_path / "two.keras")
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(9, 8, 8, 3)).astype(np.float32), rng.normal(size=(9, 5)).astype(np.float32)
    wanted = np.asarray(fzoo.predict(module, variables, (first, second)))
    assert_alive(wanted)
    sizes = (4, 3, 2)
    pairs = list(zip(parts(first, sizes), parts(second, sizes), strict=True))
    assert_parts(list(fzoo.predict(module, variables, iter(pairs))), wanted, sizes)
    mappings = ({"b": y, "a": x} for x, y in pairs)
    assert_parts(list(fzoo.predict(module, variables, mappings, batch_size=2)), wanted, sizes)
    with pytest.raises(ValueError, match="one array given, a tuple or a mapping of 2 expected: a, b"):
        next(fzoo.predict(module, variables, iter([first])))
