"""Forms of convolutions that were timed: whatever is chosen computes the same, is kept, and is what runs."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import assert_alive, images_for, network, random_images, small_options
from reference import assert_close
from tiers import slow_but

import fzoo
from fzoo import ops
from fzoo.inference import optimize, tuning
from fzoo.inference.batches import for_devices, run
from fzoo.inference.compiler import fusion_choices
from fzoo.inference.tuning import PREPARED, TimesFile, candidates_of, fastest, times_path, untimed_form
from fzoo.layers.graph import trace
from fzoo.ops.onednn import Uncached
from fzoo.ops.platforms import traced_for


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Keep the times of a test to itself, in a user's cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def small():
    return network("MobileNet", alpha=0.25, classes=5, input_shape=(32, 32, 3))


@pytest.fixture
def choose(monkeypatch):
    """Return what has made-up times taken: `pick(conv, forms)` is the fastest form, tuned beats untuned."""

    def choose(pick, fusions="nothing"):
        def times(conv, candidates):
            wanted = pick(conv, list(candidates))
            seconds = {form: 1.0 if form == wanted else 2.0 for form in candidates}
            of = [1.0 if each == fusions else 5.0 for each in fusion_choices()]
            return [{form: s * factor for form, s in seconds.items()} for factor in of]

        def networks(ways, shape):
            return {name: 1.0 if name == fusions else 2.0 for name in ways}

        monkeypatch.setattr(tuning, "time_forms", times)
        monkeypatch.setattr(optimize, "time_networks", networks)

    return choose


def any_other(conv, forms):
    """Pick one of the forms that an untuned network does not take, the same for equal shapes."""
    others = [form for form in forms if form not in (untimed_form(conv, True), untimed_form(conv, False))]
    return others[zlib.crc32(repr(conv).encode()) % len(others)] if others else forms[0]


CONVOLUTIONS = [
    ((2, 9, 11, 8), (3, 3, 8, 12), (1, 1), "SAME", 1),
    ((2, 9, 11, 8), (3, 3, 8, 12), (2, 2), "SAME", 1),
    ((1, 12, 12, 6), (5, 5, 6, 4), (1, 1), "VALID", 1),
    ((1, 9, 9, 6), (1, 7, 6, 5), (1, 1), "SAME", 1),
    ((2, 8, 8, 16), (1, 1, 16, 8), (1, 1), "SAME", 1),
    ((2, 8, 8, 16), (1, 1, 16, 8), (2, 2), "VALID", 1),
    ((2, 8, 8, 16), (3, 3, 1, 16), (2, 2), "SAME", 16),
    ((2, 8, 8, 16), (3, 3, 4, 8), (1, 1), "SAME", 4),
    ((2, 16, 16, 3), (7, 7, 3, 8), (2, 2), ((3, 3), (3, 3)), 1),
]


@pytest.mark.parametrize("shapes", CONVOLUTIONS, ids=lambda shapes: "-".join(map(str, shapes[1:4])))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_every_candidate_computes_the_convolution(shapes, dtype):
    conv = ops.Convolution.of(*shapes, dtype=dtype)
    images = jnp.asarray(random_images(shapes[0]), dtype)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=shapes[1]), dtype)
    found = candidates_of(conv, kept=True)
    expected = np.asarray(found[ops.LIBRARY](images, kernel), np.float32)
    for form, function in found.items():
        own = kernel
        if form.startswith(PREPARED):
            own = ops.winograd_kernel(np.asarray(kernel, np.float32), int(form.removeprefix(PREPARED)))
        with traced_for("cpu"):
            y = np.asarray(jax.jit(function)(images, own), np.float32)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(y / scale, expected / scale, atol=1e-5 if dtype == jnp.float32 else 1e-2)
    assert len(found) > 1
    assert untimed_form(conv, True) in found and untimed_form(conv, False) in found


@pytest.mark.parametrize(
    "name",
    slow_but(["ResNet50", "Xception", "ConvNeXtTiny", "EfficientNetB0"], "ResNet50"),
)
def test_other_forms_give_the_same(choose, name):
    """Each convolution, the parts of separable ones and of a Sequential too, in a form that is not taken untuned."""
    module, variables = network(name, **small_options(name))
    images = images_for(module, 2)
    expected = np.asarray(module.apply(variables, images))
    assert_alive(expected)
    choose(any_other, "products")
    tuned, left = fzoo.tune(module, variables, images)
    assert tuned.prepared.fusions == "products"
    assert_close(fzoo.predict(tuned, left, images), expected, name)
    every = {
        name for layers in tuning.convolutions_of(trace(module).nodes, 2, "float32").values() for name, _ in layers
    }
    assert every == set(dict(tuned.prepared.forms)) | set(dict(tuned.prepared.tiles))
    weights = [node for node in trace(module).nodes if "Conv2D" in node.kind]
    assert {name.partition("/")[0] for name in every} >= {node.name for node in weights}


def test_the_forms_are_what_runs(choose, small):
    """With XLA's own for each, all of them are in the program of a CPU; in the usual forms, few or none."""
    module, variables = small
    images = images_for(module, 2)

    def convolutions(network, variables):
        with traced_for("cpu"):
            return str(jax.make_jaxpr(network.apply)(variables, images)).count("conv_general_dilated[")

    choose(lambda conv, forms: ops.LIBRARY)
    tuned = fzoo.tune(module, variables, images)
    assert len(tuned[0].prepared.forms) == 28
    untuned = fzoo.optimize_for_inference(module, variables)
    assert convolutions(*tuned) >= 20 > 2 > convolutions(*untuned)  # equal ones are traced once
    stem = [form for layer, form in tuned[0].prepared.forms if layer == "conv1"]
    assert stem == [ops.LIBRARY]


