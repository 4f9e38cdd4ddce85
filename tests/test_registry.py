"""The records of the models, and what `create` refuses."""

import dataclasses
import importlib
import inspect
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from reference import CASES, FAMILIES, build
from tiers import slow

import fzoo
from fzoo import models
from fzoo.pretrained.imagenet import needed, published
from fzoo.zoo import collect_variants


def test_list_models():
    assert fzoo.list_models("resnet50*", tagged=False) == ["ResNet50", "ResNet50V2"]
    assert fzoo.list_models("ResNet50.tv*") == ["ResNet50.tv2_in1k", "ResNet50.tv_in1k"]
    assert "ResNet50.tv2_in1k" in fzoo.list_models("resnet50*", tagged=True) and "ResNet50" in fzoo.list_models()
    assert fzoo.list_models("*Net*121") == ["DenseNet121"]
    assert sorted(fzoo.list_models(tagged=False) + fzoo.list_models(tagged=True)) == fzoo.list_models()
    assert fzoo.list_models("nothing*") == []
    assert fzoo.list_models() == sorted(fzoo.list_models())
    theirs = [name for name, value in vars(keras.applications).items() if inspect.isfunction(value)]
    assert set(theirs) <= set(fzoo.list_models())  # all forty of Keras 3.15, and whatever a later one adds
    assert set(theirs) == set(CASES)


@pytest.mark.parametrize("name", fzoo.list_models(tagged=False))
def test_a_variant_is_in_its_familys_file(name):
    """By its own name; where the family's class has that name, with "Spec" after it."""
    record = fzoo.spec(name)
    file = inspect.getmodule(record.family)
    attribute = f"{name}Spec" if record.family.__name__ == name else name
    assert getattr(file, attribute) is record
    assert [key for key, value in vars(file).items() if value is record] == [attribute]


def test_no_two_variants_have_a_name(tmp_path, monkeypatch):
    (tmp_path / "twins").mkdir()
    (tmp_path / "twins" / "__init__.py").touch()
    (tmp_path / "twins" / "a.py").write_text("from fzoo.models.vgg import VGG16\n")
    monkeypatch.syspath_prepend(tmp_path)
    twins = importlib.import_module("twins")
    assert collect_variants(twins) == {"VGG16": models.vgg.VGG16}  # one, wherever it is imported
    (tmp_path / "twins" / "b.py").write_text(
        "import dataclasses\nfrom fzoo.models.vgg import VGG19\nother = dataclasses.replace(VGG19, name='VGG16')\n"
    )
    with pytest.raises(ValueError, match=r"two models are called VGG16, the second in twins\.b"):
        collect_variants(twins)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_option_says_what_it_has_to_be(name):
    """But for those that no single check can tell."""
    unchecked = {field.name for field in dataclasses.fields(fzoo.create(name)) if "check" not in field.metadata}
    flaxs = {"parent", "name"}
    assert unchecked == {"classifier_activation", "input_shape", "prepared"} | flaxs


