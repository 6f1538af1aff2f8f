"""Downloads from a local server that does what servers and networks do wrong."""

import errno
import hashlib
import http.server
import os
import re
import socket
import threading
import time

import pytest

from twingpt.core.errors import UserError
from twingpt.data import download as downloads
from twingpt.data.download import DownloadError, download

CONTENT = bytes(range(256)) * 1200  # 300 kB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves CONTENT with ranges, except for what is left in `faults`, one for each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/file.txt"
        self.content, self.etag, self.ranges = CONTENT, '"one"', True
        self.faults, self.requests, self.released = [], [], threading.Event()

    def handle_error(self, request, client_address):
        pass  # clients that go away are what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.faults and (fault := server.faults.pop(0)):
            fault(self)
        else:
            self.serve()

    def serve(self, length=None):
        server, start = self.server, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(asked[1])
            if start >= len(server.content):
                return self.answer(416, {"Content-Range": f"bytes */{len(server.content)}"})
            part = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            self.answer(206, {"Content-Range": part}, len(server.content) - start)
        else:
            self.answer(200, {}, len(server.content))
        self.wfile.write(server.content[start:][:length])
        return None

    def answer(self, code, headers, length=0):
        self.send_response(code)
        for key, value in ({"ETag": self.server.etag, "Content-Length": str(length)} | headers).items():
            if value:
                self.send_header(key, value)
        self.end_headers()

    def log_message(self, format, *args):
        pass


def cut(after):
    return lambda handler: handler.serve(after)


def status(code, **headers):
    return lambda handler: handler.answer(code, {key.replace("_", "-"): value for key, value in headers.items()})


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(server, tmp_path):
    """Download the server's file; what was waited for between tries is in get.waits."""

    def get(**options):
        facts = {"size": len(CONTENT), "sha256": SHA256, "url": server.url, "timeout": 200.0} | options
        return download(path=get.path, wait=get.waits.append, **facts)

    get.path, get.waits = tmp_path / "downloads" / "file.txt", []
    return get


def left(get):
    return sorted(path.name for path in get.path.parent.iterdir())


def ranges(server):
    return [request.get("Range") for request in server.requests]


def test_a_whole_file_and_its_progress(server, get):
    seen = []
    assert get(progress=lambda *report: seen.append(report)) == SHA256
    assert get.path.read_bytes() == CONTENT and left(get) == ["file.txt"] and get.waits == []
    assert seen[-1] == ("checking file.txt", len(CONTENT), len(CONTENT))
    assert ("file.txt", len(CONTENT), len(CONTENT)) in seen
    assert "Authorization" not in server.requests[0]


@pytest.mark.parametrize("known", [True, False])
def test_a_cut_connection_is_gone_on_from(server, get, known):
    server.faults = [cut(100_000), cut(50_000)]
    assert get(**({} if known else {"size": None, "sha256": None})) == SHA256
    assert get.path.read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=100000-", "bytes=150000-"] and get.waits == [1.0, 1.0]
    assert server.requests[1]["If-Range"] == '"one"'


def test_a_later_call_goes_on_with_what_an_earlier_one_left(server, get):
    server.faults = [cut(100_000)] + [cut(0)] * 3
    with pytest.raises(DownloadError, match=r"cut after 100,000 of 307,200 bytes, after 3 tries"):
        get(tries=3)
    assert left(get) == ["file.txt.part", "file.txt.part.etag"] and get.waits == [1.0, 1.0, 2.0]
    get()
    assert ranges(server)[-1] == "bytes=100000-" and get.path.read_bytes() == CONTENT and left(get) == ["file.txt"]


def test_a_server_without_ranges_sends_all_again(server, get):
    server.ranges, server.faults = False, [cut(100_000)]
    get()
    assert ranges(server) == [None, "bytes=100000-"] and get.path.read_bytes() == CONTENT


def test_without_an_etag_nothing_is_gone_on_from(server, get):
    server.etag, server.faults = "", [cut(100_000)]
    get()
    assert ranges(server) == [None, None] and get.path.read_bytes() == CONTENT


