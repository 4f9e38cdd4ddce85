"""Batch jobs: processes that share one, images that change, outputs that grow, and what is never written."""

import csv
import errno
import fcntl
import functools
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import types

import flax.linen as nn
import h5py
import jax
import networks
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import fzoo
from fzoo.cli.console import show
from fzoo.images.recipe import Recipe
from fzoo.inference import devices
from fzoo.jobs import job, listing, network, pipeline, results, shards

SMALL = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 5}
OPTIONS = [
    "-m",
    "MobileNet",
    "-o",
    "alpha=0.25",
    "--size",
    "32",
    "--classes",
    "5",
    "-w",
    "weights.h5",
    "--batch-size",
    "4",
]
TAP = "conv_pw_2_relu"
LAYERS = {"layers": TAP, "preprocess": "MobileNet", "shard_size": 4, "batch_size": 4}
CLASSES = {"preprocess": "MobileNet", "shard_size": 4, "batch_size": 4, "top": 2}


@pytest.fixture(scope="module")
def small():
    return networks.network("MobileNet", **SMALL)


def draw(path, seed):
    """An image, of as many bytes whatever the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels,) = networks.random_images((1, 32, 32, 3), seed, pixels=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """`photos/00.bmp` to `photos/09.bmp`, where the test runs."""
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        draw(tmp_path / "photos" / f"{i:02}.bmp", i)
    return tmp_path / "photos"


def rows_of(path, layers=True):
    """[(image, its row)] of an output, the row as numbers or as text."""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return list(zip(arrays["images"].tolist(), arrays[TAP].tolist(), strict=True))
    if path.suffix == ".h5":
        with h5py.File(path) as file:
            return list(zip(file["images"].asstr()[:].tolist(), file[TAP][:].tolist(), strict=True))
    if path.suffix == ".parquet":
        return [tuple(row.values()) for row in pyarrow.parquet.read_table(path).to_pylist()]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.reader(file))[1:]
    return [json.loads(line) for line in path.read_text().splitlines()]


def names_in(path):
    return [row["image"] if isinstance(row, dict) else row[0] for row in rows_of(path)]


def computed_at_once(small, out, images=("photos",), **options):
    """The rows of a job in one go, under another name."""
    other = out.with_name(f"at_once{out.suffix}")
    fzoo.run_job(*small, images, other, **options)
    return rows_of(other)


def same_rows(found, theirs):
    """Each image has its own row; numbers are those of another batch."""
    assert [row[0] for row in found] == [row[0] for row in theirs]
    scale = max(np.abs(row[1]).max() for row in theirs)
    for (_, mine), (_, other) in zip(found, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4 * scale)


def stop_after(count):
    """A `watch` that interrupts a job when so many images are done."""

    def watch(report, failures):
        if report.done > count:
            raise KeyboardInterrupt

    return watch


@pytest.mark.slow
def test_processes_with_other_shards(small, photos):
    """Two real processes whose batches, and so the shards that they would have, differ; of NumPy's variables."""
    fzoo.save_keras_weights(*small, "weights.h5")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"""
import sys, jax, numpy as np, fzoo
from fzoo.jobs import job
job.SHARD_IMAGES = 4
number = int(sys.argv[1])
process = fzoo.devices.start_distributed(f"127.0.0.1:{port},{{number}},2")
module, variables = fzoo.load("MobileNet", weights="weights.h5", **{SMALL})
variables = jax.tree.map(np.asarray, variables)
options = dict(layers="{TAP}", preprocess="MobileNet", batch_size=(4, 3)[number], process=process)
print(fzoo.run_job(module, variables, ["photos"], "x.npz", **options).joined)
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(i)], env=env, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    said = [process.communicate(timeout=300)[0].split()[-1] for process in started]
    assert sorted(said) == ["False", "True"] and not os.path.exists("x.npz.parts")
    same_rows(rows_of(photos.parent / "x.npz"), computed_at_once(small, photos.parent / "x.npz", **LAYERS))


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_process_decides(small, photos, monkeypatch, first):
    """Whoever is the first, and where one is between its look and its own folder."""
    out, save, sizes = photos.parent / "x.npz", listing.Listing.save, []

    def other_first(*arguments):
        patched.setattr(listing.Listing, "save", save)
        options = {**LAYERS, "shard_size": 4, "process": (first, 2)}
        assert not fzoo.run_job(*small, ["photos"], out, **options).joined
        save(*arguments)

    def default(reading):
        sizes.append(3)
        return 3

    with monkeypatch.context() as patched:  # whose end leaves the folder that the test runs in
        patched.setattr(listing.Listing, "save", other_first)
        patched.setattr(job, "default_shard_size", default)
        options = {**LAYERS, "shard_size": None, "process": (1 - first, 2)}
        assert fzoo.run_job(*small, ["photos"], out, **options).joined and sizes == [3]
    same_rows(rows_of(out), computed_at_once(small, out, **LAYERS))
    assert not list(photos.parent.glob("*.parts*"))


def test_a_shard_size_that_can_not_be(small, photos):
    out = photos.parent / "x.csv"
    fzoo.run_job(*small, ["photos"], out, **CLASSES, process=(0, 2))
    with pytest.raises(ValueError, match=r"shard_size=3 given, the job in .*x.csv.parts has shards of 4: leave it out"):
        fzoo.run_job(*small, ["photos"], out, **{**CLASSES, "shard_size": 3}, process=(1, 2))
    others = {"top": 1, "recipe": Recipe((32, 32), crop=0.5), "labels": [("-", label) for label in "abcde"]}
    for key in others:
        with pytest.raises(ValueError, match=rf"another job \(other: {key}\): --restart"):
            fzoo.run_job(*small, ["photos"], out, **{**CLASSES, key: others[key]}, process=(1, 2))
    assert fzoo.run_job(*small, ["photos"], out, **{**CLASSES, "shard_size": None}, process=(1, 2)).joined


def test_an_image_that_was_changed(small, photos):
    """kill -9, another picture under the name of one that is done (of as many bytes), and on: only its shard again."""
    fzoo.save_keras_weights(*small, "weights.h5")
    script = f"""
