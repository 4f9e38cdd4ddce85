"""Weights of timm's and torchvision's: the graphs of their tags, and state dicts in and out.

PyTorch is needed where it is itself asked, which is in slow tests; for the others its answers are stored.
"""

import hashlib
import importlib.util
import itertools
import pickle
import re

import jax
import numpy as np
import pytest
from hurry import COMPILER_OPTIONS
from networks import assert_alive, images_for, random_variables
from reference import assert_close, assert_equal
from stored import assert_summaries_close, summarise
from stored_torch import (
    CASES,
    TORCHVISION,
    arrays_of,
    measure_torch,
    small_torch_network,
    stored_arrays,
    stored_torch_values,
    timm_name,
)
from tiers import slow, slow_but

import fzoo
from fzoo.layers.graph import trace
from fzoo.weights import WeightsMismatch
from fzoo.weights.mapping import check_variables, slots
from fzoo.weights.state_dict import constants, places, state_dict, torch_name, variables_of_state_dict

TAGGED = [name for name in fzoo.list_models(tagged=True) if fzoo.spec(name).is_torch]

#: One tag of each network: the others have the same graph.
GRAPHS = list({timm_name(name): name for name in reversed(TAGGED)}.values())[::-1]

#: The smallest of each family: the quick tests.
FIRST = {
    fzoo.spec(name).family: name for name in sorted(GRAPHS, key=lambda name: fzoo.spec(name).parameters, reverse=True)
}

has_torch = all(importlib.util.find_spec(name) for name in ("torch", "timm", "torchvision"))
needs_torch = pytest.mark.skipif(not has_torch, reason="PyTorch, timm and torchvision are not installed")

SMALL = "ResNet50.tv2_in1k torchvision"


#: The cases whose way through a file is quick: kernels, a map that is flattened, constants, parts.
ROUND_TRIPS = {
    SMALL,
    "VGG11_BN.tv_in1k torchvision",
    "EfficientNetB0.ns_jft_in1k timm",
    "ConvNeXtTiny.in12k_ft_in1k timm",
}


#: Networks that take long to trace.
DEEP = ("DenseNet121", "InceptionV3", "EfficientNetV2B0", "ResNetRS50")


def graphs():
    """One tag of each network; those beyond one of each family are slow, and the deepest."""
    quick = [name for name in FIRST.values() if not name.startswith(DEEP)]
    return [(pytest.param if name in quick else slow)(name, id=timm_name(name)) for name in GRAPHS]


# -- what PyTorch gave -------------------------------------------------------------------------------------------------


def forms():
    """Every case as it stands, and in its form for inference: beyond one of most families, and two, slow."""
    first = {fzoo.spec(name.split()[0]).family: name for name in reversed(CASES)}
    first = {family: name for family, name in first.items() if family.__name__ not in ("InceptionV3", "ResNetRS")}
    folded = ("ResNet50.tv2_in1k torchvision", "ConvNeXtTiny.in12k_ft_in1k timm")
    return [
        (pytest.param if name in (first.values() if form == "plain" else folded) else slow)(name, form)
        for name in CASES
        for form in ("plain", "optimized")
    ]


@pytest.mark.parametrize(("name", "form"), forms())
def test_small_versions(name, form):
    """Output and three taps."""
    case, (module, variables) = CASES[name], small_torch_network(name)
    theirs, images = stored_torch_values(), images_for(module, 2)
    assert_alive(theirs[f"{name} output"])
    if form == "optimized":
        module, variables = fzoo.optimize_for_inference(module, variables)
    gone = dict(module.prepared.gone) if module.prepared else {}
    taps = tuple(layer for layer in case.taps if layer not in gone)

    def tap(variables, images):
        return module.apply(variables, images), module.apply(variables, images, taps, method="endpoints")

    output, tapped = jax.jit(tap, compiler_options=COMPILER_OPTIONS)(variables, images)
    assert_close(output, theirs[f"{name} output"], f"{name}, {form}")
    for layer, values in zip(case.taps, theirs[f"{name} values"], strict=True):
        if layer in tapped:
            assert_summaries_close(summarise(layer, tapped[layer]), values, f"{name}, {layer}, {form}", 1e-4)


