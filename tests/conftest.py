"""Set up before anything imports Keras, JAX or fzoo."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import jaxtyping
import pytest
from compiled_once import shared_cache

os.environ["KERAS_BACKEND"] = "jax"

#: Files of tests, those first that take longest with the slow ones.
LONGEST = ("test_mutants.py", "test_models.py", "test_documentation.py", "test_keras_graphs.py", "test_options.py")

#: Bytes with which a worker is left as it is.
ENOUGH = 2.5e9


def pytest_configure(config):
    """For a worker: strictness; for all and the processes that they start: hurry, and a cache of the session's own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what runs in its background ignore it
    if not hasattr(config, "workerinput"):
        config.scratch = tempfile.mkdtemp(prefix="fzoo-tests-")
        os.environ["XDG_CACHE_HOME"] = os.environ["FZOO_TEST_SCRATCH"] = config.scratch
        os.environ["KERAS_HOME"] = f"{config.scratch}/keras"  # no test reads or fills the user's
        index = Path(os.environ.get("FZOO_TEST_WEIGHTS", "")) / "imagenet_class_index.json"
        if index.is_file():
            models = Path(config.scratch, "keras", "models")
            models.mkdir(parents=True)
            (models / index.name).symlink_to(index.absolute())
        os.environ |= shared_cache(os.environ.get("JAX_COMPILATION_CACHE_DIR", f"{config.scratch}/xla"))
        hurry = [sys.executable, str(Path(__file__).with_name("hurry.py"))]
        flags = os.environ.get("FZOO_TEST_FLAGS")  # mutants.py asks once
        flags = flags or subprocess.run(hurry, check=True, capture_output=True, text=True).stdout
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Every annotated shape and type of fzoo's functions is checked at each call; for mutants, whose processes are many,
    # the seconds that this adds to an import are too dear.
    if "FZOO_TEST_MUTANT" not in os.environ:
        import strict

        strict.install()


def pytest_unconfigure(config):
    """Remove the cache."""
    if hasattr(config, "scratch"):
        shutil.rmtree(config.scratch, ignore_errors=True)


def pytest_report_header():
    """Say what the sums rest on: see `fzoo.inference.compiler`."""
    code = "from fzoo.inference.compiler import sum_protection; print(sum_protection())"
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env).stdout
    return f"protection from the wrong sums of jax issue 39103: {said.strip()}"


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one; in a file, the tests of a network together."""

    def order(item) -> tuple[int, str, str]:
        file = item.path.name
        return LONGEST.index(file) if file in LONGEST else len(LONGEST), file, network_of(item)

    items.sort(key=order)


def pytest_collection_finish():
    """Keep the garbage collector off what was imported: it would walk through it, a third of a second each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_teardown(item, nextitem):
    """Forget what was compiled for a file that ends here, or for a network in a worker that has grown by gigabytes."""
    import jax

    same_file = nextitem is not None and item.path == nextitem.path
    if not same_file or (network_of(item) != network_of(nextitem) and resident_bytes() > ENOUGH):
        jax.clear_caches()
        gc.collect()


def network_of(item) -> str:
    """The name of the network that a test shares with others, if there is one."""
    return next((mark.args[0] for mark in item.iter_markers("network")), "")


def resident_bytes() -> float:
    """What this process holds in memory; without end where that can't be read."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("inf")
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def unchecked(request):
    """Tests marked as `wrong_types` hand these over on purpose, to see what fzoo itself says."""
    disabled = request.node.get_closest_marker("wrong_types") is not None
    jaxtyping.config.update("jaxtyping_disable", disabled)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def command_line(monkeypatch, capsys):
    """The command line in this process, without its settings of one: exit code, lines of output, lines of errors."""
    from fzoo.cli.loading import class_names
    from fzoo.cli.main import main
    from fzoo.inference import runtime

    monkeypatch.setattr(runtime, "reuse_memory", lambda: None)
    monkeypatch.setattr(runtime, "enable_compilation_cache", lambda: None)

    def run(*arguments) -> tuple[object, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["fzoo", *map(str, arguments)])
        class_names.cache_clear()  # a command has a process of its own, and another file may have the path
        handler = signal.getsignal(signal.SIGTERM)  # `fzoo bench` has its own
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        output, errors = capsys.readouterr()
        return ended.value.code, output.splitlines(), errors.splitlines()

    return run


@pytest.fixture
def compilations():
    """A list that grows with every program that XLA compiles."""
    import jax

    found = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


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
