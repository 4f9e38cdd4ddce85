"""Set up before anything imports Keras or JAX."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest

os.environ["KERAS_BACKEND"] = "jax"

#: Compile in a hurry: how well XLA optimises is not ours to test, and would take most of the suite's time.
HURRY = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"
)


def pytest_configure(config):
    """For all workers and the processes that they start: a cache of their own; and except for `-m heavy`, hurry."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs in its background ignore it
    if hasattr(config, "workerinput"):
        return
    config.caches = os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    if config.option.markexpr == "not heavy":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {HURRY}".strip()


def pytest_unconfigure(config):
    """Remove the cache."""
    if hasattr(config, "caches"):
        shutil.rmtree(config.caches, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left with it."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


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
def command_line(monkeypatch, capsys):
    """The command line in this process, without its settings of one: exit code, lines of output, lines of errors."""
    from fzoo import cli

    monkeypatch.setattr(cli, "prepare_process", lambda cache: None)

    def run(*arguments) -> tuple[object, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["fzoo", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output, errors = capsys.readouterr()
        return ended.value.code, output.splitlines(), errors.splitlines()

    return run


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
