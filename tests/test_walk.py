"""What images are found: the same for every command, each once, and nothing is left out without a word."""

import os
import subprocess
import tarfile
import zipfile

import networks
import numpy as np
import pytest
from PIL import Image

import fzoo
from fzoo.images import files, walk
from fzoo.images.archives import ArchiveReader
from fzoo.images.files import PassedOver
from fzoo.images.recipe import Recipe
from fzoo.images.walk import find_images
from fzoo.training.data import Broken, read_folder


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """`photos/` with six images in three folders, and what lies beside them; the working directory is around it."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.png", "b/c.JPG", "b/d.jfif", "b/e/f.png", "b/e/g.webp", "h[1].png")):
        draw(tmp_path / "photos" / name, i)
    for name in (".hidden.png", ".ipynb_checkpoints/a.png", "b/__MACOSX/a.png", "b/@eaDir/a.png", "b/._c.jpg"):
        draw(tmp_path / "photos" / name)
    for name in ("notes.txt", "b/notes.TXT", "b/x.heic", "b/e/README"):
        (tmp_path / "photos" / name).write_text("no image")
    return tmp_path / "photos"


FOUND = [f"photos/{name}" for name in ("a.png", "b/c.JPG", "b/d.jfif", "b/e/f.png", "b/e/g.webp", "h[1].png")]


def names(*given, passed_over=None):
    return [image.name for image in find_images(given, passed_over)]


def errors(*given):
    return {image.name: image.error for image in find_images(given) if image.error}


def test_a_folder(photos):
    passed_over = PassedOver()
    assert names("photos", passed_over=passed_over) == FOUND
    assert str(passed_over) == "passed over 4 files: 2 .txt, 1 .heic, 1 without an ending"
    assert names("photos/.ipynb_checkpoints") == ["photos/.ipynb_checkpoints/a.png"]  # asked for by name
    assert str(PassedOver()) == "" and str(PassedOver({".txt": 1})) == "passed over 1 file: 1 .txt"
    many = PassedOver({f".{i}": 2 for i in range(10)})
    assert str(many).endswith("2 .7, 4 others") and str(many).startswith("passed over 20 files")


def test_what_an_image_says_of_its_file(photos):
    for image in find_images(["photos", "gone.png"]):
        if image.name == "gone.png":
            assert (image.bytes, image.changed, image.error) == (-1, -1, "no such image: gone.png")
        else:
            status = os.stat(image.path)
            assert (image.bytes, image.changed, image.error) == (status.st_size, status.st_mtime_ns, "")
    with tarfile.open("x.tar", "w") as archive:
        archive.add("photos")
    assert {(i.bytes, i.changed) for i in find_images(["x.tar"])} == {
        (os.stat("x.tar").st_size, os.stat("x.tar").st_mtime_ns)
    }


def test_globs(photos):
    assert names("photos/b/*.JPG", "photos/*.png") == ["photos/b/c.JPG", "photos/a.png", "photos/h[1].png"]
    for pattern in ("photos/**", "photos/**/*", "./photos/b/../**", "**", "photos*", f"{os.getcwd()}/photos/**/*"):
        found = names(pattern)
        assert len(found) == 6 and sorted(map(os.path.relpath, found)) == sorted(FOUND)
    assert names("photos/**/*.png") == ["photos/a.png", "photos/b/e/f.png", "photos/h[1].png"]
    assert names("photos/**/e") == names("photos/b/*")[2:] == ["photos/b/e/f.png", "photos/b/e/g.webp"]
    assert names("photos/h[1].png") == ["photos/h[1].png"]  # there is one of that name
    passed_over = PassedOver()
    assert names("photos/*", passed_over=passed_over) == FOUND and passed_over.total() == 4
    assert names("photos/*.txt") == ["photos/notes.txt"]  # asked for by its ending
    assert names("photos/.*.png") == ["photos/.hidden.png"]
    assert names("photos/a.png", "photos/a.png", "photos/a.*") == ["photos/a.png"] * 3


def test_links(photos):
    """Folders are followed; those that lead back are left out with a word, and so is one that leads to itself."""
    (photos / "b" / "back").symlink_to("..")
    (photos / "b" / "e" / "here").symlink_to(".")
    (photos / "self").symlink_to("self")
    draw(photos.parent / "elsewhere" / "i.png")
    (photos / "linked").symlink_to("../elsewhere")
    (photos / "linked.png").symlink_to("a.png")
    found = [*FOUND, "photos/linked/i.png", "photos/linked.png"]
    passed_over = PassedOver()
    assert sorted(names("photos", passed_over=passed_over)) == sorted([*found, "photos/self"])
    assert passed_over["in a loop of links"] == 2 and "2 in a loop of links" in str(passed_over)
    assert "photos/self" in errors("photos")
    assert sorted(names("photos/**/*")) == sorted([*found, "photos/self"])
    assert sorted(names("photos/**/*.png")) == sorted(name for name in found if name.endswith(".png"))


def test_links_to_nothing(photos):
    (photos / "gone.png").symlink_to("/nowhere/gone.png")
    (photos / "gone").symlink_to("/nowhere/gone")
    (photos / "gone.md").symlink_to("/nowhere/gone.md")
    (photos / "gone.tar").symlink_to("/nowhere/gone.tar")
    (photos / "self.png").symlink_to("self.png")
    bad = errors("photos")
    assert sorted(bad) == ["photos/gone", "photos/gone.png", "photos/gone.tar", "photos/self.png"]
    assert all("is a link to a file that is not there" in bad[name] for name in sorted(bad)[:3])
    assert [name for name in names("photos") if name not in bad] == FOUND
    assert sorted(errors("photos/*")) == sorted(bad)


def test_folders_that_cannot_be_read(photos, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "e":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for given in ("photos", "photos/**/*.*", "photos/**"):
        assert errors(given) == {"photos/b/e": "cannot read the folder photos/b/e: Permission denied"}
    assert names("photos") == [*FOUND[:3], "photos/b/e", FOUND[5]]
    assert names("photos/b/e") == ["photos/b/e"]


def test_a_damaged_archive_among_others(photos):
    with tarfile.open(photos / "x.tar", "w") as archive:
        archive.add("photos/a.png")
    with zipfile.ZipFile(photos / "y.zip", "w") as archive:
        archive.write("photos/a.png")
    (photos / "x.tar").write_bytes((photos / "x.tar").read_bytes()[:-8500])
    (photos / "z.zip").write_bytes(b"PK\x03\x04")
    (photos / "z.rar").write_bytes(b"Rar!\x1a\x07")
    passed_over = PassedOver()
    found = names("photos", passed_over=passed_over)
    archived = ["photos/x.tar/photos/a.png", "photos/y.zip/photos/a.png", "photos/z.zip"]
    assert found == [*FOUND, *archived] and passed_over[".rar"] == 1
    assert sorted(errors("photos")) == [archived[0], archived[2]]
    assert "of the kind RAR" in errors("photos/z.rar")["photos/z.rar"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_lists(photos, encoding):
    lines = ["photos/b", "", "  ", "photos/a.png", "missing.png", "photos/*.png", "é.png"]
    text = "\r\n".join(lines)
    text = "\ufeff" + text if encoding == "utf-16-le" else text
    (photos / "list.txt").write_bytes(text.encode(encoding))
    expected = [*FOUND[1:5], "photos/a.png", "missing.png", "photos/a.png", "photos/h[1].png", "é.png"]
    assert names("@photos/list.txt") == expected
    assert sorted(errors("@photos/list.txt")) == ["missing.png", "é.png"]


def test_lists_of_what_holds_no_images(photos):
    (photos / "empty").mkdir()
    (photos / "list.txt").write_bytes(b"photos/empty\nphotos/a.png\n*.bmp\nphotos/caf\xe9.png\n")
    bad = errors("@photos/list.txt")
    assert bad["photos/empty"] == "photos/list.txt, line 1: photos/empty is a directory of no images"
    assert bad["*.bmp"] == "photos/list.txt, line 3: *.bmp matches no images"
    assert bad[os.fsdecode(b"photos/caf\xe9.png")].startswith("no such image")
    assert len(bad) == 3 and len(names("@photos/list.txt")) == 4


def test_a_picture_that_is_called_like_a_list(photos):
    draw(photos.parent / "@x.png")
    draw(photos.parent / "@both.png")
    (photos.parent / "both.png").write_text("photos/a.png")
    (photos.parent / "@folder").mkdir()
    draw(photos.parent / "@folder" / "y.png")
    (photos.parent / "list").write_text("photos/a.png\n@x.png")
    (photos.parent / "@list").write_text("another")
    assert names("@x.png", "@both.png", "@folder", "@list") == [
        "@x.png", "@both.png", "@folder/y.png", "photos/a.png", "@x.png"
    ]  # fmt: skip


def test_what_holds_no_images(photos):
    (photos / "empty" / "inside").mkdir(parents=True)
    (photos / "empty" / "x.heic").write_text("")
    (photos / "list.txt").write_text("\n")
    tarfile.open(photos / "none.tar", "w").close()
    for given, message in {
        "photos/empty": r"photos/empty is a directory of no images \(passed over 1 file: 1 .heic\)",
        "@photos/list.txt": "photos/list.txt lists no images",
        "photos/none.tar": "photos/none.tar holds no images",
        "photos/*.bmp": r"photos/\*.bmp matches no images",
    }.items():
        with pytest.raises(ValueError, match=f"{message}$"):
            names(given)
    assert names("photos") == FOUND  # an empty folder among others is none
    with pytest.raises(FileNotFoundError):
        names("@missing.txt")
    with pytest.raises(IsADirectoryError):
        names("@photos")


def test_deep_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1020):
        os.mkdir("d")
        os.chdir("d")
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save("x.png")
    os.chdir(tmp_path)
    try:
        assert [name[-8:] for name in names("d")] == ["/d/x.png"]
    finally:
        subprocess.run(["rm", "-r", "d"], check=True)  # pytest's own cleaning up ends in a RecursionError


def test_endings_are_those_of_pillow():
    Image.init()
    assert [ending for ending in files.IMAGE_ENDINGS if ending not in Image.EXTENSION] == []


def test_explain_takes_one_image(photos, command_line):
    with tarfile.open("x.tar", "w") as archive:
        archive.add("photos/a.png")
    for given, kind in (("photos", "a folder"), ("x.tar", "an archive")):
        code, output, lines = command_line("explain", given, "--out", "out.png", "-w", "none", "--classes", "3")
        assert (code, output) == (2, []) and f"{given} is {kind}, one image expected" in lines[-1]


def test_reading_what_was_found(photos):
    reader = ArchiveReader()
    for image in find_images(["photos"]):
        pixels = fzoo.load_image(reader.prepare(image)())
        np.testing.assert_array_equal(pixels, fzoo.load_image(image.path))


def test_training_finds_the_same(photos):
    """Checkpoints' copies are no images; what can't be had is reported, and the rest is trained on."""
    lines = []
    (photos / "b" / "gone.png").symlink_to("nowhere")
    (photos / "b" / "back").symlink_to("..")
    draw(photos.parent / "elsewhere" / "i.png")
    (photos / "b" / "linked").symlink_to("../../elsewhere")
    (photos / "b" / "x.tar").write_bytes(b"")
    draw(photos / "empty" / "z.png")
    broken = Broken(10, lines.append)
    found = read_folder(photos, Recipe((20, 20)), broken)
    assert [str(path.relative_to(photos)) for path in found.paths] == [
        "b/c.JPG", "b/d.jfif", "b/e/f.png", "b/e/g.webp", "b/linked/i.png", "empty/z.png"
    ]  # fmt: skip
    assert len(broken.paths) == 1 and "gone.png is a link to a file that is not there" in lines[0]
    assert "passed over 5 files" in lines[1] and "1 .tar" in lines[1] and "1 in a loop of links" in lines[1]
    assert found.fingerprint()


@pytest.mark.slow
def test_commands_say_what_they_passed_over(photos, command_line):
    small = {"alpha": 0.25, "input_shape": (32, 32, 3), "classes": 5}
    fzoo.save_keras_weights(*networks.network("MobileNet", **small), "weights.h5")
    options = ["-m", "MobileNet", "-o", "alpha=0.25", "--size", "32", "--classes", "5", "-w", "weights.h5"]
    line = "passed over 4 files: 2 .txt, 1 .heic, 1 without an ending"
    (photos / "gone.png").symlink_to("nowhere")
    for args in (
        ("classify", "photos"),
        ("features", "photos", "--layer", "conv1", "--out", "x.npz"),
    ):
        code, _, errors = command_line(*args, *options)
        assert code == 1 and sum(line in text for text in errors) == 1
        assert "1 of 7 images skipped" in errors[-1]


def test_walk_is_lazy(photos):
    """A folder of many images is not gone through before the first is given."""
    found = find_images(["photos", "missing.png"])
    assert next(found).name == FOUND[0]
    (photos / "b" / "e" / "late.png").write_bytes(b"")
    assert "photos/b/e/late.png" in [image.name for image in found]
    assert walk.is_list("@photos/list.txt")