import os, signal, fzoo
network = fzoo.load("MobileNet", weights="weights.h5", **{SMALL})
def watch(report, failures):
    if report.done > 8:
        os.kill(os.getpid(), signal.SIGKILL)
fzoo.run_job(*network, ["photos"], "x.npz", watch=watch, **{LAYERS})
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    killed = subprocess.run([sys.executable, "-c", script], env=env, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((photos.parent / "x.npz.parts").glob("*.npz"))) == 2
    draw(photos / "05.bmp", 100)
    (photos / "02.bmp").unlink()  # its row was right when it was there
    theirs = dict(computed_at_once(small, photos.parent / "x.npz", **LAYERS))
    report = fzoo.run_job(*small, ["photos"], "x.npz", **LAYERS)
    assert (report.joined, report.before, report.done, report.failed) == (True, 4, 6, 0)
    found = rows_of(photos.parent / "x.npz")
    assert [name for name, _ in found] == [f"photos/{i:02}.bmp" for i in range(10)]
    same_rows([row for row in found if row[0] in theirs], list(theirs.items()))


def test_an_image_that_was_repaired(small, photos):
    """What could not be read is looked at again when it is another file; the rest stays."""
    pixels = (photos / "03.bmp").read_bytes()
    (photos / "03.bmp").write_bytes(pixels[:50])
    with pytest.raises(KeyboardInterrupt):
        fzoo.run_job(*small, ["photos"], "x.npz", watch=stop_after(4), **LAYERS)
    (photos / "03.bmp").write_bytes(pixels)
    report = fzoo.run_job(*small, ["photos"], "x.npz", **LAYERS)
    assert (report.failed, report.done, report.joined) == (0, 10, True)
    assert not os.path.exists("x.npz.errors.jsonl")


