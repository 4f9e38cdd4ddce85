"""Where things are in fzoo: what may import what, how long a file is, and what users are promised."""

import ast
import graphlib
import inspect
import re
from pathlib import Path

import pytest

import fzoo

ROOT = Path(fzoo.__file__).parent

#: From the bottom up: a module imports from its own room and from those before it.
ROOMS = (
    "_version",
    "errors",
    "types",
    "files",
    "figures",
    "ops",
    "layers",
    "weights",
    "images",
    "models",
    "zoo",
    "pretrained",
    "recognition",
    "convert",
    "nnx",
    "inference",
    "training",
    "jobs",
    "bench",
    "apps",
    "cli",
)

#: What uses fzoo as its users do, by `import fzoo`.
USERS = ("bench", "apps.demo", "cli")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """Modules of fzoo that a file imports anywhere, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found & MODULES.keys()


IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def room(name: str) -> int:
    return ROOMS.index(name.split(".")[1])


@pytest.mark.parametrize("name", [name for name in MODULES if name != "fzoo"])
def test_imports_go_down(name):
    for other in IMPORTS[name]:
        if other == "fzoo":
            assert name.removeprefix("fzoo.").startswith(USERS), f"{name} imports fzoo as its users do"
        else:
            assert room(other) <= room(name), f"{name} imports {other}, which stands above it"


def test_no_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()


def test_no_file_is_long():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length >= 500} == {}


def signature(name: str) -> str:
    """A public name with its parameters and their defaults."""
    value = getattr(fzoo, name)
    if not callable(value):
        return name
    parameters = inspect.signature(value).parameters.values()
    text = str(inspect.Signature([each.replace(annotation=each.empty) for each in parameters]))
    return name + re.sub(" at 0x[0-9a-f]+", "", text)


PROMISED = Path(__file__).parent / "stored" / "api.txt"


def test_what_users_are_promised():
    """Names and signatures as they were; `python tests/test_layout.py` writes those that were added."""
    assert [signature(name) for name in sorted(fzoo.__all__)] == PROMISED.read_text().splitlines()


if __name__ == "__main__":
    PROMISED.write_text("".join(f"{signature(name)}\n" for name in sorted(fzoo.__all__)))
