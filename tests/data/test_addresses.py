"""What of a location is told, and where a redirect may lead."""

import time

import pytest
from ddetr.data.addresses import origin, redirected, shown

SECRETS = [
    ("http://me:secret@host/shards", "http://host/shards"),
    ("https://secret@host:8443/a?token=secret#secret", "https://host:8443/a?..."),
    ("https://me:se@cret@host/a", "https://host/a"),
    ("https://me:se/cret@host/a", "https://host/a"),
    ("https://me:p?secret@host/a", "https://host/a"),
    ("HTTPS://me:secret@host/a", "HTTPS://host/a"),
    ("https:/me:secret@host/a", "https:/host/a"),
    ("ftp://me:secret@host/a", "ftp://host/a"),
    ("1http://me:secret@host/a", "1http://host/a"),
    ("s3://me:secret@bucket/a", "s3://bucket/a"),
    ("https://[::1]:8000/a?secret", "https://[::1]:8000/a?..."),
    ("pipe:curl -s https://me:secret@host/{}", "pipe:curl -s https://host/{}"),
    ("pipe:curl -s 'https://host/{}?a=secret' | cat", "pipe:curl -s 'https://host/{}?... | cat"),
    ("pipe:curl -su me:secret@host/{}", "pipe:curl -su host/{}"),
    ("two: http://me:secret@a/ and https://b?secret", "two: http://a/ and https://b?..."),
]
PLAIN = [
    "shards/train",
    "/data/a@b:c/train",
    "https://host/package@1.0/train",
    "http://127.0.0.1:8000/train",
    "s3://bucket/prefix",
    "pipe:ssh me@host cat /data/train/{}",
]


@pytest.mark.parametrize(("location", "expected"), SECRETS)
def test_logins_and_queries_are_not_shown(location, expected):
    assert shown(location) == expected
    assert shown(shown(location)) == expected


@pytest.mark.parametrize("location", PLAIN)
def test_the_rest_is_shown_as_it_is(location):
    assert shown(location) == location


def test_nothing_that_a_terminal_obeys_is_shown():
    assert shown("shards\x1b[31m\n") == r"shards\x1b[31m\n"


@pytest.mark.parametrize(
    ("url", "location", "expected"),
    [
        ("http://host/a/b?q=1", "c", "http://host/a/c"),
        ("http://host/a/b", "/c?d=1#e", "http://host/c?d=1"),
        ("http://host/a", "//other:81/c", "http://other:81/c"),
        ("http://host/a", "https://me:secret@other/c", "https://other/c"),
        ("https://host/a", "https://other/c", "https://other/c"),
    ],
)
def test_redirects_lead_on_without_a_login(url, location, expected):
    assert redirected(url, location) == expected


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("http://me:secret@host/a", "from https to http://host/a, which is not encrypted"),
        ("//[::1/a", "no http:// or https:// address"),
        ("file:///etc/passwd", "no http:// or https:// address"),
        ("ftp://me:secret@host/a", "to ftp://host/a, which is no http"),
        ("data:,a", "no http:// or https:// address"),
        ("https://host:secret/a", "no http:// or https:// address"),
    ],
)
def test_redirects_lead_nowhere_else(location, message):
    with pytest.raises(ValueError, match=message) as error:
        redirected("https://host/", location)
    assert "me:" not in str(error.value)


def test_a_long_text_is_looked_through_once():
    begin = time.monotonic()
    assert shown("a" * 1_000_000) == "a" * 1_000_000
    assert shown("a" * 1_000_000 + "://me:secret@host") == "a" * 1_000_000 + "://host"
    assert time.monotonic() - begin < 20


def test_an_origin_is_scheme_host_and_port():
    assert origin("http://host/a") == origin("http://HOST:80/b")
    assert len({origin(url) for url in ("http://host", "https://host", "http://host:443", "http://other")}) == 4