@pytest.mark.parametrize("name", graphs())
def test_every_array_has_its_name(name):
    """At full depth, in each library that has the network: names and shapes, none missing and none left over.

    Its records count them, and the layers that have any, as they are.
    """
    module, source = fzoo.create(name), timm_name(name)
    libraries = {"timm", *(["torchvision"] if source in TORCHVISION else [])}
    assert libraries <= set(module.torch_names())  # a library may build a size that it has no name for
    for library in libraries:
        ours = {key: list(place.shape) for key, place in places(module, library).items()}
        theirs = {
            k: s for k, s in stored_arrays()[f"{library} {source}"].items() if not k.startswith(module.torch_unused)
        }
        assert ours == theirs
        taken = {place.slot.path for place in places(module, library).values()}
        every = {slot.path for slot in itertools.chain.from_iterable(slots(module).values())}
        assert taken == every - {slot.path for slot, _ in constants(module)}
    count = sum(leaf.size for leaf in jax.tree.leaves(trace(module).variables))
    for record in (fzoo.spec(other) for other in TAGGED if timm_name(other) == source):
        assert (record.parameters, record.depth) == (count, len(slots(module))), record.name


@pytest.mark.parametrize(("letters", "number"), [("a", 0), ("b", 1), ("z", 25), ("aa", 26), ("af", 31)])
def test_blocks_with_letters(letters, number):
    assert torch_name(f"block6{letters}_bn", {r"block(\d)([a-z]+)_bn": "blocks.{1-1}.{2-a}.bn2"}) == (
        f"blocks.5.{number}.bn2",
        "",
    )


def test_names_say_the_padding():
    """Torchvision's are not for TensorFlow's padding, and none are for Keras's division by the deviation's root."""
    assert set(fzoo.create("EfficientNetB0.ns_jft_in1k").torch_names()) == {"timm"}
    assert set(fzoo.create("EfficientNetV2S").torch_names()) == {"timm"}
    assert fzoo.create("EfficientNetB0", divide_by_std=True).torch_names() == {}
    module, variables = small_torch_network("EfficientNetB0.ns_jft_in1k timm")
    with pytest.raises(ValueError, match="torchvision has no such EfficientNet, timm has it"):
        state_dict(module, variables, "torchvision")
    with pytest.raises(ValueError, match=r"normalization/mean is \[0\.48\S* .*, 0\.5 in timm"):
        state_dict(module.clone(imagenet_statistics=False), variables)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", CASES)
def test_stored_values_are_pytorchs(name):
    """Those of the PyTorch, timm and torchvision that are installed, which load the arrays strictly."""
    stored = stored_torch_values()
    found = measure_torch(name, stored[f"{name} statistics"])
    assert_close(found[f"{name} output"], stored[f"{name} output"], name)
    for ours, theirs in zip(found[f"{name} values"], stored[f"{name} values"], strict=True):
        assert_summaries_close(ours, theirs, name, 1e-4)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", GRAPHS)
def test_stored_names_are_pytorchs(name):
    source = timm_name(name)
    for library, theirs in (("timm", source), ("torchvision", TORCHVISION.get(source))):
        if theirs is not None:
            assert arrays_of(library, theirs) == stored_arrays()[f"{library} {source}"]


# -- records -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAGGED)
def test_tags(name):
    record, module = fzoo.spec(name), fzoo.create(name)
    model, _, tag = name.partition(".")
    assert (module.tag, module.preprocessing) == (tag, record.preprocessing) and record.tag == tag
    (file,) = record.weight_files
    if file.name.endswith(".pth"):
        theirs, digits = file.name.removesuffix(".pth").split("-")
        assert theirs == TORCHVISION[timm_name(name)] and file.hash == f"sha256:{digits}"
        assert file.url == f"https://download.pytorch.org/models/{file.name}"
    else:
        assert file.url == f"https://huggingface.co/timm/{timm_name(name)}.{tag}/resolve/main/model.safetensors"
    assert file.is_state_dict
    assert record.top1 is not None and record.top5 is not None and 0.6 < record.top1 < record.top5 < 1
    if "default_size" in record.options:
        assert module.default_size == record.input_size
    assert record.is_noncommercial == record.licence.startswith("CC BY-NC")
    assert model in fzoo.list_models(tagged=False) and name in fzoo.list_models(f"{model}*")