def test_a_file_that_changed_between_two_tries_begins_again(server, get):
    def change(handler):
        server.content, server.etag = CONTENT[::-1], '"two"'
        handler.serve()

    server.faults = [cut(100_000), change]
    get(sha256=None)
    assert get.path.read_bytes() == CONTENT[::-1]


def test_a_server_that_goes_on_with_another_file_is_not_believed(server, get):
    def mix(handler):  # a range of what is there now, in spite of If-Range
        server.etag = '"two"'
        handler.answer(206, {"Content-Range": f"bytes 100000-307199/{len(CONTENT)}"}, 207_200)
        handler.wfile.write(b"x" * 207_200)

    server.faults = [cut(100_000), mix]
    get()
    assert get.path.read_bytes() == CONTENT and ranges(server) == [None, "bytes=100000-", None]


def test_a_damaged_beginning_is_fetched_again(server, get):
    get.path.parent.mkdir()
    get.path.with_name("file.txt.part").write_bytes(b"x" * 100_000)
    get.path.with_name("file.txt.part.etag").write_text(server.etag)
    get()
    assert get.path.read_bytes() == CONTENT and ranges(server) == ["bytes=100000-", None]


def test_a_beginning_that_is_longer_than_the_file(server, get):
    get.path.parent.mkdir()
    get.path.with_name("file.txt.part").write_bytes(CONTENT + b"more")
    get()
    assert get.path.read_bytes() == CONTENT and ranges(server) == [None]


def test_killed_between_the_last_byte_and_the_rename(server, get):
    get.path.parent.mkdir()
    get.path.with_name("file.txt.part").write_bytes(CONTENT)
    get.path.with_name("file.txt.part.etag").write_text(server.etag)
    get(size=None)  # 416: nothing left to send
    assert get.path.read_bytes() == CONTENT and ranges(server) == [f"bytes={len(CONTENT)}-"]


def test_416_where_something_should_be_left(server, get):
    server.faults = [cut(100_000), status(416)]
    get()
    assert get.path.read_bytes() == CONTENT and ranges(server) == [None, "bytes=100000-", None]


def test_a_wrong_checksum(server, get):
    server.content = b"y" * len(CONTENT)
    with pytest.raises(DownloadError, match="what came has the SHA-256 [0-9a-f]{64} instead of " + SHA256):
        get()
    assert not get.path.exists() and len(server.requests) == 1
    assert get.path.with_name("file.txt.part").stat().st_size == 0


def test_another_size_is_seen_before_the_download(server, get):
    server.content = CONTENT[:-1]
    with pytest.raises(DownloadError, match="has 307,199 bytes instead of 307,200"):
        get()


def test_redirects_are_followed_and_what_they_state_is_checked(server, get):
    hub = {"X_Linked_Etag": f'"{SHA256}"', "X_Linked_Size": str(len(CONTENT))}
    server.faults = [status(302, Location="/elsewhere", **hub), cut(1000), status(307, Location="/x", **hub)]
    assert get(size=None, sha256=None) == SHA256
    assert ranges(server) == [None, None, "bytes=1000-", "bytes=1000-"]
    get.path.unlink()
    server.content = b"y" * len(CONTENT)
    server.faults = [status(302, Location="/elsewhere", **hub)]
    with pytest.raises(DownloadError, match="instead of " + SHA256):
        get(size=None, sha256=None)
    server.faults = [status(302, Location="/elsewhere", **hub)]
    with pytest.raises(DownloadError, match=f"another SHA-256, {SHA256}"):
        get(sha256="0" * 64)


def test_redirects_in_a_circle(server, get):
    server.faults = [status(302, Location="/file.txt")] * 20
    with pytest.raises(DownloadError, match="the server redirects in a circle"):
        get()


@pytest.mark.parametrize("target", ["http://example.org/file", "file:///etc/passwd", "ftp://example.org/file"])
def test_a_redirect_from_https_to_less_is_refused(target):
    request = downloads.urllib.request.Request("https://example.org/file")
    with pytest.raises(DownloadError, match=f"example.org redirects to {target}, which is not https"):
        downloads._Redirects().redirect_request(request, None, 302, "Found", {}, target)