def test_what_ynnpack_gets(choose, small):
    """What was found is what the network is compiled with, by `predict` as by what times it."""
    module, variables = small
    images = jnp.asarray(images_for(module, 2))
    if fusion_choices() == ("nothing",):
        pytest.skip("this jaxlib hands nothing to YNNPACK")
    texts = {}
    for fusions in ("nothing", "products"):
        choose(lambda conv, forms: "product" if "product" in forms else forms[0], fusions)
        tuned, left = fzoo.tune(module, variables, images)
        call: Any = for_devices(run, tuned, left, images, None)[0]
        call = call.jitted if isinstance(call, Uncached) else call
        before = call._cache_size()
        texts[fusions] = call.lower(tuned, None, left, images).compile().as_text()
        fzoo.predict(tuned, left, images)
        assert call._cache_size() == before + 1  # predict runs this very program
        times_path().unlink()
    assert texts["products"].count("ynn_fusion") > 5 > texts["nothing"].count("ynn_fusion") == 0


def test_it_times_what_there_is_once(small, monkeypatch):
    """Really: a form for every convolution, the times in a file, and none is taken a second time."""
    module, variables = small
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(optimize, "SECONDS", 0.0)
    lines = []
    tuned, left = fzoo.tune(module, variables, images, progress=lines.append)
    assert lines[-1] == "the network as a whole" and len(lines) == 1 + len(
        tuning.convolutions_of(trace(module).nodes, 4, "float32")
    )
    known = TimesFile(times_path()).read()
    assert all(0 < seconds < 60 for times in known.values() for seconds in times.values())
    images = random_images((3, 32, 32, 3))
    assert_close(fzoo.predict(tuned, left, images), np.asarray(module.apply(variables, images)), "tuned")

    def never(*_):
        raise AssertionError("timed again")

    monkeypatch.setattr(tuning, "time_forms", never)
    monkeypatch.setattr(optimize, "time_networks", never)
    again, _ = fzoo.tune(module, variables, random_images((4, 32, 32, 3)))
    assert again == tuned and hash(again) == hash(tuned)
    default, _ = fzoo.optimize_for_inference(module, variables, tune=True)  # four images of its own size, too
    assert default == tuned
    with pytest.raises(AssertionError, match="timed again"):
        fzoo.tune(module, variables, random_images((1, 32, 32, 3)))  # of another shape
    with pytest.raises(AssertionError, match="timed again"):
        fzoo.tune(module, variables, random_images((4, 32, 32, 3)), dtype=jnp.bfloat16)


