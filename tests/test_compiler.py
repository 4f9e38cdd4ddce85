"""What programs are compiled with: options by what this jaxlib knows, and sums that are right."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from fzoo.inference import compiler


def test_options_that_this_jaxlib_does_not_know():
    assert compiler.known_options({"xla_no_such_option": True}) == {}
    assert compiler.known_options({"xla_backend_optimization_level": 0}) == {"xla_backend_optimization_level": 0}
    with pytest.raises(jax.errors.JaxRuntimeError):  # a value that is none is another error
        compiler.is_known("xla_backend_optimization_level", "high")


def test_sums_are_right():
    """With what fzoo compiles with; where JAX's own options sum wrongly, that is what is said.

    In a process without the tests' own flags, which would hide what JAX does by itself.
    """
    code = """
from fzoo.inference.compiler import compiler_options, sum_protection, sums_rightly
print(sum_protection(), sums_rightly(None), sums_rightly(compiler_options("cpu")))
"""
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    protection, plain, ours = done.stdout.rsplit(" ", 2)
    assert ours.strip() == "True"
    assert (protection, plain) in (("in force", "False"), ("not needed", "True"))


@pytest.mark.parametrize("rightly", [True, False])
def test_a_jaxlib_without_the_option(monkeypatch, rightly):
    """It is not needed where sums are right; else nothing is computed."""
    compiler.compiler_options.cache_clear()
    compiler.sum_protection.cache_clear()
    monkeypatch.setattr(compiler, "known_options", lambda options: {})
    monkeypatch.setattr(compiler, "sums_rightly", lambda options: rightly)
    try:
        if rightly:
            assert compiler.compiler_options("cpu") is None and compiler.sum_protection() == "not needed"
        else:
            with pytest.raises(ImportError, match=r"jaxlib .* sums wrongly on a CPU \(jax issue 39103\)"):
                compiler.compiler_options("cpu")
    finally:
        compiler.compiler_options.cache_clear()
        compiler.sum_protection.cache_clear()


def test_other_platforms_and_bfloat16():
    assert compiler.compiler_options("cuda") is None
    options = compiler.compiler_options("cpu", jnp.dtype(jnp.bfloat16))
    assert options is None or options != compiler.compiler_options("cpu")
