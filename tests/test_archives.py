"""Archives: all that can be read of them is, and the rest is reported."""

import bz2
import gzip
import io
import lzma
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from PIL import Image
from tiers import slow_but

from fzoo.images import archives
from fzoo.images.archives import ArchiveReader, archive_images
from fzoo.images.files import PassedOver

NAMES = tuple(f"im{i}.jpg" for i in range(6))


def picture(i):
    """The bytes of a JPEG of about 1.5 KB, another for each number."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


#: How tar files are compressed, without a program that a machine may lack.
COMPRESSORS = {
    "tar.gz": gzip.compress,
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
    "tar.zst": lambda data: zstandard.ZstdCompressor().compress(data),
}
DATA = {name: picture(i) for i, name in enumerate(NAMES)}


def make_tar(path, mode="w", data=DATA, **options):
    """An archive, and where its headers are."""
    starts = []
    with tarfile.open(path, mode, **options) as archive:
        for name, content in data.items():
            starts.append(archive.offset)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return starts


def make_zip(path, data=DATA, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in data.items():
            archive.writestr(name, content)


def contents(path, passed_over=None):
    """({member: its bytes}, {what could not be had: why}), read as a job does: in order here, in threads there."""
    images = list(archive_images(str(path), PassedOver() if passed_over is None else passed_over))
    reader, good, bad = ArchiveReader(), {}, {}

    def read(image):
        try:
            return image, reader.prepare(image)
        except (ValueError, OSError) as e:
            return image, e

    def finish(pair):
        image, opener = pair
        try:
            return image, opener if isinstance(opener, Exception) else opener().read()
        except (ValueError, OSError) as e:
            return image, e

    with ThreadPoolExecutor(2) as pool:
        for image, data in pool.map(finish, [read(image) for image in images]):
            name = image.name.removeprefix(f"{path}/")
            (bad if isinstance(data, Exception) else good)[name] = str(data) if isinstance(data, Exception) else data
    reader.close()
    assert all(str(path) in error and "\n" not in error for error in bad.values())
    return good, bad


def without(*lost):
    return {name: content for name, content in DATA.items() if name not in lost}


@pytest.mark.parametrize("ending", [*archives.ARCHIVE_ENDINGS])
def test_whole_archives(tmp_path, ending):
    """Every kind, under every ending; each is also known by its content under another name."""
    path = tmp_path / f"x{ending}"
    kind = archives.ARCHIVE_ENDINGS[ending]
    if kind == "zip":
        make_zip(path)
    elif kind == "zstd":
        make_tar(tmp_path / "x.tar")
        path.write_bytes(COMPRESSORS["tar.zst"]((tmp_path / "x.tar").read_bytes()))
    else:
        make_tar(path, f"w:{ {'gzip': 'gz', 'bzip2': 'bz2', 'xz': 'xz', 'tar': ''}[kind] }")
    assert contents(path) == (DATA, {})
    for other in ("y.tar", "y.tgz", "blob"):
        os.link(path, tmp_path / other)
        assert archives.is_archive(str(tmp_path / other))
        assert contents(tmp_path / other) == (DATA, {})


def test_damaged_header(tmp_path):
    path = tmp_path / "x.tar"
    starts = make_tar(path)
    data = bytearray(path.read_bytes())
    data[starts[3] + 150] ^= 0xFF
    path.write_bytes(data)
    good, bad = contents(path)
    assert good == without("im3.jpg") and list(bad) == [f"{path} (at byte {starts[3]})"]
    assert "is damaged at byte" in bad[f"{path} (at byte {starts[3]})"]


def test_lost_block(tmp_path):
    """A header that is zeros is no end marker; nor is one of a member without data, a lone block."""
    for data in (DATA, {name: b"" if name == "im3.jpg" else content for name, content in DATA.items()}):
        path = tmp_path / "x.tar"
        starts = make_tar(path, data=data)
        whole = path.read_bytes()
        path.write_bytes(whole[: starts[3]] + bytes(512) + whole[starts[3] + 512 :])
        good, bad = contents(path)
        assert good == without("im3.jpg") and list(bad) == [f"{path} (at byte {starts[3]})"]


def test_cut_archives(tmp_path):
    path = tmp_path / "x.tar"
    starts = make_tar(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: starts[4]])
    good, bad = contents(path)
    assert good == without("im4.jpg", "im5.jpg") and "end marker is missing" in bad[f"{path} (at byte {starts[4]})"]
    path.write_bytes(whole[: starts[4] + 700])
    good, bad = contents(path)
    assert good == without("im4.jpg", "im5.jpg")
    assert bad == {"im4.jpg": f"cannot read the image {path}/im4.jpg: the archive ends in it; what follows is lost"}
    end = starts[5] + 512 + -(-len(DATA["im5.jpg"]) // 512) * 512
    path.write_bytes(whole[: end + 700])  # a lone block of zeros may be what is left of a header
    good, bad = contents(path)
    assert good == DATA and "end marker is missing" in bad[f"{path} (at byte {end})"]
    path.write_bytes(whole[: end + 1024])
    assert contents(path) == (DATA, {})
    path.write_bytes(whole[: starts[5] + 512 + len(DATA["im5.jpg"])])
    good, bad = contents(path)
    assert good == DATA and len(bad) == 1
    path.write_bytes(b"")
    assert "it is empty" in contents(path)[1][f"{path} (at byte 0)"]
    path.write_bytes(b"x" * 2000)
    assert "no member can be recognised up to the end" in contents(path)[1][f"{path} (at byte 0)"]


def test_cut_member_that_is_no_image(tmp_path):
    path = tmp_path / "x.tar"
    starts = make_tar(path, data={"im0.jpg": DATA["im0.jpg"], "notes.txt": b"x" * 2000, "im1.jpg": DATA["im1.jpg"]})
    path.write_bytes(path.read_bytes()[: starts[1] + 700])
    good, bad = contents(path)
    assert list(good) == ["im0.jpg"] and "what follows is lost" in bad[str(path)]


def test_archives_one_after_the_other(tmp_path):
    half, other = tmp_path / "a.tar", tmp_path / "b.tar"
    make_tar(half, data={name: DATA[name] for name in NAMES[:3]})
    make_tar(other, data={name: DATA[name] for name in NAMES[3:]})
    (tmp_path / "x.tar").write_bytes(half.read_bytes() + other.read_bytes())
    assert contents(tmp_path / "x.tar") == (DATA, {})
    for ending, compress in COMPRESSORS.items():
        parts = [compress(part.read_bytes()) for part in (half, other)]
        (tmp_path / f"x.{ending}").write_bytes(b"".join(parts))
        assert contents(tmp_path / f"x.{ending}") == (DATA, {})
    make_zip(tmp_path / "a.zip", {name: DATA[name] for name in NAMES[:3]})
    make_zip(tmp_path / "b.zip", {name: DATA[name] for name in NAMES[3:]})
    (tmp_path / "x.zip").write_bytes((tmp_path / "a.zip").read_bytes() + (tmp_path / "b.zip").read_bytes())
    good, bad = contents(tmp_path / "x.zip")
    assert list(good) == list(NAMES[3:]) and "what lies before" in bad[f"{tmp_path}/x.zip (at byte 0)"]


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


LINKS = [
    ("before.jpg", "one.jpg", tarfile.SYMTYPE),
    ("sub/up.jpg", "../one.jpg", tarfile.SYMTYPE),
    ("hard.jpg", "./one.jpg", tarfile.LNKTYPE),
    ("chain.jpg", "sub/up.jpg", tarfile.SYMTYPE),
    ("latest", "sub", tarfile.SYMTYPE),
    ("through.jpg", "latest/up.jpg", tarfile.SYMTYPE),
    ("stored.jpg", "blobs/ab12", tarfile.SYMTYPE),
    ("round.jpg", "round.jpg", tarfile.SYMTYPE),
    ("a.jpg", "b.jpg", tarfile.SYMTYPE),
    ("b.jpg", "a.jpg", tarfile.SYMTYPE),
    ("out.jpg", "../../etc/one.jpg", tarfile.SYMTYPE),
    ("absolute.jpg", "/one.jpg", tarfile.SYMTYPE),
    ("gone.jpg", "none.jpg", tarfile.LNKTYPE),
]


@pytest.mark.parametrize("ending", ["tar", "tar.gz"])
def test_links(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    with tarfile.open(path, f"w:{ending[4:]}") as archive:
        for name, target, kind in LINKS[:5]:
            archive.addfile(link(name, target, kind))
        for name, content in (("one.jpg", DATA["im0.jpg"]), ("blobs/ab12", DATA["im1.jpg"])):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target, kind in LINKS[5:]:
            archive.addfile(link(name, target, kind))
    good, bad = contents(path)
    one = ["one.jpg", "before.jpg", "sub/up.jpg", "hard.jpg", "chain.jpg", "through.jpg"]
    assert good == {**dict.fromkeys(one, DATA["im0.jpg"]), "stored.jpg": DATA["im1.jpg"]}
    places = [image.offset for image in archive_images(str(path), PassedOver()) if not image.error]
    assert places == sorted(places), "a compressed archive would be gone through again for each link"
    assert sorted(bad) == ["a.jpg", "absolute.jpg", "b.jpg", "gone.jpg", "out.jpg", "round.jpg"]
    assert "x.jpg" not in bad["out.jpg"] and "../etc/one.jpg" in bad["out.jpg"] and "none.jpg" in bad["gone.jpg"]


def test_links_of_real_files(tmp_path):
    """What GNU tar and zip make of links."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "one.jpg").write_bytes(DATA["im0.jpg"])
    os.link(folder / "one.jpg", folder / "hard.jpg")
    (folder / "sub" / "soft.jpg").symlink_to("../one.jpg")
    names = [f"photos/{name}" for name in ("one.jpg", "hard.jpg", "sub/soft.jpg")]
    subprocess.run(["tar", "-cf", "x.tar", "photos"], cwd=tmp_path, check=True)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(folder / "one.jpg", names[0])
        soft = zipfile.ZipInfo(names[2])
        soft.external_attr = 0o120777 << 16
        archive.writestr(soft, "../one.jpg")
    assert contents(tmp_path / "x.tar") == (dict.fromkeys(names, DATA["im0.jpg"]), {})
    assert contents(tmp_path / "x.zip") == (dict.fromkeys([names[0], names[2]], DATA["im0.jpg"]), {})