# -- state dicts in and out --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    slow_but(CASES, *ROUND_TRIPS),
)
def test_round_trip(name, tmp_path):
    """Bit for bit, through a file and from memory, without the top and with what is left out beside it."""
    case, (module, variables) = CASES[name], small_torch_network(name)
    arrays = state_dict(module, variables, case.library)
    assert all(value.dtype == np.float32 and value.flags["C_CONTIGUOUS"] for value in arrays.values())
    file = tmp_path / "x.safetensors"
    fzoo.save_variables(module, variables, file, layout=case.library)
    with fzoo.open_weights(file) as written:
        assert {key: np.asarray(value).tobytes() for key, value in written.items()} == {
            key: value.tobytes() for key, value in arrays.items()
        }
    assert_equal(fzoo.load_variables(module, file), variables)
    counters = {
        key.replace("running_mean", "num_batches_tracked"): np.int64(3) for key in arrays if "running_mean" in key
    }
    unused = {f"{prefix}weight": np.zeros(3) for prefix in module.torch_unused}
    assert_equal(variables_of_state_dict(module, {**arrays, **counters, **unused}, "x"), variables)
    bare = case.create(include_top=False, pooling="avg")
    kept = variables_of_state_dict(bare, arrays, "x")
    check_variables(bare, kept)
    layers, where = set(slots(bare)), places(module, case.library)
    below = {k: v for k, v in arrays.items() if where[k].slot.layer in layers}
    if layers <= set(slots(module)):  # its file without the top, as `include_top=False` saves it
        assert_equal(variables_of_state_dict(bare, below, "x"), kept)


def test_load_by_tag(tmp_path):
    """From a file and a mapping, by `load`, `transfer` and with other classes; what fzoo writes says its tag."""
    name, options = "ResNet50.tv2_in1k", dict(CASES[SMALL].options) | {"input_shape": (64, 64, 3)}
    module, variables = small_torch_network(SMALL)
    arrays, file = state_dict(module, variables), tmp_path / "model.safetensors"
    fzoo.save_variables(module, variables, file, layout="torch")
    ends = {"classes": 7, "classifier_activation": None}
    for weights in (arrays, file, str(file)):
        loaded, found = fzoo.load(name, weights=weights, **options, **ends)
        assert loaded == module
        assert_equal(found, variables)
    assert loaded.tag == "tv2_in1k" and loaded.preprocessing == "torch"
    tuned, started = fzoo.transfer(name, weights=file, classes=3, **options)
    assert tuned.tag == "tv2_in1k" and started["params"]["predictions"]["kernel"].shape == (2048, 3)
    assert_equal(started["params"]["conv1_conv"], variables["params"]["conv1_conv"])
    own = tmp_path / "own.safetensors"
    fzoo.save_variables(module, variables, own)
    again, found = fzoo.load(weights=own)
    assert again == module and again.tag == "tv2_in1k"
    assert_equal(found, variables)
    with pytest.raises(WeightsMismatch, match=r"is of ResNet50\.tv2_in1k, not of ResNet50"):
        fzoo.load("ResNet50", weights=own)


