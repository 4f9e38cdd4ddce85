"""Published files from a real HTTP server on loopback, and from the cache."""

import hashlib
import http.server
import threading

import pytest
from reference import keras_model, save_weights_only, variables_of

import fzoo
from fzoo.registry import published
from fzoo.weights.download import cache_dir, fetch

CONTENT = bytes(range(256)) * 4096
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT as /good, and what goes wrong under other names."""

    def do_GET(self):
        self.server.requests.append(self.path)
        status = {"/missing": 404, "/broken": 500}.get(self.path)
        if status:
            self.send_error(status)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        body = {"/truncated": CONTENT[: len(CONTENT) // 2], "/wrong": CONTENT[::-1]}.get(self.path, CONTENT)
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def url(server, path):
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_downloaded_once(server, offline):
    assert cache_dir() == offline
    for _ in range(2):
        path = fetch(url(server, "good"), "file.h5", MD5)
        assert path == offline / "file.h5" and path.read_bytes() == CONTENT
    assert server.requests == ["/good"]


def test_without_a_published_hash(server, offline):
    assert fetch(url(server, "good"), "file.h5", None).read_bytes() == CONTENT


def test_a_damaged_file_is_replaced(server, offline):
    (offline / "file.h5").write_bytes(CONTENT[:99])
    assert fetch(url(server, "good"), "file.h5", MD5).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "md5", "reason"),
    [
        ("missing", MD5, "404"),
        ("broken", MD5, "500"),
        ("wrong", MD5, "hash is not the published one"),
        ("truncated", MD5, "bytes"),
        ("truncated", None, "bytes"),
    ],
)
def test_failures_leave_nothing(server, offline, path, md5, reason):
    with pytest.raises(OSError, match=f"could not download {url(server, path)} .*{reason}") as error:
        fetch(url(server, path), "file.h5", md5)
    assert str(offline / "file.h5") in str(error.value) and "\n" not in str(error.value)
    assert list(offline.iterdir()) == []


def test_no_network(offline, monkeypatch):
    for proxy in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")  # refused at once, on a machine with a network too
    with pytest.raises(OSError) as error:
        fzoo.load("ResNet50")
    (file, _) = fzoo.spec("ResNet50").weight_files
    for part in (file.url, str(offline / file.name), "weights=PATH"):
        assert part in str(error.value)


def test_a_directory_in_place_of_the_file(offline):
    (offline / "file.h5").mkdir()
    with pytest.raises(IsADirectoryError, match="remove it"):
        fetch("http://127.0.0.1:9/file.h5", "file.h5", MD5)


def test_kerass_cache_is_shared(offline):
    """What Keras has downloaded is used without a network."""
    options = {"alpha": 0.35, "include_top": False, "input_shape": (96, 96, 3)}
    module = fzoo.create("MobileNetV2", **options)
    model = keras_model("MobileNetV2", **options)
    save_weights_only(model, offline / published("MobileNetV2", module).name)
    _, variables = fzoo.load("MobileNetV2", **options)
    from reference import assert_equal

    assert_equal(variables, variables_of(model))
