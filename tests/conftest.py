"""Set up before anything imports Keras or JAX."""

import gc
import os
from pathlib import Path

import pytest

os.environ["KERAS_BACKEND"] = "jax"


def pytest_runtest_teardown(item, nextitem):
    """Forget what was compiled for a file or a group that ends here: a worker would grow by gigabytes."""
    import jax

    if nextitem is None or scope(item) != scope(nextitem):
        jax.clear_caches()
        gc.collect()


def scope(item) -> tuple[str, ...]:
    """Of tests that share networks."""
    return str(item.path), *(mark.args[0] for mark in item.iter_markers("xdist_group"))


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