def test_it_is_never_the_slower_one(small, monkeypatch):
    """Where the network as a whole is no faster, or within noise, it stays as it would be."""
    module, variables = small
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    seconds = lambda conv, candidates: [dict.fromkeys(candidates, 1.0) for _ in fusion_choices()]  # noqa: E731
    monkeypatch.setattr(tuning, "time_forms", seconds)
    monkeypatch.setattr(
        optimize,
        "time_networks",
        lambda ways, shape: {name: 1.0 if name == optimize.UNTUNED else 0.99 for name in ways},
    )
    assert fzoo.tune(module, variables, images)[0] == fzoo.optimize_for_inference(module, variables)[0]


def test_fastest():
    assert fastest({"a": 1.0, "b": 2.0}, "b") == "a"
    assert fastest({"a": 0.98, "b": 1.0}, "b") == "b"
    assert fastest({"a": 0.9, "b": 1.0}, "b") == "a"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": 1}', '{"format": 99, "seconds": {}}', '{"format": 1, "seconds": {"a": {"b": "x"}}}']
)
def test_a_damaged_file_of_times_is_written_anew(text):
    path = times_path()
    path.parent.mkdir(parents=True)
    path.write_text(text)
    file = TimesFile(path)
    assert file.read() == {}
    file.add({"conv": {"library": 0.5}})
    file.add({"conv": {"product": 0.25}, "other": {"library": 1.0}})
    assert file.read() == {"conv": {"library": 0.5, "product": 0.25}, "other": {"library": 1.0}}
    assert json.loads(path.read_text())["format"] == tuning.FORMAT
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_no_times_are_lost_between_processes():
    """Several that add to a file at once: threads here, whose locks are as those of processes."""
    path = times_path()
    together = threading.Barrier(8)

    def add(number):
        together.wait()
        for i in range(6):
            TimesFile(path).add({f"{number} {i}": {"library": 1.0}})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert set(TimesFile(path).read()) == {f"{number} {i}" for number in range(8) for i in range(6)}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_bfloat16_without_units_is_said(choose, small, monkeypatch):
    """As `optimize_for_inference` says it."""
    monkeypatch.setattr(optimize.sys, "platform", "linux")
    choose(lambda conv, forms: ops.LIBRARY)
    for units in (False, True):
        monkeypatch.setattr(optimize, "has_bfloat16", lambda units=units: units)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fzoo.tune(*small, images_for(small[0], 2), dtype=jnp.bfloat16)
        assert [str(each.message)[:18] for each in caught] == ["bfloat16 asked for"] * (not units)