@pytest.mark.parametrize("form", ["gnu", "0.0", "0.1", "1.0"])
def test_sparse_members(tmp_path, form):
    """A bitmap with holes, as `tar -S` stores it in each of its forms."""
    pixels = np.zeros((512, 512, 3), np.uint8)
    pixels[200:202] = np.random.default_rng(0).integers(0, 256, (2, 512, 3))
    Image.fromarray(pixels).save(tmp_path / "full.bmp")
    full = (tmp_path / "full.bmp").read_bytes()
    with (tmp_path / "im.bmp").open("wb") as file:
        for start in range(0, len(full), 4096):
            file.seek(start)
            if any(full[start : start + 4096]):
                file.write(full[start : start + 4096])
        file.truncate(len(full))
    (tmp_path / "im0.jpg").write_bytes(DATA["im0.jpg"])
    options = ["--format=gnu"] if form == "gnu" else ["--format=posix", f"--sparse-version={form}"]
    for ending, flag in (("tar", "-cSf"), ("tar.gz", "-czSf")):
        path = tmp_path / f"x.{ending}"
        subprocess.run(["tar", *options, flag, path, "im.bmp", "im0.jpg"], cwd=tmp_path, check=True)
        with tarfile.open(path) as archive:
            assert archive.getmember("im.bmp").issparse(), "this file system has no holes"
        assert contents(path) == ({"im.bmp": full, "im0.jpg": DATA["im0.jpg"]}, {})