@pytest.mark.slow
def test_pixels_are_preprocessed_as_the_weights_want():
    """Of one family, one tag wants 0.485 and 0.229, another -1 to 1, Keras's BGR."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for name, mode in (("ResNet34.ra4_e3600_r224_in1k", "tf"), ("ResNet34.a1_in1k", "torch"), ("ResNet50", "caffe")):
        module = fzoo.create(name, blocks=(1, 1, 1, 1), classes=5, input_shape=(32, 32, 3))
        variables = random_variables(module)
        ours = fzoo.predict(module, variables, pixels, preprocess=name)
        assert_close(ours, module.apply(variables, fzoo.preprocess_input(pixels, mode)), name)
        with pytest.raises(ValueError, match="unit"):
            fzoo.predict(module, variables, pixels, preprocess="unit")


@pytest.mark.slow
def test_pixels_are_preprocessed_once(tmp_path):
    """Inside, where the tag's network does it; by the caller, where that is left out."""
    name, small = "ConvNeXtTiny.in12k_ft_in1k", dict(CASES["ConvNeXtTiny.in12k_ft_in1k timm"].options)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    inside = fzoo.create(name, **small, input_shape=(32, 32, 3))
    variables = random_variables(inside)
    outside = inside.clone(include_preprocessing=False, preprocessing="torch")
    assert_close(fzoo.predict(inside, variables, pixels), fzoo.predict(outside, variables, pixels), name)
    bare = fzoo.create(name, **small, input_shape=(32, 32, 3), include_preprocessing=False)
    fzoo.save_variables(bare, variables, tmp_path / "x.safetensors")
    again, found = fzoo.load(weights=tmp_path / "x.safetensors")
    assert again == bare and bare.preprocessing is None
    with pytest.raises(ValueError, match="images of uint8 given, floats expected"):
        fzoo.predict(again, found, pixels)
    floats = fzoo.preprocess_input(pixels, "torch")
    assert_close(fzoo.predict(again, found, floats), fzoo.predict(inside, variables, pixels), name)
    with pytest.raises(ValueError, match="preprocessing='torch' goes with include_preprocessing=False: ConvNeXt does"):
        fzoo.create(name, preprocessing="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("layer1.0.conv1.weight"), r"layer1\.0\.conv1\.weight \(64, 64, 1, 1\) is missing"),
        (lambda a: a.update(extra=np.zeros(3)), "extra is left over"),
        (
            lambda a: a.update({"fc.weight": np.zeros((9, 2048)), "fc.bias": np.zeros(9)}),
            r"it has 9 classes, 7 wanted, by .*: fc\.weight is \(9, 2048\), \(7, 2048\) wanted",
        ),
        (lambda a: a.update({"fc.weight": a["fc.weight"].T}), r"fc\.weight is \(2048, 7\), \(7, 2048\) wanted"),
        (lambda a: a.update({"fc.bias": np.array(["a"] * 7)}), r"fc\.bias is of <U1, numbers expected"),
        (lambda a: a.update({"fc.bias": np.zeros(7, complex)}), r"fc\.bias is of complex128, numbers expected"),
        (lambda a: [a.pop(k) for k in list(a) if k.startswith("fc.")], r"fc\.weight \(7, 2048\) is missing"),
        (lambda a: [a.update({f"x.{k}": a.pop(k)}) for k in list(a)], "is left over"),
    ],
)
def test_another_state_dict_is_refused(change, message):
    module, variables = small_torch_network(SMALL)
    arrays = state_dict(module, variables)
    change(arrays)
    with pytest.raises(ValueError, match=message) as error:
        variables_of_state_dict(module, arrays, "model.pth")
    assert "\n" not in str(error.value) and str(error.value).startswith("model.pth")


def test_names_of_older_files():
    """torchvision's DenseNets of 2017 have `norm.1` where its network has `norm1`; both at once are an error."""
    module, variables = small_torch_network("DenseNet121.ra_in1k timm")
    arrays = state_dict(module, variables)
    older = {re.sub(r"(denselayer\d+\.[a-z]+)(\d)\.", r"\1.\2.", name): array for name, array in arrays.items()}
    assert len(older.keys() - arrays.keys()) > 30
    found = variables_of_state_dict(module, older, "an older file")
    jax.tree.map(np.testing.assert_array_equal, found, variables)
    name = "features.denseblock1.denselayer1.conv.1.weight"
    with pytest.raises(WeightsMismatch, match=r"denselayer1\.conv1\.weight and .*denselayer1\.conv\.1\.weight"):
        variables_of_state_dict(module, {**arrays, name: older[name]}, "a file")
    with pytest.raises(WeightsMismatch, match=rf"{name} is \(1,\), .* wanted"):
        variables_of_state_dict(module, {**older, name: np.zeros(1, np.float32)}, "an older file")


