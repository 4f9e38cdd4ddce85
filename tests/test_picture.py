"""Pictures of networks: the graph of blocks, and what is drawn."""

import sys
from collections import Counter
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from reference import FAMILIES, by_model

import fzoo
from fzoo.apps.blocks import blocks
from fzoo.apps.picture import FRAME, Box, draw, save_picture, text_width
from fzoo.layers.graph import trace


@pytest.mark.parametrize("name", by_model(FAMILIES, quick=("InceptionV3", "MobileNetV2", "NASNetMobile")))
def test_blocks(name, tmp_path):
    module = fzoo.create(name)
    found, made = trace(module), blocks(module)
    assert sorted(node.name for block in made for node in block.nodes) == sorted(node.name for node in found.nodes)
    owner = {node.name: block.name for block in made for node in block.nodes}
    readers = Counter(parent for node in found.nodes for parent in node.inputs)
    seen = set()
    for block in made:
        for before, node in pairwise(block.nodes):
            assert node.inputs == (before.name,) and readers[before.name] == 1
        edges = [parent for node in block.nodes for parent in node.inputs if owner[parent] != block.name]
        assert list(block.inputs) == edges and seen.issuperset(edges)
        seen.add(block.name)
    assert sum(block.parameters for block in made) == fzoo.spec(name).parameters
    units = [block.unit for block in made]
    assert len(set(units)) == 1 + sum(a != b for a, b in pairwise(units)) <= 100

    picture = draw(module, name)
    boxes = [mark for mark in picture.marks if isinstance(mark, Box) and mark.fill != FRAME]
    assert len(boxes) >= 5
    for box in boxes:
        assert box.x >= 0 and box.y >= 0
        assert box.x + box.width <= picture.width and box.y + box.height <= picture.height
    for a, b in combinations(boxes, 2):
        apart = a.x + a.width <= b.x or b.x + b.width <= a.x or a.y + a.height <= b.y or b.y + b.height <= a.y
        assert apart, f"{a} is over {b}"
    assert picture.width < 4000 and picture.height < 4000 and 0.5 < picture.width / picture.height < 3

    save_picture(module, tmp_path / "net.svg", name)
    svg = ElementTree.parse(tmp_path / "net.svg").getroot()
    words = [element.text or "" for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert words[-1] == name and any(units[0] in text for text in words)


def test_units_and_repeats():
    assert list(dict.fromkeys(block.unit for block in blocks(fzoo.create("VGG16")))) == [
        "input_layer",
        *(f"block{i}" for i in range(1, 6)),
        "fc1",
        "fc2",
        "predictions",
    ]
    module = fzoo.create("ResNet50")
    unit = [block for block in blocks(module) if block.unit == "conv3_block1"]
    assert [(block.name, block.inputs) for block in unit] == [
        ("conv3_block1_0_bn", ("conv2_block3_out",)),
        ("conv3_block1_3_bn", ("conv2_block3_out",)),
        ("conv3_block1_out", ("conv3_block1_0_bn", "conv3_block1_3_bn")),
    ]
    words = [mark.text for mark in draw(module).marks if hasattr(mark, "text")]
    assert "conv4_block2 ... conv4_block6   x 5" in words and "14 x 14 x 1024, 50 layers, 5,608,960 parameters" in words
    cells = [block.unit for block in blocks(fzoo.create("NASNetMobile"))]
    assert "normal_concat_3" in cells and max(Counter(cells).values()) < 30


def test_command(tmp_path, monkeypatch, command_line):
    monkeypatch.chdir(tmp_path)
    assert command_line("summary", "VGG16", "--picture", "net.png") == (0, ["net.png"], [])
    pixels = np.asarray(Image.open("net.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50 and pixels[0, 0].tolist() == [255, 255, 255]
    for name, message in (
        ("x.jpg", "x.jpg: a name that ends in .png or .svg expected"),
        ("no/x.svg", "no such directory"),
    ):
        code, output, (error,) = command_line("summary", "VGG16", "--picture", name)
        assert (code, output) == (2, []) and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["net.png"]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("igraph", "igraph lays the branches out: pip install 'fzoo[picture]'"),
        ("matplotlib", "the pictures are drawn by matplotlib: pip install 'fzoo[picture]'"),
    ],
)
def test_without_the_extra(tmp_path, monkeypatch, command_line, package, message):
    for module in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, module, None)
    text_width.cache_clear()
    path = tmp_path / "net.png"
    assert command_line("summary", "ResNet50", "--picture", path) == (2, [], [f"fzoo: error: {message}"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_network_gives_the_same_file(tmp_path):
    module = fzoo.create("MobileNet")
    for name in ("a.svg", "b.svg"):
        save_picture(module, tmp_path / name, "$x_1$")
    first, second = ((tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second and ">$x_1$<" in first  # a title is no formula
