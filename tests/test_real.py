"""Real ImageNet weights on real photographs; skipped where FZOO_TEST_WEIGHTS names no folder of them."""

import json

import pytest
from tiers import slow_but

import fzoo

MODELS = {
    "mobilenet_v2_imagenet.h5": ("MobileNetV2", {}, 224),
    "mobilenet_v1_0.5_160_imagenet.h5": ("MobileNet", {"alpha": 0.5}, 160),
}


@pytest.mark.parametrize("file", slow_but(MODELS, "mobilenet_v2_imagenet.h5"))
def test_top_3_is_what_keras_says(real, file):
    name, options, size = MODELS[file]
    module, variables = fzoo.load(name, weights=real / file, **options)
    expected = json.loads((real / "expected_top3.json").read_text())[file]
    assert len(expected) == 6
    for photo, wanted in expected.items():
        image = fzoo.load_image(real / photo, size)
        probabilities = fzoo.predict(module, variables, fzoo.preprocess_input(image[None], name))
        (found,) = fzoo.decode_predictions(probabilities, top=3)
        assert [each[:2] for each in found] == [tuple(each[:2]) for each in wanted], photo
        for (*_, ours), (*_, theirs) in zip(found, wanted, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4), photo


def test_the_top_can_be_left_out(real):
    module, variables = fzoo.load("MobileNetV2", weights=real / "mobilenet_v2_imagenet.h5", include_top=False)
    assert "predictions" not in variables["params"]
    image = fzoo.preprocess_input(fzoo.load_image(real / "photos/parrot.jpg", 224)[None], "MobileNetV2")
    assert fzoo.predict(module, variables, image).shape == (1, 7, 7, 1280)