def test_keras_graphs_do_not_take_them(tmp_path):
    """The error says the tags; other messages of names say what would do."""
    module, variables = small_torch_network(SMALL)
    arrays, file = state_dict(module, variables), tmp_path / "x.safetensors"
    fzoo.save_variables(module, variables, file, layout="torchvision")
    keras_graph = {"blocks": (1, 2, 1, 1), "classes": 7}
    for weights in (arrays, file):
        with pytest.raises(WeightsMismatch, match=r"its tags are for those of PyTorch's \(ResNet50\.a1_in1k, "):
            fzoo.load("ResNet50", weights=weights, **keras_graph)
        with pytest.raises(ValueError, match="is a state dict of PyTorch's, and neither library has this ResNet"):
            fzoo.load("ResNet50", weights=weights, preprocessing="torch", **keras_graph)
        options = {"stride_in_3x3": True, "use_bias": False, "epsilon": 1e-5}
        module, _ = fzoo.load("ResNet50", weights=weights, preprocessing="torch", **keras_graph, **options)
        assert module.preprocessing == "torch" and module.tag is None
    vgg = fzoo.create("VGG16", classes=3, input_shape=(32, 32, 3))  # of which all arrays would fit
    arrays = state_dict(vgg, random_variables(vgg, statistics={}))
    with pytest.raises(
        WeightsMismatch, match=r"weights is a state dict .* VGG16 is for Keras's weights: .*VGG16\.tv_in1k"
    ):
        fzoo.load("VGG16", weights=arrays, classes=3, input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match="name of one expected"):
        fzoo.load(weights=file)
    with pytest.raises(ValueError, match="the name of a model expected"):
        fzoo.load(weights=arrays)
    with pytest.raises(ValueError, match=r"unknown model 'ResNet50\.tv3_in1k': did you mean ResNet50\.tv_in1k"):
        fzoo.create("ResNet50.tv3_in1k")
    with pytest.raises(ValueError, match=r"the weights of ResNet18 have tags: ResNet18\.a1_in1k, ResNet18\.tv_in1k"):
        fzoo.load("ResNet18")
    with pytest.raises(ValueError, match="its options are those of their training"):
        fzoo.load("ResNet50.tv2_in1k", stride_in_3x3=False)
    module, variables = fzoo.load("NASNetMobile", weights=None, include_top=False, input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match="neither timm's nor torchvision's names are known"):
        fzoo.save_variables(module, variables, tmp_path / "y.safetensors", layout="torch")
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.slow
def test_inspect(tmp_path, command_line):
    """All tags of its graph fit, with the number of classes; with other arrays none does."""
    from safetensors.numpy import save_file

    module = fzoo.create("ResNet18.tv_in1k", classes=5)
    arrays = state_dict(module, random_variables(module, statistics={}))
    file = tmp_path / "net.safetensors"
    save_file(arrays, file)
    report = fzoo.inspect_weights(file)
    assert [(fit.model, dict(fit.options)) for fit in report.fits] == [
        (name, {"classes": 5}) for name in fzoo.list_models("ResNet18.*")
    ]
    assert report.calls[0] == f"fzoo.load('ResNet18.a1_in1k', weights={str(file)!r}, classes=5)"
    assert report.parameters == sum(array.size for array in arrays.values())
    code, _, errors = command_line("convert", file, tmp_path / "net.h5")
    assert code == 2 and len(errors) == 1 and "ResNet18.tv_in1k" in errors[0] and "name one" in errors[0]
    code, _, errors = command_line("convert", file, tmp_path / "net.h5", "--model", "ResNet18.tv_in1k", "--classes", 5)
    assert code == 0, errors
    loaded, found = fzoo.load(weights=tmp_path / "net.h5")
    assert loaded.tag == "tv_in1k" and loaded.classes == 5
    assert_equal(state_dict(loaded, found), arrays)
    code, _, errors = command_line("convert", tmp_path / "net.h5", tmp_path / "again.safetensors", "--layout", "timm")
    assert code == 0, errors
    with fzoo.open_weights(tmp_path / "again.safetensors") as again:
        assert_equal({name: np.asarray(array) for name, array in again.items()}, arrays)
    code, _, errors = command_line("convert", tmp_path / "net.h5", tmp_path / "no.h5", "--layout", "torch")
    assert code == 2 and "a name that ends in .safetensors expected" in errors[0]
    save_file({key: value for key, value in arrays.items() if not key.startswith("fc.")}, file)
    assert {str(fit.options) for fit in fzoo.inspect_weights(file).fits} == {"{'include_top': False}"}
    save_file({**arrays, "more": np.zeros(2, np.float32)}, file)
    assert fzoo.inspect_weights(file).fits == ()