def test_a_choice_goes_with_the_weights(choose, small, tmp_path):
    """Through a file, and into an untuned network of the same arrays; a file from before has none."""
    module, variables = small
    images = images_for(module, 2)
    choose(lambda conv, forms: ops.LIBRARY, "products")
    tuned, left = fzoo.tune(module, variables, images)
    fzoo.save_variables(tuned, left, tmp_path / "tuned.safetensors")
    again, arrays = fzoo.load(weights=tmp_path / "tuned.safetensors")
    assert again.prepared == tuned.prepared
    assert_close(fzoo.predict(again, arrays, images), np.asarray(module.apply(variables, images)), "from the file")
    untuned = tuned.clone(prepared=dataclasses.replace(tuned.prepared, forms=(), fusions=None))
    loaded = fzoo.load_variables(untuned, tmp_path / "tuned.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded, left)


def test_a_choice_that_is_none_here(small):
    """Forms of a later fzoo, of another shape, and what another jaxlib's YNNPACK is given: as usual."""
    module, variables = small
    fast, left = fzoo.optimize_for_inference(module, variables)
    forms = (("conv1", "a later form"), ("conv_pw_1", "shifted"), ("conv_dw_1", "product"))
    strange = fast.clone(prepared=dataclasses.replace(fast.prepared, forms=forms, fusions="everything"))
    images = images_for(module, 2)
    np.testing.assert_array_equal(fzoo.predict(strange, left, images), fzoo.predict(fast, left, images))


@pytest.mark.parametrize(
    ("change", "images", "said"),
    [
        ({"plain_convolutions": True}, (1, 32, 32, 3), "plain_convolutions=True given, which leaves nothing to tune"),
        ({}, (0, 32, 32, 3), r"images of shape \(0, 32, 32, 3\) given, one at the least expected"),
        ({}, (1, 33, 32, 3), "H, W, C = 32, 32, 3 expected"),
        ({}, (32, 32, 3), r"\(N, H, W, C\) expected"),
    ],
)
def test_what_can_not_be_tuned(small, change, images, said):
    module, variables = small
    with pytest.raises(ValueError, match=said):
        fzoo.tune(module.clone(**change), variables, jax.ShapeDtypeStruct(images, jnp.float32))


def test_a_gpu_has_nothing_to_tune(small):
    module, variables = small
    with pytest.raises(ValueError, match="a network on 'cuda' given to be tuned, one on a CPU expected"):
        fzoo.optimize_for_inference(module, variables, platform="cuda", tune=True)


def test_a_tuned_job(choose, small, tmp_path):
    """The same classes; a job that was begun untuned is another."""
    from PIL import Image

    module, variables = small
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(random_images((5, 40, 40, 3), pixels=True).astype(np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.png")
    choose(any_other)
    rows = []
    for name, tune in (("plain", False), ("tuned", True)):
        fzoo.run_job(module, variables, [folder], tmp_path / f"{name}.jsonl", preprocess="MobileNet", tune=tune)
        rows.append([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()])
    assert len(rows[0]) == 5
    for plain, tuned in zip(*rows, strict=True):
        assert plain["image"] == tuned["image"]
        assert [c["label"] for c in plain["predictions"]] == [c["label"] for c in tuned["predictions"]]
    with pytest.raises(ValueError, match=r"another job's \(other: tune\)"):
        options = {"preprocess": "MobileNet", "append": True}
        fzoo.run_job(module, variables, [folder], tmp_path / "tuned.jsonl", **options)
    with pytest.raises(ValueError, match="conv_dw_1"):
        options = {"preprocess": "MobileNet", "tune": True, "layers": ["conv_dw_1"]}
        fzoo.run_job(module, variables, [folder], tmp_path / "taps.npz", **options)


@pytest.mark.slow
def test_the_command(tmp_path):
    """`fzoo tune` in a process of its own: a line for each distinct convolution; the second time is quick."""
    command = [
        sys.executable,
        "-m",
        "fzoo.cli",
        "tune",
        "MobileNet",
        "-o",
        "alpha=0.25",
        "--size",
        "64",
        "--batch",
        "2",
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    outputs = [subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300) for _ in range(2)]
    assert [output.returncode for output in outputs] == [0, 0], outputs[0].stderr
    assert outputs[0].stdout == outputs[1].stdout
    *rows, footer = (line.split("\t") for line in outputs[0].stdout.splitlines())
    assert footer[0].startswith("2 images together: ") and str(tmp_path) in footer[0]
    assert {len(row) for row in rows} == {6} and len(rows) > 15
    assert rows[0][0] == "conv1" and "2x64x64x3, 3x3 to 8, stride 2x2" in rows[0][1]
