"""The page that lists what is taken of Keras's layers; `python tests/test_keras_layers.py` writes it."""

from pathlib import Path

from fzoo.layers.rules import REFUSED, table

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "keras-layers.md"

HEAD = """# Keras's layers

What `fzoo.load_model` takes of a model that Keras saved, and what each option may be; an option that plays no part in
inference (an initializer, a regularizer, a seed) may be anything. Whatever else a file asks for is an error that names
the layer. Classes and options that older versions called otherwise (`nb_filter`, `border_mode`, `Merge`) are read as
today's, TensorFlow's operations between layers (`TFOpLambda`) as those of `keras.ops`. A model whose images have the
channels first (`channels_first`) takes them last, as every network here; a layer that can't be turned so is an error.
`python tests/test_keras_layers.py` writes this page.
"""


def rows(pairs: list[tuple[str, str]]) -> list[str]:
    return [f"| `{kind}` | {words.replace('|', ',')} |" for kind, words in pairs]


def page() -> str:
    taken = table()
    layers = [row for row in taken if not row[0].startswith("ops.")]
    operations = [(kind.removeprefix("ops."), words) for kind, words in taken if kind.startswith("ops.")]
    return "\n".join(
        [
            HEAD,
            "## Layers\n\n| class | options |\n|---|---|",
            *rows(layers),
            "\n## Operations\n\n| of `keras.ops` | arguments |\n|---|---|",
            *rows(operations),
            "\n## Not taken\n\n| class | why, and what would do |\n|---|---|",
            *rows(sorted(REFUSED.items())),
            "",
        ]
    )


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "python tests/test_keras_layers.py writes it"


if __name__ == "__main__":
    PAGE.write_text(page())
