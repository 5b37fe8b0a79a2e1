"""What servers and commands may say: nothing of it is believed, stored without end or shown raw."""

import gzip
import os
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from ddetr.data.cache import FOLDER, open_shards
from ddetr.data.config import DataConfig
from ddetr.data.layout import INDEX_NAME
from ddetr.data.sources import SourceError

from tests.data.hostile_server import HostileServer, files, reply
from tests.data.test_index import changed, first, sample


@pytest.fixture(scope="module")
def index_json(synthetic_shards: Path) -> str:
    return (synthetic_shards / INDEX_NAME).read_text()


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    values = {"remainder": "pad", "short_sides": (64,), "validation_short_side": 64, "long_side": 128, "workers": 0}
    return DataConfig(cache=str(tmp_path / "cache"), fetch_attempts=2, fetch_timeout_seconds=5, **values)


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], HostileServer]]:
    servers: list[HostileServer] = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None]) -> HostileServer:
        servers.append(HostileServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("fetch", ["shards", "samples"])
def test_a_servers_bad_index_makes_nothing_be_asked_for_or_written(
    serve, synthetic_shards, index_json, config, tmp_path, fetch
):
    (tmp_path / "outside").write_text("mine")
    os.utime(tmp_path / "outside", (1, 1))
    body = b""
    server = serve(lambda handler: reply(handler, 200, body))
    for change in (
        lambda i: first(i).update(sha256="../../outside"),
        lambda i: first(i).update(name="../outside.tar"),
        lambda i: sample(i).update(image_offset=-1),
        lambda i: sample(i).update(image_bytes=10**30),
    ):
        body = changed(index_json, change)
        with pytest.raises(ValueError, match=rf"{server.url}/set/index.json: not a usable index"):
            open_shards(f"{server.url}/set", config.model_copy(update={"fetch": fetch}))
    assert {path for _, path, _ in server.requests} == {"/set/index.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (tmp_path / "outside").stat().st_mtime == 1


def test_a_shard_of_a_petabyte_is_refused_before_anything_is_fetched(serve, index_json, config):
    body = changed(index_json, lambda i: first(i).update(bytes=10**15))
    server = serve(lambda handler: reply(handler, 200, body))
    with pytest.raises(ValueError, match=r"shard-000000.tar has 1000000000000000 bytes, data.cache_bytes="):
        open_shards(server.url, config)
    assert {path for _, path, _ in server.requests} == {"/index.json"}
    assert not Path(config.cache).exists()


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    while True:
        handler.wfile.write(b"[" * (1 << 20))


@pytest.mark.integration
@pytest.mark.parametrize("remote", ["http", "pipe"])
def test_an_endless_index_is_cut_off(serve, config, monkeypatch, remote):
    monkeypatch.setattr("ddetr.data.cache.MOST_INDEX_BYTES", 8 << 20)
    location = serve(endless).url if remote == "http" else "pipe:yes {}"
    with pytest.raises(SourceError, match=rf"index.json: has more than {8 << 20} bytes, the most that are read"):
        open_shards(location, config)


def test_nothing_is_decompressed(serve, index_json, config):
    packed = gzip.compress(index_json.encode())
    server = serve(lambda handler: reply(handler, 200, packed, Content_Encoding="gzip"))
    with pytest.raises(SourceError, match=r"sends it compressed \(gzip\), though asked for it as it is"):
        open_shards(server.url, config)
    assert len(server.requests) == 1
    assert server.requests[0][2]["accept-encoding"] == "identity"


@pytest.mark.integration
def test_what_a_server_and_a_command_say_cannot_steer_a_terminal(serve, config):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.1 403 \x1b[31m\xc2\x9b2J no\r\nContent-Length: 0\r\n\r\n")

    command = r"pipe:printf '\033[31mno\n\033]0;title\007 http://me:secret@host/' >&2; false {}"
    for location in (serve(answer).url, command):
        with pytest.raises(SourceError) as error:
            open_shards(location, config)
        assert r"\x1b[31m" in str(error.value)
        assert str(error.value).isprintable()
        assert "secret" not in str(error.value)


@pytest.mark.parametrize("length", ["-5", "many", "9" * 5000, "1, 2"])
def test_a_length_that_is_none_is_no_size(serve, synthetic_shards, config, length):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD":
            handler.wfile.write(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n".encode())
            handler.close_connection = True
        else:
            files(synthetic_shards)(handler)

    index = open_shards(serve(answer).url, config)
    index.storage.ensure(index.shards[0])
    assert len(list((Path(config.cache) / FOLDER).glob("*.tar"))) == 1


def test_a_server_that_ends_early_without_a_word_is_asked_for_the_rest(serve, synthetic_shards, config):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        if handler.command == "GET" and handler.path.endswith(".tar") and not wanted:
            handler.send_response(200)
            handler.send_header("Connection", "close")
            handler.end_headers()
            handler.wfile.write((synthetic_shards / Path(handler.path).name).read_bytes()[:1000])
        elif wanted == "bytes=1000-" and len(server.requests) < before + 3:
            reply(handler, 416)  # once more nothing
        else:
            files(synthetic_shards)(handler)

    server = serve(answer)
    index = open_shards(server.url, config.model_copy(update={"fetch_attempts": 3}))
    before = len(server.requests)
    index.storage.ensure(index.shards[0])
    asked = [headers.get("range") for _, _, headers in server.requests[before:]]
    assert asked == [None, "bytes=1000-", "bytes=1000-"]
    with pytest.raises(SourceError, match=rf"{index.shards[1].name}: ended after 1000 of \d+ bytes; gave up after 1 "):
        open_shards(server.url, config.model_copy(update={"fetch_attempts": 1})).storage.ensure(index.shards[1])


def test_a_server_that_sends_who_asks_for_sizes_in_a_circle_is_named(serve, synthetic_shards, config):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.command == "HEAD":
            handler.wfile.write(f"HTTP/1.1 302 Found\r\nLocation: {handler.path}\r\n\r\n".encode())
            handler.close_connection = True
        else:
            files(synthetic_shards)(handler)

    server = serve(answer)
    with pytest.raises(
        SourceError, match=rf"^{server.url}/shard-000000.tar: the server redirects in a circle, to http"
    ):
        open_shards(server.url, config)


@pytest.mark.parametrize("rest", ["", "[::1/set", "host:port/set"])
def test_an_address_without_a_host_or_port_is_refused_without_its_password(rest, config):
    with pytest.raises(ValueError, match=r"^http://.*: not a valid http:// or https:// address") as error:
        open_shards(f"http://me:secret@{rest}", config)
    assert "secret" not in str(error.value)
