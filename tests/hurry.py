"""How the tests compile: in a hurry, since how well XLA optimises is not theirs to say and would take most of the time.

Run as a program, it prints the flags for XLA_FLAGS: a jaxlib aborts a process that has one which it doesn't know.
"""

from fzoo.inference.compiler import YNN_FUSIONS, known_options

#: Quick to compile, in one piece for each program, and without the fusions that sum wrongly in jaxlib 0.10.2, in Keras
#: as well (jax issue 39103).
COMPILER_OPTIONS = known_options(
    {
        YNN_FUSIONS: "",
        "xla_backend_optimization_level": 0,
        "xla_cpu_parallel_codegen_split_count": 1,
        "xla_cpu_use_fusion_emitters": False,
        "xla_llvm_disable_expensive_passes": True,
    }
)

if __name__ == "__main__":
    print(*(f"--{name}={str(value).lower()}" for name, value in COMPILER_OPTIONS.items()))