def test_heads(tmp_path):
    """MobileNet's new head is the last layer of timm's, too; no library has MobileNetV3 without its hidden layer."""
    size = {"classes": 3, "input_shape": (32, 32, 3)}
    module = fzoo.create("MobileNet.ra4_e3600_r224_in1k", alpha=0.25, head=fzoo.Head(), **size)
    arrays = state_dict(module, random_variables(module, statistics={}))
    own = stored_arrays()["timm mobilenetv1_100"]
    assert arrays.keys() == own.keys() and arrays["classifier.weight"].shape == (3, 256)
    module = fzoo.create("MobileNetV3Small.lamb_in1k", alpha=0.5, head=fzoo.Head(), **size)
    with pytest.raises(
        ValueError, match="timm has no such MobileNetV3: neither timm's nor torchvision's names are known"
    ):
        fzoo.save_variables(module, random_variables(module, statistics={}), tmp_path / "x.safetensors", layout="timm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.wrong_types
def test_layouts(tmp_path):
    module, variables = small_torch_network(SMALL)
    with pytest.raises(ValueError, match=r"x\.h5: a name that ends in \.safetensors expected for layout='torch'"):
        fzoo.save_variables(module, variables, tmp_path / "x.h5", layout="torch")
    with pytest.raises(ValueError, match="unknown layout 'pytorch': did you mean torch"):
        fzoo.save_variables(module, variables, tmp_path / "x.safetensors", layout="pytorch")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files(tmp_path):
    module, variables = small_torch_network(SMALL)
    file = tmp_path / "x.safetensors"
    fzoo.save_variables(module, variables, file, layout="torch")
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"x\.safetensors is not a readable safetensors file") as error:
            fzoo.load("ResNet50.tv2_in1k", weights=file)
        assert "\n" not in str(error.value)
    for name in ("a.safetensors", "a.pth"):
        with pytest.raises(FileNotFoundError, match="no such weights file"):
            fzoo.load("ResNet50.tv2_in1k", weights=tmp_path / name)
        (tmp_path / name).mkdir()
        with pytest.raises(IsADirectoryError, match="is a directory"):
            fzoo.load("ResNet50.tv2_in1k", weights=tmp_path / name)


class Code:
    """What runs when it is unpickled without care."""

    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


