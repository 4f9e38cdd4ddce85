"""Published files from a real HTTP server on loopback, from the cache, and by processes that are killed."""

import errno
import hashlib
import http.server
import io
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import h5py
import keras
import pytest
from networks import random_variables
from reference import assert_equal, build, randomise, save_weights_only, variables_of
from tiers import slow_but

import fzoo
from fzoo import files
from fzoo.pretrained.imagenet import published
from fzoo.weights import download
from fzoo.weights.download import cache_dir, cached_file, checked_by, fetch

CONTENT = bytes(range(256)) * 4096
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"
HALF = len(CONTENT) // 2


def hdf5(size=100_000):
    with h5py.File(file := io.BytesIO(), "w") as h5:
        h5["array"] = bytearray(size)
    return file.getvalue()


HDF5 = hdf5()


def opens(path):
    """What tells a file for which no hash is published."""
    try:
        h5py.File(path, "r").close()
    except OSError:
        raise ValueError(f"{path} is no HDF5 file") from None


OTHERS = {
    "wrong": CONTENT[::-1],
    "page": b"<html>",
    "half.h5": HDF5[: len(HDF5) // 2],
    **dict.fromkeys(("hdf5", "endless", "chunked"), HDF5),
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT, whole or from where a Range begins, and what goes wrong under other names.

    An action of `server.script` for a path is used up by a request: a status, "break" (half of what is asked for),
    "stall" (half, and nothing more until the test ends), "pause" (half, the rest when the test sets `server.go_on`),
    "silent" (nothing at all).
    """

    def do_HEAD(self):
        """What the Hub of Hugging Face answers: where a file lies, and its hash; "wrong" is not what lies there."""
        self.send_response(302 if "/resolve/" in self.path else 405)
        if "/resolve/" in self.path:
            digits = hashlib.sha256(CONTENT).hexdigest()
            self.send_header("X-Linked-Etag", f'"{digits}"')
            self.send_header("Location", f"/cdn/{self.path.rsplit('/', 1)[1]}")
        self.end_headers()

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1]
        if "/resolve/" in self.path:
            self.do_HEAD()
            return
        self.server.requests.append((self.path, self.headers.get("Range")))
        script = self.server.script.get(name, [])
        action = script.pop(0) if script else {"missing": 404, "broken": 500, "truncated": "break"}.get(name)
        if action == "silent":
            self.server.ended.wait()
            return
        if isinstance(action, int):
            self.send_error(action)
            return
        content = OTHERS.get(name, CONTENT)
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if first >= len(content):
            self.send_error(416)
            return
        body = content[first:]
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if name == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
        elif name != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if name == "chunked":
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        rest = b""
        if action in ("break", "stall", "pause"):
            body, rest = body[: len(body) // 2], body[len(body) // 2 :]
        if name == "slow" and self.server.pause:
            for start in range(0, len(body), 1 << 15):
                self.wfile.write(body[start : start + (1 << 15)])
                if self.server.ended.wait(self.server.pause):
                    return
        else:
            self.wfile.write(body)
        if action == "stall":
            self.server.ended.wait()
        if action == "pause":
            self.server.go_on.wait()
            self.wfile.write(rest)

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Remembers what was asked; a client that is killed is no error."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.script, self.ranges, self.pause = [], {}, True, 0.5
        self.ended, self.go_on = threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        assert isinstance(sys.exception(), ConnectionError)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "WAITS", (0.01, 0.01))
    monkeypatch.delenv("FZOO_WEIGHTS_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.ended.set()
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def no_network(monkeypatch):
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # refused at once, on a machine with a network too
    for exempt in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(exempt, raising=False)


def url(server, path):
    return f"http://127.0.0.1:{server.server_port}/{path}"


def start(server, path="slow", proof=MD5, stderr=subprocess.PIPE):
    """A process that fetches a file as file.h5, and says so."""
    code = (
        f"import sys\nsys.path.append({os.path.dirname(download.__file__)!r})\n"
        "from download import fetch\n"  # alone, without JAX, which takes seconds to start
        f"print('ready', flush=True)\nprint(fetch({url(server, path)!r}, 'file.h5', {proof!r}), flush=True)"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=stderr, text=True)


def until(condition, process=None):
    """Wait for what another process does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def end(process):
    """(output, errors, exit code)."""
    output, errors = process.communicate(timeout=60)
    return output.removeprefix("ready\n").strip(), errors, process.returncode


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("proof", [MD5, SHA256, MD5[4:], SHA256[7:], MD5.upper().replace("MD5", "md5")])
def test_downloaded_once(server, offline, proof):
    assert cache_dir() == offline
    for _ in range(2):
        path = fetch(url(server, "good"), "file.h5", proof)
        assert path == offline / "file.h5" and path.read_bytes() == CONTENT
    assert server.requests == [("/good", None)] and names(offline) == ["file.h5"]


@pytest.mark.parametrize("digits", [8, 63])
def test_the_first_digits_of_a_hash(server, offline, digits):
    """All that PyTorch publishes; a file with others is refused, and what shows less than eight is no hash."""
    begun = SHA256[: len("sha256:") + digits]
    assert fetch(url(server, "good"), "file.h5", begun).read_bytes() == CONTENT
    assert cached_file("file.h5", begun.upper()) == offline / "file.h5"
    assert checked_by(begun) == f"the first {digits} digits of its hash are right, all that are published"
    assert checked_by(SHA256) == checked_by(MD5) == checked_by(MD5[4:]) == "hash is right"
    wrong = begun[:-1] + ("0" if begun[-1] != "0" else "1")
    assert cached_file("file.h5", wrong) is None
    (offline / "file.h5").unlink()
    with pytest.raises(OSError, match="its hash is not the published one"):
        fetch(url(server, "good"), "file.h5", wrong)
    assert names(offline) == []
    (offline / "file.h5").write_bytes(CONTENT)
    for proof in (SHA256[:14], "sha256:", begun[7:], f"{SHA256}0", f"crc32:{'0' * 8}"):
        with pytest.raises(ValueError, match="with 8 digits or more expected"):
            cached_file("file.h5", proof)


def any_file(path):
    """What takes anything for a published file."""


def test_the_hash_that_the_hub_announces(server, offline):
    """It tells whether a file is right, and lets a download go on where it broke; once there, no network is asked."""
    server.script["good"] = ["break"]
    path = fetch(url(server, "timm/resolve/main/good"), "x.safetensors", any_file)
    assert path.read_bytes() == CONTENT and names(offline) == ["x.safetensors"]
    assert server.requests == [("/cdn/good", None), ("/cdn/good", f"bytes={HALF}-")]
    assert fetch(url(server, "timm/resolve/main/good"), "x.safetensors", any_file) == path
    assert len(server.requests) == 2
    with pytest.raises(OSError, match="its hash is not the published one"):
        fetch(url(server, "timm/resolve/main/wrong"), "y.safetensors", any_file)
    assert names(offline) == ["x.safetensors"]


def test_a_mirror_announces_none(server, offline, capsys):
    """What there is of a file is checked."""
    assert fetch(url(server, "good"), "x.safetensors", any_file).read_bytes() == CONTENT
    with pytest.raises(OSError, match="no HDF5 file"):
        fetch(url(server, "page"), "y.safetensors", opens)
    assert names(offline) == ["x.safetensors"]


@pytest.mark.parametrize("path", ["hdf5", "chunked"])
def test_without_a_published_hash(server, offline, path):
    for _ in range(2):
        assert fetch(url(server, path), "file.h5", opens).read_bytes() == HDF5
    assert len(server.requests) == 1


def test_the_cache_is_made(server, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KERAS_HOME", "~/some/where")
    assert fetch(url(server, "good"), "file.h5", MD5) == tmp_path / "some/where/models/file.h5"


@pytest.mark.parametrize(
    ("path", "proof", "content"), [("good", MD5, CONTENT), ("hdf5", opens, HDF5)], ids=["hash", "no hash"]
)
def test_a_damaged_file_is_replaced(server, offline, path, proof, content):
    (offline / "file.h5").write_bytes(content[: len(content) // 2])
    assert cached_file("file.h5", proof) is None
    assert fetch(url(server, path), "file.h5", proof).read_bytes() == content
    assert cached_file("file.h5", proof) == offline / "file.h5" and names(offline) == ["file.h5"]


@pytest.mark.parametrize(
    ("proof", "fault"), [(MD5, "its hash is not the published one"), (opens, "it is no HDF5 file")]
)
def test_a_damaged_file_that_cant_be_replaced(server, offline, proof, fault):
    (offline / "file.h5").write_bytes(CONTENT[:99])
    with pytest.raises(OSError, match="put the file in its place, or else") as error:
        fetch(url(server, "missing"), "file.h5", proof, ", or else")
    for part in (str(offline / "file.h5"), "is not the published file", fault, url(server, "missing"), "404"):
        assert part in str(error.value)
    assert (offline / "file.h5").read_bytes() == CONTENT[:99] and names(offline) == ["file.h5"]


@pytest.mark.parametrize(
    ("path", "proof", "reason", "tries"),
    [
        ("missing", MD5, "404 Not Found", 1),
        ("broken", MD5, "500 Internal Server Error", 3),
        ("wrong", MD5, "hash is not the published one", 1),
        ("page", opens, "it is no HDF5 file", 1),
        ("half.h5", opens, "it is no HDF5 file", 1),
        ("truncated", MD5, "broke before all 1,048,576 bytes", 3),
        ("truncated", opens, "broke before all 1,048,576 bytes", 3),
        ("endless", opens, "does not say how long it is", 1),
    ],
)
def test_failures_leave_nothing_that_looks_whole(server, offline, path, proof, reason, tries):
    with pytest.raises(OSError, match=f"could not download {url(server, path)} .*{reason}") as error:
        fetch(url(server, path), "file.h5", proof)
    assert str(offline / "file.h5") in str(error.value) and "\n" not in str(error.value)
    assert len(server.requests) == tries
    kept = path == "truncated" and proof == MD5  # what came is worth going on from
    assert names(offline) == ([".file.h5.part"] if kept else [])


@pytest.mark.parametrize("failure", [500, 502, 503, 504, "break"])
def test_a_moments_failure_is_tried_again(server, offline, failure):
    server.script["good"] = [failure]
    assert fetch(url(server, "good"), "file.h5", MD5).read_bytes() == CONTENT
    (_, first), (_, second) = server.requests
    assert first is None and (second is not None) == (failure == "break")
    assert names(offline) == ["file.h5"]


def test_a_broken_connection_without_a_hash_starts_anew(server, offline):
    server.script["hdf5"] = ["break"]
    assert fetch(url(server, "hdf5"), "file.h5", opens).read_bytes() == HDF5
    assert server.requests == [("/hdf5", None)] * 2


def test_a_stalling_server(server, offline, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.script["good"] = ["silent"]
    with pytest.raises(OSError, match=r"the server sent nothing for 0\.3 s") as error:
        fetch(url(server, "good"), "file.h5", MD5)
    assert "\n" not in str(error.value) and len(server.requests) == 1 and names(offline) == []
    # One that stalls on the way is asked for the rest.
    server.script["good"] = ["stall"]
    assert fetch(url(server, "good"), "file.h5", MD5).read_bytes() == CONTENT
    assert server.requests[-1][1] is not None and names(offline) == ["file.h5"]


def test_no_network(offline, no_network, monkeypatch):
    monkeypatch.delenv("FZOO_WEIGHTS_URL", raising=False)
    with pytest.raises(OSError) as error:
        fzoo.load("ResNet50")
    (file, _) = fzoo.spec("ResNet50").weight_files
    for part in (file.url, str(offline / file.name), "weights=PATH"):
        assert part in str(error.value)
    assert names(offline) == []


@pytest.mark.parametrize(("proof", "content"), [(MD5, CONTENT), (opens, HDF5)])
def test_what_is_there_needs_no_network(server, offline, no_network, monkeypatch, proof, content):
    (offline / "file.h5").write_bytes(content)
    monkeypatch.setenv("FZOO_WEIGHTS_URL", url(server, ""))
    offline.chmod(0o500)  # nor a folder that can be written
    assert fetch(url(server, "good"), "file.h5", proof) == offline / "file.h5"
    offline.chmod(0o700)
    assert server.requests == [] and names(offline) == ["file.h5"]


def test_a_directory_in_place_of_the_file(offline):
    (offline / "file.h5").mkdir()
    with pytest.raises(IsADirectoryError, match="remove it"):
        fetch("http://127.0.0.1:9/file.h5", "file.h5", MD5)


def test_a_cache_that_cant_be_made(monkeypatch, tmp_path, server):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="could not download"):
        fetch(url(server, "good"), "file.h5", MD5)
    assert server.requests == []


def test_a_full_disk_leaves_nothing(server, offline, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        fetch(url(server, "good"), "file.h5", MD5)
    assert names(offline) == []


# What an earlier attempt left.


@pytest.mark.parametrize(
    ("left", "ranges", "requests"),
    [
        (CONTENT[:HALF], True, [f"bytes={HALF}-"]),
        (CONTENT[:HALF], False, [f"bytes={HALF}-"]),  # the answer is all of it
        (b"x" * HALF, True, [f"bytes={HALF}-", None]),  # of another file: only the hash tells
        (CONTENT + b"x", True, [f"bytes={len(CONTENT) + 1}-", None]),  # too long: status 416
        (CONTENT, True, []),  # killed just before the end
        (b"", True, [None]),
    ],
)
def test_the_next_attempt_goes_on(server, offline, left, ranges, requests):
    (offline / ".file.h5.part").write_bytes(left)
    (offline / ".file.h5.lock").touch()
    server.ranges = ranges
    assert fetch(url(server, "good"), "file.h5", MD5).read_bytes() == CONTENT
    assert [asked for _, asked in server.requests] == requests
    assert names(offline) == ["file.h5"]


def test_without_a_hash_the_next_attempt_starts_anew(server, offline):
    (offline / ".file.h5.part").write_bytes(HDF5[:1000])
    assert fetch(url(server, "hdf5"), "file.h5", opens).read_bytes() == HDF5
    assert server.requests == [("/hdf5", None)] and names(offline) == ["file.h5"]


def test_what_came_survives_a_server_that_is_down(server, offline):
    (offline / ".file.h5.part").write_bytes(CONTENT[:HALF])
    for path in ("missing", "broken"):
        with pytest.raises(OSError):
            fetch(url(server, path), "file.h5", MD5)
        assert (offline / ".file.h5.part").read_bytes() == CONTENT[:HALF]


# Processes.


@pytest.mark.parametrize("kill", slow_but([signal.SIGKILL, signal.SIGINT, signal.SIGTERM], signal.SIGKILL))
def test_a_killed_download_is_resumed(server, offline, kill):
    part = offline / ".file.h5.part"
    process = start(server)
    until(lambda: part.exists() and part.stat().st_size > 0, process)
    process.send_signal(kill)
    assert end(process)[2] != 0
    size = part.stat().st_size
    assert 0 < size < len(CONTENT) and CONTENT.startswith(part.read_bytes())
    assert cached_file("file.h5", MD5) is None and set(names(offline)) <= {".file.h5.lock", ".file.h5.part"}
    server.pause = 0
    assert fetch(url(server, "slow"), "file.h5", MD5).read_bytes() == CONTENT
    assert server.requests == [("/slow", None), ("/slow", f"bytes={size}-")]
    assert names(offline) == ["file.h5"]


@pytest.mark.slow
def test_processes_take_turns(server, offline):
    server.script["good"] = ["pause"]
    processes = [start(server, "good") for _ in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    server.go_on.set()
    for process in processes:
        assert end(process) == (str(offline / "file.h5"), "", 0)
    assert server.requests == [("/good", None)]  # one downloaded for all
    assert (offline / "file.h5").read_bytes() == CONTENT and names(offline) == ["file.h5"]


def test_threads_take_turns(server, offline):
    server.pause = 0.005
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(url(server, "slow"), "file.h5", MD5))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [offline / "file.h5"] * 8 and len(server.requests) == 1 and names(offline) == ["file.h5"]


@pytest.mark.slow
def test_who_waits_goes_on_when_the_holder_is_killed(server, offline):
    part = offline / ".file.h5.part"
    holder = start(server)
    until(lambda: part.exists() and part.stat().st_size > 0, holder)
    waiting = start(server)
    assert waiting.stdout is not None and waiting.stdout.readline() == "ready\n"
    holder.kill()
    end(holder)
    server.pause = 0
    assert end(waiting) == (str(offline / "file.h5"), "", 0)
    assert (offline / "file.h5").read_bytes() == CONTENT and names(offline) == ["file.h5"]
    assert [bool(asked) for _, asked in server.requests] == [False, True]


def test_the_lock_of_a_file_that_is_gone_is_no_lock(offline, monkeypatch):
    """Who waits for the file of a holder that has left, while the next holder has made a new one, waits on."""
    path, lock, answers, entered = offline / ".file.h5.lock", files._lock, [], threading.Event()

    def enter():
        with files.hold_lock(path):
            entered.set()

    with path.open("ab") as old:
        assert lock(old)
        waiting = threading.Thread(target=enter)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_lock", lambda file: answers.append(lock(file)) or answers[-1])
            waiting.start()
            until(lambda: answers)
            path.unlink()
            with path.open("ab") as new:
                assert lock(new)
                old.close()
                until(lambda: entered.is_set() or (True in answers and not answers[-1]))
                assert not entered.is_set()
            waiting.join()
    assert entered.is_set() and names(offline) == []


def test_a_file_system_without_locks(server, offline, monkeypatch):
    def unsupported(file):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files, "_lock", unsupported)
    server.pause, server.script = 0.005, {"slow": ["break"]}
    threads = [threading.Thread(target=fetch, args=(url(server, "slow"), "file.h5", MD5)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (offline / "file.h5").read_bytes() == CONTENT and names(offline) == ["file.h5"]
    with pytest.raises(OSError):
        fetch(url(server, "truncated"), "other.h5", MD5)
    assert names(offline) == ["file.h5"]


def test_a_progress_bar_on_a_terminal(server, offline):
    primary, secondary = pty.openpty()
    server.pause = 0
    process = start(server, stderr=secondary)
    os.close(secondary)
    text = b""
    while True:
        try:
            text += (new := os.read(primary, 1 << 16))
        except OSError:  # Linux's end of a terminal
            break
        if not new:
            break
    os.close(primary)
    assert end(process)[2] == 0
    assert b"slow" in text and b"1.0/1.0 MB" in text


# Mirrors.


@pytest.mark.parametrize("end", ["", "/"])
def test_a_mirror(server, offline, monkeypatch, end):
    monkeypatch.setenv("FZOO_WEIGHTS_URL", url(server, "some/where") + end)
    assert fetch("http://127.0.0.1:9/nowhere", "good", MD5).read_bytes() == CONTENT
    assert server.requests == [("/some/where/good", None)]
    with pytest.raises(OSError, match=f"could not download {url(server, 'some/where/wrong')} .its hash is not"):
        fetch("http://127.0.0.1:9/nowhere", "wrong", MD5)


def test_a_mirrors_password_is_not_shown(server, offline, monkeypatch):
    monkeypatch.setenv("FZOO_WEIGHTS_URL", url(server, "").replace("http://", "http://me:secret@"))
    with pytest.raises(OSError, match=f"could not download {url(server, 'missing')}") as error:
        fetch("http://127.0.0.1:9/nowhere", "missing", MD5)
    assert "secret" not in str(error.value)


def test_a_folder_as_a_mirror(offline, monkeypatch, tmp_path):
    """Of another machine's cache; a blank is percent-encoded as in any URL."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "file.h5").write_bytes(CONTENT)
    (folder / "wrong.h5").write_bytes(HDF5)
    monkeypatch.setenv("FZOO_WEIGHTS_URL", folder.as_uri())
    assert fetch("http://127.0.0.1:9/nowhere", "file.h5", MD5).read_bytes() == CONTENT
    with pytest.raises(OSError, match=r"could not download file:///.*/wrong\.h5 \(its hash"):
        fetch("http://127.0.0.1:9/nowhere", "wrong.h5", MD5)
    with pytest.raises(OSError, match=r"could not download file:///.*/other\.h5 \(no such file\)"):
        fetch("http://127.0.0.1:9/nowhere", "other.h5", MD5)
    assert names(offline) == ["file.h5"]


@pytest.mark.parametrize(
    "mirror",
    ["/some/where", "example.org/weights", "ftp://example.org", "http://", "http://h:port/x", "http://[::1/x",
     "https://example.org/?a=b", "file:relative", "file://example.org/x", "nonsense://me:secret@h/"],
)  # fmt: skip
def test_a_bad_mirror_is_one_clear_error(offline, monkeypatch, mirror):
    monkeypatch.setenv("FZOO_WEIGHTS_URL", mirror)
    with pytest.raises(ValueError, match=r"FZOO_WEIGHTS_URL=.* given, https://HOST/FOLDER or file:///") as error:
        fetch("http://127.0.0.1:9/nowhere", "file.h5", MD5)
    assert "secret" not in str(error.value)
    assert names(offline) == []


def test_names_in_the_cache_are_unique():
    """A mirror is asked by them."""
    files = [file for name in fzoo.list_models() for file in fzoo.spec(name).weight_files]
    urls = {file.url: file.name for file in files}  # ResNetRS50 and ResNetRS50.i160 have the same
    assert Counter(urls.values()).most_common(1)[0][1] == 1
    assert all(file.hash is None or file.hash.startswith(("md5:", "sha256:")) for file in files)


def test_without_a_published_hash_the_arrays_are_checked(offline, monkeypatch, tmp_path, capsys):
    """Before the file gets its name; a terminal is told. One of another width is replaced as a damaged one is."""
    monkeypatch.setenv("FZOO_WEIGHTS_URL", tmp_path.as_uri())
    options = {"alpha": 0.25, "include_top": False, "input_shape": (128, 128, 3)}
    name = "mobilenet_2_5_128_tf_no_top.h5"

    def publish(alpha):
        module = fzoo.create("MobileNet", **{**options, "alpha": alpha})
        variables = random_variables(module, statistics={})
        fzoo.save_keras_weights(module, variables, tmp_path / name)
        return variables

    publish(0.5)
    for reason in (r"it does not fit this MobileNet: conv1/kernel is float32 \(3, 3, 3, 16\)", "it is not a readable"):
        with pytest.raises(OSError, match=rf"could not download file:///.*/{name} \(.*{reason}"):
            fzoo.load("MobileNet", **options)
        assert names(offline) == [] and capsys.readouterr().err == ""
        (tmp_path / name).write_text("<html>")
    publish(0.5)
    (tmp_path / name).rename(offline / name)
    with pytest.raises(OSError, match=r"is not the published file \(it does not fit this MobileNet.*no such file"):
        fzoo.load("MobileNet", **options)
    variables = publish(0.25)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for said in (f"fzoo: {name}: no hash is published; its structure was checked\n", ""):
        assert_equal(fzoo.load("MobileNet", **options)[1], variables)
        assert capsys.readouterr().err == said
    assert names(offline) == [name]


def test_kerass_cache_is_shared(offline):
    """What Keras has downloaded is used without a network."""
    options = {"alpha": 0.35, "include_top": False, "input_shape": (96, 96, 3)}
    module = fzoo.create("MobileNetV2", **options)
    model = randomise(build(keras.applications.MobileNetV2, **options))
    save_weights_only(model, offline / published("MobileNetV2", module).name)
    _, variables = fzoo.load("MobileNetV2", **options)
    assert_equal(variables, variables_of(model))