def test_an_archive_that_was_changed(small, photos):
    """Its members are at other places: no one is read from where another one lies."""

    def pack(order):
        with tarfile.open("x.tar", "w") as archive:
            for i in order:
                archive.add(photos / f"{i:02}.bmp", f"{i:02}.bmp")

    pack(range(10))
    with pytest.raises(KeyboardInterrupt):
        fzoo.run_job(*small, ["x.tar"], "x.npz", watch=stop_after(4), **LAYERS)
    pack(reversed(range(10)))
    with pytest.raises(
        ValueError, match=r"^x.tar was changed since the job in x.npz.parts listed its images: --restart"
    ):
        fzoo.run_job(*small, ["x.tar"], "x.npz", **LAYERS)

    def watch(report, failures):
        pack(range(10))

    report = fzoo.run_job(
        *small, ["x.tar"], "x.npz", restart=True, watch=watch, workers=1, **{**LAYERS, "batch_size": 1}
    )
    errors = (photos.parent / "x.npz.errors.jsonl").read_text().splitlines()
    assert report.joined and 0 < report.failed == len(errors) < 10
    assert all("x.tar was changed while the job ran" in line for line in errors)
    names = names_in(photos.parent / "x.npz")
    assert names == [f"x.tar/{i:02}.bmp" for i in reversed(range(10))][: len(names)]


def test_images_that_come_and_go(small, photos):
    """A job's images are those of its start; newcomers are for the next run, and what went can't be read."""
    plain = {**CLASSES, "workers": 1}
    for i in range(10, 40):
        shutil.copy(photos / f"0{i % 10}.bmp", photos / f"{i}.bmp")

    def watch(report, failures):
        if report.done == 4:
            draw(photos / "00a.bmp", 50)
            draw(photos / "99.bmp", 51)
            (photos / "39.bmp").unlink()

    report = fzoo.run_job(*small, ["photos"], "x.csv", watch=watch, **plain)
    assert (report.images, report.failed, report.added, report.joined) == (40, 1, 2, True)
    out = photos.parent / "x.csv"
    assert names_in(out) == [f"photos/{i:02}.bmp" for i in range(39) for _ in range(2)]
    assert "photos/39.bmp" in json.loads((photos.parent / "x.csv.errors.jsonl").read_text())["image"]
    report = fzoo.run_job(*small, ["photos"], out, append=True, **plain)
    assert (report.images, report.before, report.done, report.failed, report.added) == (41, 39, 2, 0, 0)
    assert rows_of(out) == computed_at_once(small, out, **plain)
    assert not os.path.exists("x.csv.errors.jsonl")


def test_a_restart_while_another_is_at_work(small, photos):
    """It throws nothing away; neither does a job with other options that finds nothing done yet."""
    said = []

    def watch(report, failures):
        for options in ({"restart": True, "top": 1}, {"top": 1}, {"process": (1, 2), "top": 1}):
            with pytest.raises((OSError, ValueError)) as error:
                fzoo.run_job(*small, ["photos"], "x.csv", **{**CLASSES, **options})
            said.append(str(error.value))

    assert fzoo.run_job(
        *small, ["photos"], "x.csv", watch=watch, **{**CLASSES, "batch_size": 8, "shard_size": 16}
    ).joined
    assert "another process is at work" in said[0] and "another process is at work" in said[1]
    assert "another job (other: top)" in said[2] and len(names_in(photos.parent / "x.csv")) == 20


def test_nothing_done_is_nothing_lost(small, photos):
    """Before the first shard is there, other options and other images are no other job."""

    def watch(report, failures):
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fzoo.run_job(*small, ["photos"], "x.csv", watch=watch, **{**CLASSES, "shard_size": 8})
        assert os.path.exists("x.csv.parts/job.json")
    draw(photos / "99.bmp", 50)
    report = fzoo.run_job(*small, ["photos"], "x.csv", **{**CLASSES, "top": 1})
    assert (report.images, report.added, report.joined) == (11, 0, True)


