"""Settings of a process, each in a process of its own."""

import os
import subprocess
import sys

import pytest

import fzoo

SCRIPT = """
import jax, numpy as np, fzoo
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
{setup}
module, variables = fzoo.load("MobileNet", weights=None, alpha=0.25, classes=3, input_shape=(32, 32, 3))
print(np.asarray(fzoo.predict(module, variables, np.ones((2, 32, 32, 3), np.float32))).tobytes().hex())
print(found.count("/jax/compilation_cache/cache_hits"), found.count("/jax/compilation_cache/cache_misses"))
"""


def run(setup, home):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT.format(setup=setup)],
        env={**os.environ, "XDG_CACHE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    result, counts = done.stdout.split("\n", 1)
    return result, *map(int, counts.split())


def test_a_second_process_compiles_nothing(tmp_path):
    first, hits, misses = run("fzoo.enable_compilation_cache()", tmp_path)
    assert hits == 0 and misses > 0
    assert any((tmp_path / "fzoo" / "xla").iterdir())
    second, hits, missed = run("fzoo.enable_compilation_cache()", tmp_path)
    assert (hits, missed) == (misses, 0)
    assert second == first


def test_the_library_caches_nothing_by_itself(tmp_path):
    _, hits, misses = run("", tmp_path)
    assert hits == misses == 0
    assert not any(tmp_path.iterdir())


def test_a_file_in_the_folder_s_place(tmp_path):
    path = tmp_path / "cache"
    path.write_text("")
    with pytest.raises(OSError, match="cache"):
        fzoo.enable_compilation_cache(path)


def test_instruction_sets(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nmodel name : x\nflags : fpu avx2 fma avx512f avx512_vnni avx512vl\n" * 2)
    assert fzoo.runtime.instruction_sets(path) == ("AVX2", "FMA", "AVX-512", "AVX-512 VNNI")
    path.write_text("Features : fp asimd sve bf16\n")
    assert fzoo.runtime.instruction_sets(path) == ("NEON", "SVE", "NEON BF16")
    assert fzoo.runtime.instruction_sets(tmp_path / "none") == ()


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
