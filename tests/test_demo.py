"""The newcomer's path: real digits, trained, saved for Keras, read back by both."""

import builtins

import keras
import numpy as np
import pytest
from PIL import Image

import fzoo
from fzoo import demo


def test_demo(tmp_path):
    losses = []
    result = demo.run(tmp_path / "digits", report=lambda epoch, loss: losses.append(loss))
    assert result.accuracy >= 0.95
    assert len(losses) == 20 and losses[-1] < 0.3 < losses[0]

    keras.utils.clear_session()
    model = keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3), classes=10)
    model.load_weights(result.weights)
    digits = demo.load_digits()
    images = fzoo.preprocess_input(digits.test_images, "MobileNet")
    theirs = model.predict(images, verbose=0)
    assert np.mean(theirs.argmax(1) == digits.test_labels) == pytest.approx(result.accuracy)
    module, variables = fzoo.load("MobileNet", weights=result.weights, alpha=0.25, classes=10, input_shape=(32, 32, 3))
    np.testing.assert_allclose(fzoo.predict(module, variables, images), theirs, atol=1e-4)

    sheet = np.asarray(Image.open(result.picture))
    assert sheet.shape[1] > 600 and len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100
    assert len(result.examples) == 10 and all(path.is_file() for path in result.examples)


def test_a_missing_extra_names_the_command(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fzoo\[demo\]'"):
        demo.load_digits()
