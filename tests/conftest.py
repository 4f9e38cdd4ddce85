"""Set up before anything imports Keras or JAX."""

import os
from pathlib import Path

import pytest

os.environ["KERAS_BACKEND"] = "jax"


@pytest.fixture
def real() -> Path:
    """A folder of real ImageNet weights and photographs, where there is one."""
    folder = os.environ.get("FZOO_TEST_WEIGHTS")
    if not folder:
        pytest.skip("FZOO_TEST_WEIGHTS names no folder of real weights")
    return Path(folder)


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """An empty cache; returns its folder of models."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.delenv("FZOO_TEST_WEIGHTS", raising=False)
    (tmp_path / "keras" / "models").mkdir(parents=True)
    return tmp_path / "keras" / "models"
