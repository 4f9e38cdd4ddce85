"""Networks that Keras saved, whatever they are made of, beside Keras: the families, each layer, random graphs."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from networks import SMALL, assert_alive, random_variables, small_options
from reference import assert_close, keras_model, outputs, set_variables, small_keras_model

import fzoo
from fzoo.layers import Classifier
from networks import images_for


def families_model(name: str, options: dict) -> tuple[keras.Model, Classifier]:
    """A family's network as Keras builds it, alive, and fzoo's own by its name."""
    module = fzoo.create(name, **options)
    model = small_keras_model(name) if options else keras_model(name)
    return set_variables(model, random_variables(module)), module


def check_family(path, name: str, options: dict) -> None:
    """The file gives what Keras gives: its outputs, every layer, and the order of layers."""
    model, known = families_model(name, options)
    model.save(path)
    images = images_for(known)
    module, variables = fzoo.load_model(path)
    names = [layer.name for layer in model.layers]
    assert [layer for layer in fzoo.layer_names(module) if "/" not in layer] == names
    expected = outputs(model, images, names)
    assert_alive(expected[names[-1]])
    found = fzoo.features(module, variables, images, names)
    for layer in names:
        assert_close(found[layer], expected[layer], layer)
    assert_close(fzoo.predict(module, variables, images), expected[names[-1]], "predict")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_families(tmp_path, name):
    check_family(tmp_path / ("model.keras" if len(name) % 2 else "model.h5"), name, small_options(name))
