"""Redirects of real servers: followed where they may lead, without the login, and never without end."""

import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from ddetr.data.cache import open_shards
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.sources import MOST_REDIRECTS, SourceError

from tests.data.hostile_server import HostileServer, certificate_in, files, reply
from tests.data.test_sources import SEEN, assert_same_epoch

Serve = Callable[..., HostileServer]
LOGIN = "Basic bWU6c2VjcmV0"  # me:secret


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    values = {"workers": 0, "cache": str(tmp_path / "cache"), "fetch_attempts": 3, "fetch_timeout_seconds": 5}
    return DataConfig.model_validate({**SEEN, **values})


@pytest.fixture
def serve() -> Iterator[Serve]:
    servers: list[HostileServer] = []

    def start(answer: Callable[[BaseHTTPRequestHandler], None], certificate: Path | None = None) -> HostileServer:
        servers.append(HostileServer(answer, certificate))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def with_login(server: HostileServer) -> str:
    return server.url.replace("://", "://me:secret@")


@pytest.mark.parametrize("fetch", ["shards", "samples"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_elsewhere_is_followed_without_the_login(serve, synthetic_shards, config, status, fetch):
    there = serve(files(synthetic_shards))
    here = serve(lambda handler: reply(handler, status, b"elsewhere", Location=f"{there.url}{handler.path}"))
    config = config.model_copy(update={"fetch": fetch})
    assert_same_epoch(f"{with_login(here)}/set", synthetic_shards, config)
    assert here.logins() == {LOGIN}
    assert there.logins() == {None}
    asked = {(method, "range" in headers) for method, _, headers in there.requests}
    assert asked == {("GET", False), ("HEAD", False)} | ({("GET", True)} if fetch == "samples" else set())
    assert all(headers["accept-encoding"] == "identity" for _, _, headers in there.requests)


def test_a_relative_redirect_keeps_the_login_and_an_absolute_one_to_another_port_loses_it_for_good(
    serve, synthetic_shards, config
):
    def answer(handler: BaseHTTPRequestHandler) -> None:
        if handler.path.startswith("/set/"):
            reply(handler, 302, Location=f"../moved/{Path(handler.path).name}")
        elif handler.path.startswith("/moved/"):
            reply(handler, 302, Location=f"http://you:told@{there.host}{handler.path}")
        else:
            files(synthetic_shards)(handler)

    here = serve(answer)
    there = serve(lambda handler: reply(handler, 302, Location=f"{here.url}/back/{Path(handler.path).name}"))
    assert_same_epoch(f"{with_login(here)}/set", synthetic_shards, config)
    assert there.logins() == {None}
    for path, login in (("/set/", LOGIN), ("/moved/", LOGIN), ("/back/", None)):
        found = {headers.get("authorization") for _, at, headers in here.requests if at.startswith(path)}
        assert found == {login}


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("{}", r"redirects in a circle, to http://127.0.0.1"),
        ("{}?1{}", rf"redirects more than {MOST_REDIRECTS} times, to http://\S+\?\.\.\."),
        ("file:///etc/passwd", r"redirects to file:///etc/passwd, which is no http:// or https:// address"),
        ("ftp://me:secret@127.0.0.1/a", r"redirects to ftp://127.0.0.1/a, which is no http"),
    ],
)
def test_redirects_that_lead_nowhere_end_at_once_in_one_line(serve, config, location, message):
    server = serve(lambda handler: reply(handler, 302, Location=location.replace("{}", handler.path)))
    begin = time.monotonic()
    with pytest.raises(SourceError, match=rf"^{server.url}/index.json: the server.* {message}") as error:
        open_shards(with_login(server), config)
    assert len(server.requests) <= MOST_REDIRECTS + 1
    assert "gave up" not in str(error.value)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)
    assert time.monotonic() - begin < 20


@pytest.mark.integration
def test_https_is_never_left_for_http(serve, synthetic_shards, config, tmp_path, monkeypatch):
    certificate = certificate_in(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    plain, there = serve(files(synthetic_shards)), serve(files(synthetic_shards), certificate)
    down = serve(lambda handler: reply(handler, 301, Location=f"{plain.url}{handler.path}"), certificate)
    up = serve(lambda handler: reply(handler, 301, Location=f"{there.url}{handler.path}"))
    along = serve(lambda handler: reply(handler, 301, Location=f"{there.url}{handler.path}"), certificate)
    with pytest.raises(SourceError, match=rf"redirects from https to {plain.url}/index.json, which is not encrypted"):
        open_shards(with_login(down), config)
    assert not plain.requests
    for server in (up, along):
        assert open_shards(with_login(server), config).num_samples == ShardIndex.load(synthetic_shards).num_samples
        assert server.logins() == {LOGIN}
    assert there.logins() == {None}
    # The certificate is really looked at.
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(SourceError, match=r"cannot be reached.*certificate"):
        open_shards(there.url, config.model_copy(update={"fetch_attempts": 1}))