@pytest.mark.parametrize("name", CASES)
def test_records_are_kerass(name):
    """Least size, and the URLs and hashes of the files, against the source of Keras's constructor."""
    spec = fzoo.spec(name)
    module = inspect.getmodule(inspect.unwrap(getattr(keras.applications, name)))
    assert module is not None
    source = inspect.getsource(module) + (inspect.getsource(module.resnet) if hasattr(module, "resnet") else "")
    joined = re.sub(r'"\s*\n?\s*f?"', "", source)  # strings that are split over lines
    assert f"min_size={spec.min_size}" in joined or f"rows < {spec.min_size}" in joined
    for file in spec.weight_files:
        assert file.url.rsplit("/", 1)[0] + "/" in joined
        assert file.hash is None or file.hash.split(":")[1] in joined
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.top1 = 1.0
    assert {file.include_top for file in spec.weight_files} == {True, False}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MobileNet", {"alpha": 0.5, "input_shape": (160, 160, 3)}),
        slow("MobileNet", {"alpha": 1.0, "include_top": False, "input_shape": (100, 128, 3)}),
        slow("MobileNetV2", {"alpha": 1.4}),
        ("MobileNetV2", {"alpha": 0.35, "include_top": False, "input_shape": (96, 96, 3)}),
        slow("NASNetMobile", {}),
        ("VGG16", {"include_top": False, "pooling": "max"}),
        slow("MobileNetV3Large", {"input_shape": (224, 224, 3)}),
        ("MobileNetV3Large", {"alpha": 0.75, "include_top": False, "input_shape": (224, 224, 3)}),
        slow("MobileNetV3Small", {"minimalistic": True, "include_preprocessing": False, "input_shape": (224, 224, 3)}),
        ("EfficientNetB0", {}),
        slow("EfficientNetB7", {"include_top": False}),
        slow("EfficientNetV2S", {}),
        slow("EfficientNetV2B3", {"include_top": False, "pooling": "avg"}),
        slow("ConvNeXtXLarge", {}),
        ("ConvNeXtTiny", {"include_top": False}),
        slow("ResNet152V2", {}),
    ],
)
def test_the_file_is_the_one_keras_asks_for(name, options, monkeypatch):
    """Keras's constructor is run up to the point where it downloads."""

    class Asked(Exception):
        pass

    def get_file(fname, origin, **kwargs):
        raise Asked(fname, origin, kwargs.get("file_hash"))

    monkeypatch.setattr("keras.src.utils.file_utils.get_file", get_file)
    square = options.get("input_shape", (1, 1))
    with pytest.raises(Asked) as asked:
        if square[0] == square[1]:
            build(getattr(keras.applications, name), weights="imagenet", **options)
        else:
            with pytest.warns(match="non-square"):
                build(getattr(keras.applications, name), weights="imagenet", **options)
    file = published(name, fzoo.create(name, **needed(name), **options))
    assert (file.name, file.url, file.hash and file.hash.split(":")[1]) == asked.value.args


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("VGG61", {}, "unknown model 'VGG61': did you mean VGG"),
        ("resnet50", {}, "ResNet50"),
        ("VGG16", {"alfa": 1}, "unknown option of VGG16 'alfa'"),
        ("Xception", {"alpha": 1}, "none beyond those of every model"),
        ("MobileNet", {"alpha": 0}, "alpha=0"),
        ("MobileNet", {"alpha": 0.01}, "1/32"),
        ("MobileNet", {"alpha": "x"}, "alpha='x'"),
        ("MobileNet", {"depth_multiplier": 1.5}, "depth_multiplier=1.5"),
        ("MobileNet", {"dropout": 2}, "dropout=2"),
        ("MobileNetV2", {"alpha": -1}, "alpha=-1"),
        ("VGG16", {"convs": (2, 2)}, "5 positive integers"),
        ("ResNet50", {"blocks": (3, 4, 6, 0)}, "4 positive integers"),
        ("NASNetMobile", {"filter_multiplier": 0}, "filter_multiplier=0"),
        ("NASNetMobile", {"default_size": 16}, "default_size=16"),
        ("VGG16", {"include_top": "no"}, "include_top='no'"),
        ("VGG16", {"classes": True}, "classes=True"),
        ("VGG16", {"classifier_activation": []}, "unknown activation"),
        ("VGG16", {"dtype": "foo"}, "dtype='foo'"),
        ("VGG16", {"dtype": jnp.int32}, "floating dtype"),
        ("VGG16", {"input_shape": 224}, "input_shape=224"),
        ("VGG16", {"input_shape": (32, 32, 0)}, "height, width, channels"),
        ("MobileNet", {"alfa": 1}, "did you mean alpha"),
        ("VGG16", {"pooling": "avg"}, "include_top=False"),
        ("VGG16", {"include_top": False, "pooling": "mean"}, "pooling='mean'"),
        ("VGG16", {"include_top": False, "classes": 10}, "classes=10"),
        ("VGG16", {"classes": 0}, "classes=0"),
        ("VGG16", {"classifier_activation": "softmaks"}, "did you mean softmax"),
        ("VGG16", {"input_shape": (31, 32, 3)}, "32 x 32"),
        ("VGG16", {"input_shape": (None, None, 3)}, "fixed size"),
        ("VGG16", {"input_shape": (224, 224)}, "height, width, channels"),
        ("Xception", {"input_shape": (70, 71, 3)}, "71 x 71"),
        ("InceptionV3", {"input_shape": (74, 75, 3)}, "75 x 75"),
        ("NASNetLarge", {"penultimate_filters": 100}, "multiple of 96"),
        ("ConvNeXtTiny", {"layer_scale_init_value": 0}, "a positive number or None"),
        ("ConvNeXtTiny", {"depths": (3, 3, 9)}, "4 positive integers"),
        ("ConvNeXtTiny", {"prefix": None}, "prefix=None given, a name"),
        ("ConvNeXtTiny", {"drop_path_rate": 1}, "drop_path_rate=1 given, a rate"),
        ("MobileNetV3Small", {"blocks": ((1, 16, 3, 2, True, False),)}, "a tuple of Block"),
        ("MobileNetV3Small", {"minimalistic": 1}, "minimalistic=1 given, True or False"),
        ("VGG16", {"head": "dense"}, "a fzoo.Head or None"),
    ],
)
@pytest.mark.wrong_types
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message) as error:
        fzoo.create(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MobileNet", {"alpha": 0.3}, "Keras published alpha=1.0"),
        ("MobileNet", {"depth_multiplier": 2}, "depth_multiplier=2"),
        ("NASNetMobile", {"num_blocks": 3}, "num_blocks=4"),
        ("VGG16", {"classes": 10}, "1000 classes"),
        ("VGG16", {"include_top": False, "input_shape": (64, 64, 1)}, "3 channels"),
        ("VGG16", {"input_shape": (64, 64, 3)}, "224 x 224, 64 x 64 given"),
        ("VGG16", {"weights": 123}, "weights=123"),
        ("VGG16", {"weights": ""}, "weights=''"),
        ("VGG16", {"weights": None, "rng": 0}, "rng=0"),
    ],
)
@pytest.mark.wrong_types
def test_no_published_weights_for_these(name, options, message):
    with pytest.raises(ValueError, match=message):
        fzoo.load(name, **options)