def test_newcomers_before_it_goes_on(small, photos):
    """A job that was killed goes on with its own images, but not on other ones."""
    draw(photos / "sub" / "x.bmp", 60)
    with pytest.raises(KeyboardInterrupt):
        fzoo.run_job(*small, ["photos"], "x.npz", watch=stop_after(4), **LAYERS)
    with pytest.raises(ValueError, match=r"other: images, of which photos/00.bmp was not given this time\): --restart"):
        fzoo.run_job(*small, ["photos/sub"], "x.npz", **LAYERS)
    draw(photos / "00a.bmp", 50)
    shutil.rmtree(photos / "sub")
    report = fzoo.run_job(*small, ["photos"], "x.npz", **LAYERS)
    assert (report.images, report.added, report.failed, report.joined) == (11, 1, 1, True)
    assert names_in(photos.parent / "x.npz") == [f"photos/{i:02}.bmp" for i in range(10)]


def test_a_list_while_it_is_classified(small, photos):
    """Without an output, too: what comes meanwhile is no error."""
    found = pipeline.classify(*small, ["photos"], preprocess="MobileNet", batch_size=2, workers=1)
    names = [next(found)[0]]
    draw(photos / "00a.bmp", 50)
    assert names + [name for name, _ in found] == [f"photos/{i:02}.bmp" for i in range(10)]


@pytest.mark.parametrize("name", ["x.npz", "x.h5", "l.parquet", "x.jsonl", "x.csv", "c.parquet"])
def test_an_output_that_grows(small, photos, name, monkeypatch):
    """New and changed images are computed, all others are the rows that they were, in the order of the images."""
    out = photos.parent / name
    options = LAYERS if name[0] == "l" or name.endswith(("npz", "h5")) else CLASSES
    draw(photos / "more" / "x.bmp", 70)
    fzoo.run_job(*small, ["photos"], out, **options)
    before = rows_of(out)
    draw(photos / "00a.bmp", 50)
    draw(photos / "05.bmp", 100)
    (photos / "broken.bmp").write_bytes(b"not an image")
    theirs = computed_at_once(small, out, **options)
    report = fzoo.run_job(*small, ["photos"], out, append=True, **options)
    assert (report.images, report.before, report.done, report.failed) == (13, 10, 3, 1)
    found = rows_of(out)
    if options is LAYERS:
        same_rows(found, theirs)
        kept = dict(before)
        assert sum(kept.get(image) == row for image, row in found) == 10  # not computed again: equal to the last bit
    else:
        assert str(found) == str(theirs)
    assert "photos/broken.bmp" in (photos.parent / f"{name}.errors.jsonl").read_text()
    assert not list(photos.parent.glob("*.parts*"))

    (photos / "broken.bmp").unlink()
    (photos / "more" / "x.bmp").unlink()
    state = out.stat().st_mtime_ns
    draw(photos.parent / "others" / "y.bmp", 80)
    report = fzoo.run_job(*small, ["others"], out, append=True, **options)
    assert (report.images, report.done) == (13, 1)  # what is not asked for this time is not thrown away
    assert names_in(out)[-1] == "others/y.bmp" and "photos/more/x.bmp" in names_in(out)
    assert str(rows_of(out)[: len(found)]) == str(found) and out.stat().st_mtime_ns > state

    state = out.stat().st_mtime_ns
    report = fzoo.run_job(*small, ["others"], out, append=True, **options)
    assert report.joined and (report.done, report.before) == (0, 13)
    assert out.stat().st_mtime_ns == state  # nothing to do
    report = fzoo.run_job(*small, ["others", "photos"], out, append=True, **options)
    assert report.joined and report.done == 0
    assert [name for name in names_in(out) if name[0] == "o"] and names_in(out)[0] == "photos/more/x.bmp"
    if options is LAYERS:
        assert names_in(out)[1] == "others/y.bmp"
        same_rows(sorted(rows_of(out)), sorted([*found, *rows_of(out)[1:2]]))


