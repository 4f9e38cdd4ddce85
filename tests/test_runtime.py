"""Settings of a process, most in a process of their own."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from networks import images_for, network

import fzoo
from fzoo.inference import compiler
from fzoo.ops import processor
from fzoo.ops.processor import instruction_sets, processor_name

SCRIPT = """
import sys
import jax, numpy as np, fzoo
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
{setup}
module = fzoo.create("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
variables, images = fzoo.load_keras_weights(module, sys.argv[1]), np.load(sys.argv[2])
print(np.asarray(fzoo.predict(module, variables, images)).tobytes().hex())
print(found.count("/jax/compilation_cache/cache_hits"), found.count("/jax/compilation_cache/cache_misses"))
"""


@pytest.fixture(scope="module")
def alive(tmp_path_factory):
    """(a file of weights, one of images, what comes out)."""
    module, variables = network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))
    folder, images = tmp_path_factory.mktemp("runtime"), images_for(module, 2)
    fzoo.save_keras_weights(module, variables, folder / "weights.h5")
    np.save(folder / "images.npy", images)
    return folder / "weights.h5", folder / "images.npy", np.asarray(fzoo.predict(module, variables, images))


def run(setup, home, alive):
    """What comes out, and how often a compiled program was found, and not found, in the cache."""
    weights, images, expected = alive
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT.format(setup=setup), weights, images],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("JAX_")}, "XDG_CACHE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    result, counts = done.stdout.split("\n", 1)
    found = np.frombuffer(bytes.fromhex(result), np.float32).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    return result, *map(int, counts.split())


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path, alive):
    first, hits, misses = run("fzoo.enable_compilation_cache()", tmp_path, alive)
    assert hits == 0 and misses > 0
    assert any((tmp_path / "fzoo" / "xla").iterdir())
    second, hits, missed = run("fzoo.enable_compilation_cache()", tmp_path, alive)
    assert (hits, missed) == (misses, 0)
    assert second == first


@pytest.mark.slow
def test_the_library_caches_nothing_by_itself(tmp_path, alive):
    _, hits, misses = run("", tmp_path, alive)
    assert hits == misses == 0
    assert not any(tmp_path.iterdir())


@pytest.fixture
def restored(monkeypatch, tmp_path):
    """An empty cache of the user's, and JAX's settings as they were, afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("cache_dir", "min_compile_time_secs", "min_entry_size_bytes")
    names = [f"jax_compilation_{n}" if n == "cache_dir" else f"jax_persistent_cache_{n}" for n in names]
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_what_is_compiled_is_kept(tmp_path, restored):
    folder = fzoo.enable_compilation_cache()
    assert folder == tmp_path / "fzoo" / "xla" and not any(folder.iterdir())
    found = []
    for _ in range(2):
        assert float(jax.jit(lambda x: 3 * x + 1)(np.float32(2))) == 7
        found.append({path.name for path in folder.iterdir() if path.name.endswith("-cache")})
    assert len(found[0]) == 1 and found[1] == found[0]


def test_a_file_in_the_folder_s_place(tmp_path):
    path = tmp_path / "cache"
    path.write_text("")
    with pytest.raises(OSError, match="cache"):
        fzoo.enable_compilation_cache(path)


def test_instruction_sets(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : x\nflags : fpu avx2 fma avx512f avx512_vnni avx512vl\n" * 2)
    assert instruction_sets(path) == ("AVX2", "FMA", "AVX-512", "AVX-512 VNNI")
    path.write_text("Features : fp asimd sve bf16\n")
    assert instruction_sets(path) == ("NEON", "SVE", "NEON BF16")
    assert instruction_sets(tmp_path / "none") == ()


def test_the_processors_name(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : Some EPYC\nflags : avx2\n")
    assert processor_name(path) == "Some EPYC"
    assert processor_name(tmp_path / "none")  # what Python knows of it


@pytest.mark.parametrize(
    ("sets", "wide", "narrow"), [(("AVX2",), False, False), (("AVX-512", "AVX-512 BF16"), True, True)]
)
def test_what_follows_from_instruction_sets(monkeypatch, sets, wide, narrow):
    """Vectors of 512 bits are asked for where the processor has them at full speed."""
    monkeypatch.setattr(processor, "instruction_sets", lambda: sets)
    monkeypatch.setattr(compiler, "has_wide_vectors", processor.has_wide_vectors.__wrapped__)
    assert processor.has_wide_vectors.__wrapped__() is wide and processor.has_bfloat16() is narrow
    options = compiler.compiler_options.__wrapped__("cpu") or {}
    assert ("xla_cpu_prefer_vector_width" in options) is (wide and bool(compiler.known_options(compiler.VECTORS)))


def test_memory_is_kept_where_glibc_can():
    """Freed blocks over glibc's usual limit come back without a system call: the process does not shrink."""
    code = """
import resource, numpy as np, fzoo
took = fzoo.reuse_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(1 << 24, np.float32)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first, second = faults(), faults()
print(took, second < first / 10)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, kept = done.stdout.split()
    assert took == str(sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION") is not None)
    assert kept == took or took == "False"