@pytest.mark.wrong_types  # lists will do for tuples
def test_modules_are_values():
    assert fzoo.create("ResNet50") == fzoo.create("ResNet50")
    assert hash(fzoo.create("ResNet50")) == hash(fzoo.create("ResNet50"))
    assert fzoo.create("ResNet50") != fzoo.create("ResNet50", classes=10)
    assert hash(fzoo.create("ResNet50", blocks=[3, 4, 6, 3])) == hash(fzoo.create("ResNet50"))
    assert isinstance(hash(fzoo.spec("ResNet50")), int)
    assert isinstance(fzoo.create("ResNet50", input_shape=[64, 64, 3], dtype=jnp.bfloat16), nn.Module)


def test_rng_goes_with_random_weights(tmp_path):
    with pytest.raises(ValueError, match="rng goes with weights=None"):
        fzoo.load("VGG16", rng=jax.random.key(0))


def test_layer_index_is_kerass():
    """The classic recipe freezes InceptionV3 below index 249, and knows the blocks by name."""
    names = fzoo.layer_names(fzoo.create("InceptionV3"))
    assert names.index("mixed7") == 228 and names.index("mixed8") == 248
    assert fzoo.layer_names(fzoo.create("VGG19", include_top=False))[0] == "input_layer"


@pytest.mark.parametrize("from_layer", ["mixed8", 248])
def test_trainable_mask_from_a_layer(from_layer):
    module, variables = fzoo.load("InceptionV3", weights=None, include_top=False, input_shape=(75, 75, 3))
    names = fzoo.layer_names(module)
    for mask in (
        fzoo.trainable_mask(variables, from_layer=from_layer),
        fzoo.trainable_mask(variables, from_layer=from_layer, module=module),
    ):
        assert jax.tree.structure(mask) == jax.tree.structure(variables)
        for layer, arrays in mask["params"].items():
            assert set(jax.tree.leaves(arrays)) == {names.index(layer) >= 248}
        assert not any(jax.tree.leaves(mask["batch_stats"]))
    assert fzoo.trainable_mask(variables["params"], from_layer=from_layer) == mask["params"]


@pytest.mark.wrong_types
def test_trainable_mask_by_pattern():
    params = {"conv1": {"kernel": np.ones(2)}, "conv2": {"kernel": np.ones(2)}, "fc": {"kernel": np.ones(2)}}
    assert fzoo.trainable_mask(params, pattern="conv*")["fc"] == {"kernel": False}
    assert all(jax.tree.leaves(fzoo.trainable_mask(params)))
    with pytest.raises(ValueError, match="pattern 'conf"):
        fzoo.trainable_mask(params, pattern="conf*")
    with pytest.raises(ValueError, match="pass module="):
        fzoo.trainable_mask(params, from_layer="fc")
    _, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, input_shape=(32, 32, 3))
    with pytest.raises(ValueError, match="did you mean conv_pw_9"):
        fzoo.trainable_mask(variables, from_layer="conv_pw_99")
    with pytest.raises(ValueError, match="not the variables of this VGG"):
        fzoo.trainable_mask(variables, from_layer="fc1", module=fzoo.create("VGG16"))
    with pytest.raises(ValueError, match="from_layer=900"):
        fzoo.trainable_mask(variables, from_layer=np.int64(900))
    mask = fzoo.trainable_mask(variables, from_layer="conv_pw_13", pattern="*_bn")["params"]
    assert [layer for layer in mask if any(jax.tree.leaves(mask[layer]))] == ["conv_pw_13_bn"]