def test_an_addition_that_was_killed(small, photos):
    out = photos.parent / "x.npz"
    fzoo.run_job(*small, ["photos"], out, append=True, **LAYERS)  # there is none yet
    for i in range(6):
        draw(photos / f"0{i}a.bmp", 50 + i)
    theirs = computed_at_once(small, out, **LAYERS)
    with pytest.raises(KeyboardInterrupt):
        fzoo.run_job(*small, ["photos"], out, append=True, watch=stop_after(2), **LAYERS)
    assert len(names_in(out)) == 10
    with pytest.raises(ValueError, match=r"another job \(other: append\)"):
        fzoo.run_job(*small, ["photos"], out, **LAYERS)
    draw(photos / "09.bmp", 100)  # it was to be kept
    report = fzoo.run_job(*small, ["photos"], out, append=True, **LAYERS)
    assert report.joined and report.done + report.before == 16
    same_rows(rows_of(out)[:-1], theirs[:-1])
    same_rows(rows_of(out), computed_at_once(small, out, **LAYERS))


def test_what_can_not_be_added_to(small, photos, command_line):
    out, record = photos.parent / "x.csv", photos.parent / "x.csv.job.jsonl"
    fzoo.run_job(*small, ["photos"], out, **CLASSES)
    whole, known = out.read_bytes(), record.read_bytes()
    draw(photos / "99.bmp", 50)
    other = networks.network("MobileNet", seed=1, **SMALL)
    for theirs, options, message in (
        (other, {}, r"x.csv can't be added to: it is another job's \(other: weights\); without --append"),
        (small, {"top": 3}, r"another job's \(other: top\)"),
        (small, {"recipe": Recipe((32, 32), "lanczos")}, r"another job's \(other: recipe\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fzoo.run_job(*theirs, ["photos"], out, append=True, **{**CLASSES, **options})
    out.write_bytes(whole.replace(b"photos/00", b"photos/OO"))
    with pytest.raises(ValueError, match=r"it was changed after the job that wrote it"):
        fzoo.run_job(*small, ["photos"], out, append=True, **CLASSES)
    out.write_bytes(whole)
    record.write_bytes(known[: known.rindex(b"\n", 0, -1) + 1])
    with pytest.raises(ValueError, match=r"has lost lines"):
        fzoo.run_job(*small, ["photos"], out, append=True, **CLASSES)
    record.unlink()
    fzoo.save_keras_weights(*small, "weights.h5")
    code, output, errors = command_line("classify", "photos", "--out", out, "--append", *OPTIONS)
    assert (code, output) == (2, []) and "which says how it was made, can't be read; without --append" in errors[-1]
    assert out.read_bytes() == whole
    code, output, errors = command_line("classify", "photos", "--append", *OPTIONS)
    assert code == 2 and "--out FILE expected" in errors[-1]
    assert command_line("classify", "photos", "--out", out, *OPTIONS)[0] == 0
    draw(photos / "98.bmp", 51)
    code, output, errors = command_line("classify", "photos", "--out", out, "--append", *OPTIONS)
    assert code == 0 and "1 of 12 images" in output[0]


def act(x):
    return nn.softmax(x)


def test_a_network_with_functions(small, photos):
    """Functions go by their names, which are the same in each process; one without a name is no one's."""
    module, variables = small
    named = [module.clone(classifier_activation=f) for f in (act, nn.softmax, functools.partial(nn.softmax, axis=-1))]
    found = [network.fingerprint(each, variables) for each in named]
    assert len({*found, network.fingerprint(module, variables)}) == 4
    assert "0x" not in str([network.describe_value(each) for each in named])
    script = f"""
import fzoo, flax.linen as nn
from fzoo.jobs.network import describe_value
print(describe_value(fzoo.create("MobileNet", classifier_activation=nn.softmax, **{SMALL})))
"""
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(network.describe_value(named[1]))

    nameless = module.clone(classifier_activation=lambda x: nn.softmax(x))
    out = photos.parent / "x.csv"
    with pytest.raises(
        ValueError, match=r"^classifier_activation=<function .*<lambda>.*can't be known again in another"
    ):
        fzoo.run_job(nameless, variables, ["photos"], out, process=(0, 2), **CLASSES)
    assert os.listdir() == ["photos"]
    with pytest.raises(KeyboardInterrupt):
        fzoo.run_job(nameless, variables, ["photos"], out, watch=stop_after(4), **CLASSES)
    with pytest.raises(
        ValueError, match=r"other: weights.*classifier_activation=<function.*at the top of a module exp"
    ):
        fzoo.run_job(nameless, variables, ["photos"], out, **CLASSES)
    assert fzoo.run_job(nameless, variables, ["photos"], out, restart=True, **CLASSES).joined


@pytest.mark.parametrize("code", ["ENOLCK", "ENOTSUP", "EINVAL", "ENOSYS"])
def test_a_file_system_without_locks(small, photos, monkeypatch, code):
    """Two at once do the same work; what comes out is right."""

    def flock(*arguments):
        raise OSError(getattr(errno, code), "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    done = []

    def watch(report, failures):
        if report.done > 6 and not done:
            done.append(fzoo.run_job(*small, ["photos"], "x.npz", **LAYERS).joined)

    if code == "EINVAL":
        with pytest.raises(OSError, match=r"x.npz.parts is gone: another process has finished the job"):
            fzoo.run_job(*small, ["photos"], "x.npz", watch=watch, **LAYERS)
        assert done == [True]
    else:
        assert fzoo.run_job(*small, ["photos"], "x.npz", **LAYERS).joined
    same_rows(rows_of(photos.parent / "x.npz"), computed_at_once(small, photos.parent / "x.npz", **LAYERS))
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        fzoo.run_job(*small, ["photos"], "y.npz", **LAYERS)


def test_strange_names_and_labels(small, photos, capsys):
    """They come back through `csv`, `json` and tab-separated lines."""
    names = ['a,"b".bmp', "c\nd.bmp", "e\rf.bmp", "g\th.bmp", "i\r\nj.bmp", "k l.bmp", "\N{LINE SEPARATOR}m.bmp"]
    for i, name in enumerate(names):
        draw(photos.parent / "strange" / name, i)
    images = sorted(f"strange/{name}" for name in names)
    labels = [("-", label) for label in ('a, "b"', "c\nd", "e\rf", "g\th", "i\u2028j")]
    for ending in ("csv", "jsonl"):
        out = photos.parent / f"x.{ending}"
        for append in (False, True):
            fzoo.run_job(*small, ["strange"], out, labels=labels, append=append, **{**CLASSES, "top": 5})
            draw(photos.parent / "strange" / "z.bmp", 99)
            if ending == "csv":
                rows = rows_of(out)
                assert [row[0] for row in rows] == [name for name in images for _ in range(5)]
            else:
                lines = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
                rows = [(line["image"], *p.values()) for line in lines for p in line["predictions"]]
            assert {list(row)[2] for row in rows} == {label for _, label in labels}
            images = sorted({*images, "strange/z.bmp"})
    table = [(image, "-", label, 0.5) for image in images for _, label in labels]
    show(("image", "id", "label", "probability"), table)
    found = list(csv.reader(io.StringIO(capsys.readouterr().out, newline=""), "excel-tab"))
    assert found == [[str(cell) for cell in row] for row in table]
    show((), [("plain", "no 'quotes'")])
    assert capsys.readouterr().out == "plain\tno 'quotes'\n"


def test_one_long_name(small, photos, monkeypatch):
    """It makes neither the file nor the shards as wide as itself times all rows."""
    deep = photos.joinpath(*["d" * 250] * 14)
    deep.mkdir(parents=True)
    os.symlink(photos / "00.bmp", deep / "x.bmp")
    out, width = photos.parent / "x.npz", len(str(deep / "x.bmp"))
    (photos.parent / "list.txt").write_text("photos/01.bmp\n" * 40 + f"{deep}/x.bmp\n")
    options = {**LAYERS, "layers": "predictions", "shard_size": 512}
    fzoo.run_job(*small, ["@list.txt"], out, **options)
    names = ["photos/01.bmp"] * 40 + [str(deep / "x.bmp")]
    with np.load(out) as arrays:
        assert arrays["images"].tolist() == names and arrays["images"].nbytes > 40 * 4 * width > 500_000
    assert out.stat().st_size < 100_000
    monkeypatch.setattr(results, "NAMES_BYTES", 100_000)
    fzoo.run_job(*small, ["@list.txt"], out, **options)
    with np.load(out) as arrays:
        assert sorted(arrays) == ["images_ends", "images_utf8", "predictions"]
        ends, text = arrays["images_ends"], arrays["images_utf8"].tobytes()
        assert [text[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)] == names
    monkeypatch.setattr(
        shards, "remove", lambda folder: sizes.extend(path.stat().st_size for path in folder.glob("*.npz"))
    )
    sizes = []
    fzoo.run_job(*small, ["@list.txt"], photos.parent / "y.npz", **options)
    assert max(sizes) < 40_000


def test_numbers_that_are_not_finite(small, photos):
    """The first image for which there is one is named, and nothing is written."""
    module, variables = small
    pixels = np.stack([fzoo.load_image_for(path, "MobileNet", 32) for path in sorted(photos.iterdir())[4:8]])
    SPOILED.append(np.asarray(fzoo.predict(module, variables, pixels, preprocess="MobileNet", batch_size=4))[0, 0])
    message = r"the network gives {} for the image photos/04.bmp, finite numbers expected"
    broken = module.clone(classifier_activation=functools.partial(spoil, number=np.nan))
    with pytest.raises(ValueError, match=f"^{message.format('nan')}"):
        list(pipeline.classify(broken, variables, ["photos"], preprocess="MobileNet", batch_size=4))
    with pytest.raises(ValueError, match=f"^{message.format('nan')}"):
        fzoo.run_job(broken, variables, ["photos"], "x.jsonl", **CLASSES)
    broken = module.clone(classifier_activation=functools.partial(spoil, number=np.inf))
    with pytest.raises(ValueError, match=f"^the layer predictions of {message.format('inf')}"):
        fzoo.run_job(broken, variables, ["photos"], "x.npz", **{**LAYERS, "layers": [TAP, "predictions"]})
    assert not os.path.exists("x.jsonl") and not os.path.exists("x.npz")


#: The first probability of the image that `spoil` spoils.
SPOILED: list[float] = []


def spoil(logits, number):
    """Softmax, but for the image whose first probability was seen before."""
    p = nn.softmax(logits)
    return jax.numpy.where(abs(p[:, :1] - SPOILED[-1]) < 1e-6, number, p)


def test_nan_weights_on_the_command_line(small, photos, command_line):
    module, variables = small
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    fzoo.save_keras_weights(module, broken, "weights.h5")
    code, output, errors = command_line("classify", "photos", *OPTIONS)
    assert (code, output) == (2, []) and errors[-1].startswith(
        "fzoo: error: the network gives nan for the image photos/00.bmp"
    )


def test_devices_of_two_platforms():
    row = [types.SimpleNamespace(platform=name) for name in ("gpu", "cpu")]
    with pytest.raises(ValueError, match="devices of cpu and gpu given, those of one platform expected"):
        devices.mesh(row)
