"""Addresses of sources: how messages show them without their secrets, and where a redirect may lead."""

import re
from urllib.parse import SplitResult, urljoin, urlsplit

from .text import visible

RAY_ADDRESS = re.compile(r"auto|local|(ray://)?(\[[0-9A-Fa-f:.]+\]|[\w.-]+):[0-9]{1,5}", re.ASCII)  # of a cluster
# From where a scheme's characters begin, so that a long text of them is not looked through from each one again.
_URL = re.compile(r"((?<![a-z0-9+.\-])[a-z0-9+.\-]+://|https?:/)(\S*)", re.IGNORECASE)
_LOGIN = re.compile(r"[^\s:@/'\"=,]+:(?!/)[^\s@]+@")  # without a scheme, as a command may take it


def shown(location: object) -> str:
    """A location, or a text that holds some, as a message may show it: on one line, logins and queries left out.

    User, password, query and fragment of every URL are removed, from a pipe's command also `user:password@` without a
    scheme. Other secrets of a command (options, headers) cannot be recognised and stay.
    """
    text = _URL.sub(_without_secrets, str(location))
    return visible(_LOGIN.sub("", text) if "pipe:" in text else text)


def _without_secrets(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition("]")[2].partition(":")[2]
    if "@" in authority:
        rest = rest[authority.rindex("@") + 1 :]
    elif "@" in rest and port and not port.isdecimal():  # no port, but a password that holds one of /?#
        rest = rest[rest.rindex("@") + 1 :]
    bare = re.split(r"[?#]", rest, maxsplit=1)[0]
    return scheme + bare + "?..." * (bare != rest)


def split(url: str) -> SplitResult:
    """The parts of an http(s) URL with a host and a valid port. Raises ValueError, which shows nothing of it."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0):
            return parts
    except ValueError:  # names what it could not read, which may be a password
        pass
    raise ValueError("not a valid http:// or https:// address")


def origin(url: str) -> tuple[str, str | None, int]:
    """Scheme, host and port: who gets a login meant for this URL."""
    parts = split(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]


def redirected(url: str, location: str) -> str:
    """Where a redirect from `url` leads; a login in it is dropped. Raises ValueError for where it must not lead."""
    try:
        parts = split(urljoin(url, location))
    except ValueError:
        raise ValueError(f"it redirects to {shown(location)[:200]}, which is no http:// or https:// address") from None
    if origin(url)[0] == "https" and parts.scheme != "https":
        raise ValueError(f"it redirects from https to {shown(location)[:200]}, which is not encrypted")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()