@pytest.mark.slow
@needs_torch
def test_files_of_torch_save(tmp_path):
    """As training scripts write them; no code of them is run, and no object is made."""
    import torch

    module, variables = small_torch_network(SMALL)
    arrays = {key: torch.from_numpy(value) for key, value in state_dict(module, variables).items()}
    file, options = tmp_path / "x.pth", dict(CASES[SMALL].options) | {"input_shape": (64, 64, 3)}
    options |= {"classes": 7, "classifier_activation": None}
    prefixed = {f"module.{key}": value for key, value in arrays.items()}
    for content in (arrays, {"state_dict": arrays, "epoch": 3}, {"model": prefixed}, {"state_dict_ema": prefixed}):
        torch.save(content, file)
        _, found = fzoo.load("ResNet50.tv2_in1k", weights=file, **options)
        assert_equal(found, variables)
    torch.save(arrays, file, _use_new_zipfile_serialization=False)
    assert_equal(fzoo.load("ResNet50.tv2_in1k", weights=file, **options)[1], variables)
    whole = file.read_bytes()
    torch.save({key: value.half() for key, value in arrays.items()}, file)
    halved = fzoo.load("ResNet50.tv2_in1k", weights=file, **options)[1]
    assert_close(halved["params"]["conv1_conv"]["kernel"], variables["params"]["conv1_conv"]["kernel"], "", 1e-3)
    wrong = [
        ({"state_dict": arrays, "model": arrays}, "holds state_dict and model"),
        ({"epoch": 3}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        ({**arrays, "code": Code()}, "holds more than arrays"),
    ]
    for content, message in wrong:
        torch.save(content, file)
        with pytest.raises(ValueError, match=rf"x\.pth {message}") as error:
            fzoo.load("ResNet50.tv2_in1k", weights=file, **options)
        assert "\n" not in str(error.value)
    for content in (whole[: len(whole) // 2], b"", b"not torch's", pickle.dumps(Code())):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pth (is not a readable file of torch\.save|holds more)") as error:
            fzoo.load("ResNet50.tv2_in1k", weights=file, **options)
        assert "\n" not in str(error.value)


@pytest.mark.slow
@needs_torch
def test_torchvisions_files_are_known_by_their_names():
    """Address and figures; the first digits of the hash are in the name."""
    from torchvision import models

    for name in (name for name in TAGGED if fzoo.spec(name).weight_files[0].name.endswith(".pth")):
        record = fzoo.spec(name)
        (weights,) = (
            weights
            for weights in models.get_model_weights(TORCHVISION[timm_name(name)])
            if weights.url == record.weight_files[0].url
        )
        figures = weights.meta["_metrics"]["ImageNet-1K"]
        assert [record.top1, record.top5] == pytest.approx([figures["acc@1"] / 100, figures["acc@5"] / 100]), name
        made = weights.transforms()
        assert made.crop_size == [record.input_size] and made.interpolation.value == record.interpolation
        assert record.crop is not None and abs(record.input_size / record.crop - made.resize_size[0]) < 0.5, name


@pytest.mark.slow
@needs_torch
def test_a_file_of_torchvisions_is_downloaded(offline, monkeypatch, tmp_path):
    """By the digits of its name, for the network with the top and without; one with others is refused."""
    import torch

    name = "MobileNetV3Small.tv_in1k"
    module = fzoo.create(name)
    variables = random_variables(module, statistics={})
    (file,) = fzoo.spec(name).weight_files
    arrays = state_dict(module, variables, "torchvision")
    torch.save({key: torch.from_numpy(value) for key, value in arrays.items()}, tmp_path / file.name)
    monkeypatch.setenv("FZOO_WEIGHTS_URL", tmp_path.as_uri())
    with pytest.raises(OSError, match="its hash is not the published one"):
        fzoo.load(name)
    assert not (offline / file.name).exists()
    digits = hashlib.sha256((tmp_path / file.name).read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(file.__dict__, "hash", f"sha256:{digits}")
    assert_equal(fzoo.load(name)[1], variables)
    kept = fzoo.load(name, include_top=False)[1]
    assert_equal(kept, {part: {layer: variables[part][layer] for layer in kept[part]} for part in kept})


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_without_pytorch(tmp_path):
    """What is to be downloaded isn't, as it could not be read."""
    file = tmp_path / "x.pth"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModuleNotFoundError, match=re.escape("PyTorch is not installed: pip install 'fzoo[torch]'")):
        fzoo.load("ResNet50.tv2_in1k", weights=file)
    with pytest.raises(ModuleNotFoundError, match=re.escape("PyTorch is not installed: pip install 'fzoo[torch]'")):
        fzoo.load("MobileNetV2.tv_in1k")


@pytest.mark.slow
def test_a_licence_is_told_once(offline):
    """Where it forbids commercial use; the file is in the cache."""
    name, options = "ResNeXt50.fb_swsl_ig1b_ft_in1k", {"include_top": False}
    module = fzoo.create(name)
    arrays = state_dict(module, random_variables(module, statistics={}))
    (file,) = fzoo.spec(name).weight_files
    from safetensors.numpy import save_file

    save_file(arrays, offline / file.name)
    with pytest.warns(UserWarning, match=r"ResNeXt50\.fb_swsl_ig1b_ft_in1k are under CC BY-NC 4\.0, which forbids"):
        fzoo.load(name, **options)
    fzoo.load(name, **options)  # a warning would be an error