@pytest.mark.parametrize(("code", "words"), [(404, "Not Found"), (403, "Forbidden"), (410, "Gone"), (416, "part")])
def test_a_refusal_is_one_sentence(server, get, code, words):
    server.faults = [status(code)] * 9
    with pytest.raises(DownloadError, match=words):
        get()
    assert len(server.requests) == (6 if code == 416 else 1)


def test_a_busy_server_is_asked_again(server, get):
    server.faults = [status(503), status(429), status(500)]
    get()
    assert get.path.read_bytes() == CONTENT and get.waits == [1.0, 2.0, 4.0]


def test_a_server_that_hangs(server, get):
    def hang(handler):
        if "Range" in handler.headers:
            return handler.serve()
        handler.answer(200, {}, len(CONTENT))
        handler.wfile.write(CONTENT[:100_000])
        return server.released.wait(200)

    server.faults = [hang] * 100
    get(timeout=0.2, tries=100)  # on a busy machine so short a time passes before or after it hangs, too
    resumed = next(asked for asked in ranges(server) if asked)
    assert get.path.read_bytes() == CONTENT and 0 < int(resumed[len("bytes=") : -1]) <= 100_000


def test_answers_that_are_not_http(server, get):
    server.faults = [lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")] * 2
    with pytest.raises(DownloadError, match="the connection was cut"):
        get(tries=2)


def test_no_network_is_said_at_once(get):
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and never listens; nobody else gets the port meanwhile
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/file.txt"
        with pytest.raises(DownloadError, match=r"127.0.0.1:\d+ can't be reached \(Connection refused\)"):
            get(url=url)
    assert get.waits == []


def test_a_proxy_of_the_environment_is_used(server, get, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    get(url="http://example.invalid/file.txt")
    assert server.requests[0]["Host"] == "example.invalid" and get.path.read_bytes() == CONTENT


def test_too_little_room_is_seen_before(server, get):
    server.faults = [lambda handler: handler.answer(200, {}, 10**18)]
    with pytest.raises(UserError, match=r"has .*B free, and the download needs 1000000.0 TB: free some room"):
        get(size=10**18)
    assert len(server.requests) == 1 and not get.path.with_name("file.txt.part").stat().st_size


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "disk of .* is full: free some room"), (errno.EIO, "can't be written to")]
)
def test_a_full_disk_loses_nothing(server, get, monkeypatch, number, message):
    class Full:
        """The .part file on a disk that is full after 100 kB."""

        def __init__(self, file):
            self.file = file

        def write(self, chunk):
            room = 100_000 - os.fstat(self.fileno()).st_size
            if not room:
                raise OSError(number, os.strerror(number))
            return self.file.write(chunk[:room])

        def __getattr__(self, name):
            return getattr(self.file, name)

    made = downloads._Download
    with monkeypatch.context() as patch:
        patch.setattr(downloads, "_Download", lambda url, name, file, *rest: made(url, name, Full(file), *rest))
        with pytest.raises(UserError, match=message):
            get()
    get()
    assert ranges(server)[-1] == "bytes=100000-" and get.path.read_bytes() == CONTENT


def test_a_folder_that_can_not_be_made(get):
    get.path.parent.write_text("a file")
    with pytest.raises(UserError, match="downloads can't be written to"):
        get()


def test_two_at_once_download_once(server, get):
    """As two processes do: the lock belongs to an open file, and each call opens its own."""
    entered, seen, results = threading.Event(), [], []

    def slowly(handler):
        entered.set()
        while not any("another process" in what for what, _, _ in seen):
            time.sleep(0.01)
        handler.serve()

    server.faults = [slowly]
    first = threading.Thread(target=lambda: results.append(get()), daemon=True)
    first.start()
    assert entered.wait(200)
    results.append(get(progress=lambda *report: seen.append(report)))
    first.join()
    assert results == [SHA256, SHA256] and len(server.requests) == 1 and left(get) == ["file.txt"]


def test_no_bar_without_a_terminal(capsys):
    with downloads.bar() as report:
        report("file.txt", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_the_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(downloads.sys.stderr, "isatty", lambda: True)
    with downloads.bar() as report:
        report("first.txt", 500_000, 1_000_000)
        report("second[1].txt", 250_000, None)
    out, err = capsys.readouterr()
    assert out == "" and "second[1].txt" in err
