"""Networks that Keras saved, whatever they are made of, beside Keras: the families, each layer, random graphs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from networks import SMALL, assert_alive, images_for, random_variables, small_options
from reference import CASES, assert_close, build, outputs, set_variables, small_keras_model

import fzoo


def check_family(path, name: str, options: dict[str, Any], truth: bool) -> None:
    """The file gives what the network by its name gives, or Keras in `truth`: outputs, every layer, their order."""
    known = fzoo.create(name, **options)
    arrays = random_variables(known)
    model = set_variables(small_keras_model(name) if options else build(getattr(keras.applications, name)), arrays)
    model.save(path)
    images = images_for(known)
    module, variables = fzoo.load_model(path)
    names = [layer.name for layer in model.layers]
    assert [layer for layer in fzoo.layer_names(module) if "/" not in layer] == names
    expected = outputs(model, images, names) if truth else fzoo.features(known, arrays, images, names)
    assert_alive(expected[names[-1]])
    found = fzoo.features(module, variables, images, names)
    for layer in names:
        assert_close(found[layer], np.asarray(expected[layer]), layer)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_families(tmp_path, name):
    check_family(tmp_path / ("model.keras" if len(name) % 2 else "model.h5"), name, small_options(name), False)


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".keras", ".h5"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_all_forty(tmp_path, name, ending):
    check_family(tmp_path / f"model{ending}", name, {}, True)