def test_long_names(tmp_path):
    long = {f"{'folder' * 10}/" * 4 + f"{i}é.jpg": content for i, content in enumerate(DATA.values())}
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        make_tar(tmp_path / "x.tar", data=long, format=form)
        assert contents(tmp_path / "x.tar") == (long, {})


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_cut_compressed_archives(tmp_path, ending):
    """What was there before the cut is taken, and the cut is reported; so is one in the checksum at the very end."""
    path = tmp_path / f"x.{ending}"
    names = [f"{i:03}.jpg" for i in range(200)]
    data = {name: np.random.default_rng(i).bytes(9000) for i, name in enumerate(names)}
    make_tar(tmp_path / "x.tar", data=data)
    whole = COMPRESSORS[ending]((tmp_path / "x.tar").read_bytes())
    path.write_bytes(whole[: len(whole) // 2])
    good, bad = contents(path)
    assert good.items() <= data.items() and len(bad) == 1
    assert len(good) > (0 if ending == "tar.bz2" else 60)  # of which a block has 900 KB
    if ending != "tar.zst":  # which may come without
        path.write_bytes(whole[:-4])
        good, bad = contents(path)
        assert good.items() <= data.items() and len(bad) >= 1


def test_wrong_checksum(tmp_path):
    path = tmp_path / "x.tar.gz"
    make_tar(path, "w:gz")
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # of the CRC
    path.write_bytes(data)
    good, bad = contents(path)
    assert good == DATA and "CRC check failed" in bad[str(path)]


def test_zip_members_that_cannot_be_read(tmp_path):
    path = tmp_path / "x.zip"
    make_zip(path, method=zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    at = data.index(DATA["im1.jpg"])
    data[at + 100] ^= 1  # a checksum that is wrong
    for signature, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
        places = [i for i in range(len(data)) if data[i : i + 4] == signature]
        data[places[2] + flags] |= 1  # encrypted
        data[places[3] + method] = 9  # Deflate64
    path.write_bytes(data)
    good, bad = contents(path)
    assert good == without("im1.jpg", "im2.jpg", "im3.jpg")
    assert "Bad CRC-32" in bad["im1.jpg"] and "encrypted" in bad["im2.jpg"] and "compression" in bad["im3.jpg"]
    path.write_bytes(data[:2000])
    good, bad = contents(path)
    assert good == {} and f"cannot read the archive {path} any further: File is not a zip file" in bad[str(path)]


def test_members_that_are_not_taken(tmp_path):
    extra = (
        "a.txt",
        ".hidden.jpg",
        ".folder/x.jpg",
        "__MACOSX/x.jpg",
        "__MACOSX/._x.jpg",
        "@eaDir/x.jpg",
        "b",
        "c.zip",
    )
    for name, make in (("x.tar", make_tar), ("x.zip", make_zip)):
        passed_over = PassedOver()
        make(tmp_path / name, data={**dict.fromkeys(extra, b"x"), **DATA, "./sub/../y.jpg": DATA["im0.jpg"]})
        good, bad = contents(tmp_path / name, passed_over)
        assert good == {**DATA, "./sub/../y.jpg": DATA["im0.jpg"]} and not bad
        assert dict(passed_over) == {".txt": 1, ".zip": 1, "without an ending": 1}


def test_members_that_are_no_files(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(link("pipe.jpg", "", tarfile.FIFOTYPE))
        archive.addfile(link("dev/null", "", tarfile.CHRTYPE))
        archive.addfile(link("folder.jpg", "", tarfile.DIRTYPE))
    good, bad = contents(path)
    assert not good and list(bad) == ["pipe.jpg"] and "it is no file" in bad["pipe.jpg"]


def test_too_large_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBER", 5000)
    for name, make in (
        ("x.tar", make_tar),
        ("x.tar.gz", lambda *a, **k: make_tar(*a, "w:gz", **k)),
        ("x.zip", make_zip),
    ):
        make(tmp_path / name, data={"bomb.jpg": bytes(6000), **DATA})
        good, bad = contents(tmp_path / name)
        assert good == DATA and "it has more than 5,000 bytes" in bad["bomb.jpg"]


def test_headers_that_claim_too_much(tmp_path):
    """A name of 8 GiB, 2,000 headers one upon the other, sizes below zero, a map of holes beyond the end."""
    long = link("././@LongLink", "", tarfile.GNUTYPE_LONGNAME)
    long.size = 8 << 30
    chain = link("././@LongLink", "", tarfile.GNUTYPE_LONGNAME)
    chain.size = len("im0.jpg") + 1
    negative = bytearray(link("im.jpg", "", tarfile.REGTYPE).tobuf())
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(negative))[0]
    sparse = bytearray(link("im.jpg", "", tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    sparse[386:410] = b"%011o\0%011o\0" % (1 << 30, 512)
    sparse[483:495] = b"%011o\0" % 1024
    sparse[124:136] = b"%011o\0" % 512
    sparse[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(sparse))[0]
    make_tar(tmp_path / "good.tar")
    good_part = (tmp_path / "good.tar").read_bytes()
    for data in (
        long.tobuf(tarfile.GNU_FORMAT),
        (chain.tobuf(tarfile.GNU_FORMAT) + b"im0.jpg".ljust(512, b"\0")) * 2000,
        bytes(negative),
        bytes(sparse) + bytes(512),
    ):
        path = tmp_path / "x.tar"
        path.write_bytes(data + good_part)
        good, bad = contents(path)
        assert good == DATA and len(bad) == 1


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("x.rar", b"Rar!\x1a\x07\x01\0", "RAR"),
        ("x.7z", b"7z\xbc\xaf\x27\x1c", "7z"),
        ("x.tar.lz4", b"\x04\x22\x4d\x18", "lz4"),
        ("x.tar.Z", b"", "compress"),
        ("renamed.tar", b"Rar!\x1a\x07\x01\0", "RAR"),
    ],
)
def test_other_archives(tmp_path, name, start, kind):
    (tmp_path / name).write_bytes(start + bytes(2000))
    assert archives.is_archive(str(tmp_path / name))
    assert (
        f"an archive of the kind {kind}, which fzoo does not read" in contents(tmp_path / name)[1][f"{tmp_path / name}"]
    )


def test_a_compressed_file_that_is_no_archive(tmp_path):
    (tmp_path / "im0.jpg.gz").write_bytes(gzip.compress(DATA["im0.jpg"]))
    assert "is one file, compressed by gzip" in contents(tmp_path / "im0.jpg.gz")[1][f"{tmp_path}/im0.jpg.gz"]


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "link.tar").symlink_to("gone")
    for name, message in (
        ("pipe.tar", "it is a pipe"),
        ("link.tar", "is a link to a file that is not there"),
        ("none.tar", "no such archive"),
    ):
        assert message in contents(tmp_path / name)[1][f"{tmp_path / name}"]


def test_without_zstandard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    assert "pip install 'fzoo[archives]'" in contents(tmp_path / "x.tar.zst")[1][f"{tmp_path}/x.tar.zst"]


def test_memory(tmp_path):
    """Archives are not held in memory, nor what is known of their members."""
    import tracemalloc

    path = tmp_path / "x.tar.gz"
    make_tar(path, "w:gz", data={f"{i}.jpg": bytes(1 << 20) for i in range(40)})
    tracemalloc.start()
    try:
        assert sum(not image.error for image in archive_images(str(path), PassedOver())) == 40
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def mutate(data, rng):
    """Some bits flipped, an end cut off, or blocks of zeros."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data))
        kind = rng.choice(("flip", "flip", "cut", "zero", "zero"))
        if kind == "flip":
            data[at] ^= 1 << rng.randrange(8)
        elif kind == "cut" and at > 600:
            del data[at:]
        elif kind == "zero":
            block = at - at % 512
            data[block : block + 512] = bytes(len(data[block : block + 512]))
    return bytes(data)


def extracted_by_tar(path, folder):
    """{name: bytes} of what GNU tar takes, without a member in which the archive ends."""
    folder.mkdir()
    command = ["tar", "-xif", path, "-C", folder, "--no-same-owner", "--force-local"]
    subprocess.run(command, stderr=subprocess.DEVNULL)
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.suffix == ".jpg"}


@pytest.mark.parametrize("ending", slow_but(["tar", "tar.gz", "zip"], "zip"))
def test_damage_at_random(tmp_path, ending):
    """Never an exception; what GNU tar takes is taken; and what is lost or other is reported."""
    whole, rng = tmp_path / f"whole.{ending}", random.Random(0)
    make_zip(whole) if ending == "zip" else make_tar(whole, f"w:{ending[4:]}", format=tarfile.GNU_FORMAT)
    data, path, lost = whole.read_bytes(), tmp_path / f"x.{ending}", 0
    for trial in range(300):
        mutated = mutate(data, rng)
        path.write_bytes(mutated)
        passed_over = PassedOver()
        good, bad = contents(path, passed_over)
        if ending != "tar":  # which have checksums
            assert all(DATA.get(name, content) == content or bad for name, content in good.items()), trial
        missing = set(DATA) - set(good)
        lost += bool(missing)
        assert not missing or bad or passed_over, (trial, missing)
        if ending == "tar" and trial % 3 == 0:
            theirs = extracted_by_tar(path, tmp_path / f"{trial}")
            cut = {name for name, error in bad.items() if "the archive ends in it" in error}
            # Where the archive ends in a block, GNU tar leaves out what there is of that block.
            assert all(good.get(n, b"").startswith(c) for n, c in theirs.items() if n not in cut), trial
    assert lost > 100
