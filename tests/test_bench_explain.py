"""`fzoo bench --explain`: where the time of a network goes, and what OpenVINO takes for the same."""

import importlib.util
from datetime import timedelta
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from networks import network

from fzoo.bench import explain
from fzoo.bench.explain import HEADERS, explain_model, layer_times
from fzoo.inference import optimize, tuning


@pytest.fixture(autouse=True)
def hurry(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(optimize, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def small():
    return network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))


def node(name, kind, seconds):
    return SimpleNamespace(node_name=name, node_type=kind, exec_type="brgconv", real_time=timedelta(seconds=seconds))


def test_what_openvino_says_of_its_layers():
    """Its convolutions and products that took any time, by the layer that fzoo's ONNX file names them after."""
    nodes = [
        node("images", "Parameter", 0.0),
        node("conv1_bn/Mul", "Convolution", 0.002),
        node("3:net/conv_dw_1/Conv", "GroupConvolution", 0.001),
        node("conv_pw_1/Conv", "Convolution", 0.0),
        node("conv1_relu/Clip", "Clamp", 0.001),
    ]
    found = {layer: (time.seconds, time.kernel) for layer, time in layer_times(nodes)}
    assert found == {"conv1_bn": (0.002, "brgconv"), "net/conv_dw_1": (0.001, "brgconv")}


@pytest.mark.slow
def test_times_of_both_are_put_together(small, monkeypatch):
    """OpenVINO calls a convolution as the BN that is folded into it; the mean of the layers of a shape counts."""
    theirs = {
        "conv1_bn": explain.LayerTime(0.5, "stem"),
        "conv_pw_8_bn": explain.LayerTime(1.0, "product"),
        "conv_pw_9_bn": explain.LayerTime(2.0, "product"),
    }
    asked = []
    monkeypatch.setattr(explain, "time_openvino", lambda *arguments: asked.append(arguments[2:]) or theirs)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    tuned, rows = explain_model(*small, images, "float32")
    assert asked == [((2, 32, 32, 3), "f32")]
    by_layer = {row.choice.layers[0]: row for row in rows}
    assert by_layer["conv1"].seconds == 0.5 and by_layer["conv1"].kernel == "stem"
    [repeated] = [row for row in rows if "conv_pw_8" in row.choice.layers]
    assert repeated.seconds == 1.5 and "conv_pw_9" in repeated.choice.layers
    cells = by_layer["conv1"].cells()
    assert len(cells) == len(HEADERS) and cells[5:] == ("500.00", "0", "stem")
    assert by_layer["conv_dw_1"].cells()[5:] == ("-", "-", "-")
    assert tuned.images == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_openvino_itself(small, dtype):
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    _, rows = explain_model(*small, images, dtype)
    assert sum(row.seconds is not None and row.seconds > 0 and row.kernel != "" for row in rows) > len(rows) / 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "--explain"], "--explain given: one MODEL"),
        (["bench", "MobileNet", "VGG16", "--explain"], "--explain given: one MODEL"),
        (["bench", "MobileNet", "--explain", "--batch", "1", "--batch", "2"], "--explain given: one MODEL"),
        (["bench", "MobileNet", "--explain", "--engine", "fzoo"], "--explain given with --engine: one MODEL"),
        (["bench", "MobileNet", "--explain", "--task", "train"], "--explain given: one MODEL"),
        (["bench", "MobileNet", "--explain", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["tune", "MobileNet", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["tune", "Nothing"], "unknown model 'Nothing'"),
        (["tune", "MobileNet", "--size", "8"], "32 x 32 is the least"),
    ],
)
def test_what_can_not_be(words, said, command_line):
    code, _, errors = command_line(*words)
    assert code == 2 and len(errors) == 1 and said in errors[0]
