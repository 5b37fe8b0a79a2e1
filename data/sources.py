"""Remote sources of shards: http(s), S3, or the output of a command.

A source gives the bytes of a file from an offset on. It does not retry: `fetch` does, and continues where it was cut.
What a source says is untrusted: never more bytes than were asked for, no control characters in a message.
"""

import contextlib
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

import urllib3

from .addresses import origin, redirected, shown, split

CHUNK_BYTES = 1 << 18
MOST_REDIRECTS = 10
WHOLE_FILES = "set data.fetch=shards"
_AT_ONCE = 32  # connections of a process
_TOLD = 500  # characters that a message repeats of what a source said


Value = TypeVar("Value")


class SourceError(OSError):
    """What a source could not give; the message names it."""


class LostError(SourceError):
    """A failure that may pass: trying again makes sense."""


class Source(Protocol):
    """Gives files of a remote folder by name, from an offset on."""

    def address(self, name: str) -> str:
        """The address of a file as messages show it, without secrets."""
        ...

    def read(self, name: str, offset: int, end: int | None = None) -> Generator[bytes, None, None]:
        """The bytes of a file from an offset on, in pieces; of no more than those before `end`, where it is given.

        Raises LostError and SourceError.
        """
        ...

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        """The sizes of files in bytes, None for those that are not there; empty where that cannot be known."""
        ...


def source_of(location: str, timeout_seconds: float) -> Source:
    """The source at `location`: http(s)://host/folder, s3://bucket/prefix, or pipe:COMMAND with {} for a file's name.

    timeout_seconds: how long a connection may be silent. Raises ValueError for what is no such address.
    """
    if location.startswith("pipe:"):
        return Pipe(location.removeprefix("pipe:"), timeout_seconds)
    if location.startswith("s3://"):
        return S3(location, timeout_seconds)
    return Http(location, timeout_seconds)


def fetch(
    source: Source,
    name: str,
    write: Callable[[bytes], Any],
    *,
    size: int,
    exact: bool = True,
    offset: int = 0,
    end: int | None = None,
    attempts: int,
) -> None:
    """Write a file from `offset` on, in as many attempts as it takes, each going on where the last one ended.

    Waits between two attempts that brought nothing, twice as long each time. size: of the whole file in bytes; the most
    it may have, where that is not known exactly. end: where the part ends that is wanted, if it is not all of the file.
    No byte beyond either is written. Raises SourceError after `attempts` that brought nothing in a row, or when trying
    again is of no use.
    """
    failures = 0
    last = size if end is None else end
    while True:
        try:
            with contextlib.closing(source.read(name, offset, end)) as pieces:
                for piece in pieces:
                    if offset + len(piece) > last:
                        limit = f"the {last} bytes of the index" if exact else f"{last} bytes, the most that are read"
                        raise SourceError(f"has more than {limit}")
                    write(piece)
                    offset += len(piece)
                    failures = 0
            if offset == last or not exact:
                return
            raise LostError(f"ended after {offset} of {last} bytes")
        except LostError as error:
            failures += 1
            if failures >= attempts:
                raise SourceError(f"{source.address(name)}: {error}; gave up after {attempts} attempts") from error
            time.sleep(min(30.0, 0.25 * 2**failures) * random.uniform(0.5, 1))
        except SourceError as error:
            raise SourceError(f"{source.address(name)}: {error}") from error


def _told(text: object) -> str:
    """What a source said, or an error about it, as a message may repeat it."""
    return shown(text)[:_TOLD]


def _range(offset: int, end: int | None) -> str:
    return f"bytes={offset}-{'' if end is None else end - 1}"


class PerProcess(Generic[Value]):
    """A value that every process makes for itself: a client's locks do not survive a fork."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._made: tuple[int, Value] | None = None

    def __call__(self) -> Value:
        made = self._made
        if made is None or made[0] != os.getpid():
            self._made = made = (os.getpid(), self._make())
        return made[1]


class Http:
    """Files below an http(s) address. A login is for the host in the address: no redirect carries it elsewhere."""

    def __init__(self, location: str, timeout_seconds: float) -> None:
        try:
            parts = split(location)
        except ValueError as error:
            raise ValueError(f"{shown(location)}: {error}") from None
        login, _, host = parts.netloc.rpartition("@")
        self._login = urllib3.make_headers(basic_auth=unquote(login)) if login else {}
        self._folder, self._query = f"{parts.scheme}://{host}{parts.path.rstrip('/')}", parts.query
        timeout = urllib3.Timeout(connect=timeout_seconds, read=timeout_seconds)
        self._pool = PerProcess(lambda: urllib3.PoolManager(maxsize=_AT_ONCE, timeout=timeout, retries=False))

    def address(self, name: str) -> str:
        return shown(f"{self._folder}/{quote(name)}")

    def read(self, name: str, offset: int, end: int | None = None) -> Generator[bytes, None, None]:
        response, where = self._request("GET", name, {"Range": _range(offset, end)} if offset or end else {})
        try:
            if offset and response.status == 416:  # nothing is left
                return
            _check(response, where)
            if end and response.status != 206:
                raise SourceError(f"the server{where} gives no parts of files; {WHOLE_FILES}")
            skipped = 0 if response.status == 206 else offset  # a server without ranges sends all of it
            while piece := response.read1(CHUNK_BYTES, decode_content=False):
                kept, skipped = piece[skipped:], max(0, skipped - len(piece))
                if kept:
                    yield kept
        except urllib3.exceptions.HTTPError as error:
            raise LostError(f"the connection was lost ({_told(error)})") from error
        finally:
            response.close()

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            found = dict(zip(names, pool.map(self._size, names), strict=True))
        return {name: size for name, size in found.items() if size != -1}

    def _size(self, name: str) -> int | None:
        """-1 where the server does not say, or not now: what is fetched is checked then."""
        try:
            response, _ = self._request("HEAD", name, {})
        except LostError:
            return -1
        except SourceError as error:
            raise SourceError(f"{self.address(name)}: {error}") from error
        response.release_conn()
        if response.status in (404, 410):
            return None
        length = response.headers.get("Content-Length", "")
        said = response.status == 200 and not _encoding(response) and re.fullmatch(r"[0-9]{1,18}", length)
        return int(length) if said else -1

    def _request(self, method: str, name: str, headers: dict[str, str]) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The answer, and who gave it if it was not the host that was asked."""
        url = first = f"{self._folder}/{quote(name)}" + (f"?{self._query}" if self._query else "")
        headers = {**headers, "Accept-Encoding": "identity", **self._login}
        where, seen = "", {url}
        while True:
            try:
                response = self._pool().request(
                    method, url, headers=headers, preload_content=False, decode_content=False, redirect=False
                )
            except urllib3.exceptions.HTTPError as error:
                raise LostError(f"the server{where} cannot be reached ({_told(error)})") from error
            location = response.headers.get("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return response, where
            if re.fullmatch(r"[0-9]{1,5}", response.headers.get("Content-Length", "")):
                response.drain_conn()
            else:  # unread: what it says beside the address may have no end
                response.close()
            try:
                url = redirected(url, location)
            except ValueError as error:
                raise SourceError(f"the server{where} answered {response.status}: {error}") from error
            if url in seen or len(seen) > MOST_REDIRECTS:
                what = "in a circle" if url in seen else f"more than {MOST_REDIRECTS} times"
                raise SourceError(f"the server{where} redirects {what}, to {shown(url)[:200]}")
            seen.add(url)
            if origin(url) != origin(first):  # not even on the way back: where to was somebody else's choice
                headers.pop("authorization", None)
            where = f" at {shown(url)[:200]}"


def _encoding(response: urllib3.BaseHTTPResponse) -> str:
    encoding = response.headers.get("Content-Encoding", "").strip()
    return "" if encoding.lower() == "identity" else encoding


def _check(response: urllib3.BaseHTTPResponse, where: str) -> None:
    status = f"the server{where} answered {response.status} {_told(response.reason or '')}".rstrip()
    if response.status >= 500 or response.status in (408, 429):
        raise LostError(status)
    if response.status not in (200, 206):
        raise SourceError(status)
    if encoding := _encoding(response):
        # A few bytes of it may stand for any number, and neither sizes nor offsets would be those of the file.
        raise SourceError(f"the server{where} sends it compressed ({_told(encoding)}), though asked for it as it is")


class S3:
    """Files below s3://bucket/prefix, read with boto3, which finds the login."""

    def __init__(self, location: str, timeout_seconds: float) -> None:
        parts = urlsplit(location)
        if "@" in parts.netloc:
            raise ValueError(
                f"{shown(location)}: a login has no place in s3://; set AWS_PROFILE, or the keys beside it"
            )
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")
        self._timeout_seconds = timeout_seconds
        self._client = PerProcess(self._connected)

    def _connected(self) -> Any:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise SourceError("reading s3:// needs boto3: pip install 'ddetr[s3]'") from error
        seconds = self._timeout_seconds
        once = {"total_max_attempts": 1}
        config = Config(connect_timeout=seconds, read_timeout=seconds, retries=once, max_pool_connections=_AT_ONCE)
        return boto3.Session().client("s3", config=config)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")

    def address(self, name: str) -> str:
        return shown(f"s3://{self._bucket}/{self._key(name)}")

    def read(self, name: str, offset: int, end: int | None = None) -> Generator[bytes, None, None]:
        with _s3_errors():
            try:
                wanted = {"Bucket": self._bucket, "Key": self._key(name), "Range": _range(offset, end)}
                found = self._client().get_object(**wanted)
            except self._client().exceptions.ClientError as error:
                if error.response["Error"]["Code"] == "InvalidRange":  # nothing is left
                    return
                raise
            with contextlib.closing(found["Body"]) as body:
                yield from body.iter_chunks(CHUNK_BYTES)

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        found: dict[str, int] = {}
        with _s3_errors():
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._key("")):
                found |= {entry["Key"]: entry["Size"] for entry in page.get("Contents", ())}
        return {name: found.get(self._key(name)) for name in names}


@contextlib.contextmanager
def _s3_errors() -> Iterator[None]:
    """Turns botocore's errors into ours."""
    import botocore.exceptions as botocore

    try:
        yield
    except botocore.ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        kind = LostError if status >= 500 or status in (408, 429) else SourceError
        raise kind(f"S3 answered: {_told(error)}") from error
    except (botocore.NoCredentialsError, botocore.PartialCredentialsError) as error:
        raise SourceError(f"{_told(error)}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from error
    except (botocore.BotoCoreError, urllib3.exceptions.HTTPError) as error:
        raise LostError(f"the connection to S3 was lost ({_told(error)})") from error


class Pipe:
    """The standard output of a shell command."""

    def __init__(self, command: str, timeout_seconds: float) -> None:
        if "{}" not in command:
            raise ValueError(
                f"{shown(f'pipe:{command}')} needs {{}} in place of a file's name, as in pipe:ssh host cat /data/{{}}"
            )
        self._command, self._timeout_seconds = command, timeout_seconds

    def address(self, name: str) -> str:
        return shown("pipe:" + self._command.replace("{}", name))

    def read(self, name: str, offset: int, end: int | None = None) -> Generator[bytes, None, None]:
        if end is not None:
            raise SourceError(f"a command gives no parts of files; {WHOLE_FILES}")
        command = self._command.replace("{}", shlex.quote(name))
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                ["/bin/sh", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                skipped = offset
                while piece := self._piece(process.stdout.fileno()):
                    kept, skipped = piece[skipped:], max(0, skipped - len(piece))
                    if kept:
                        yield kept
                try:
                    status = process.wait(self._timeout_seconds)
                except subprocess.TimeoutExpired as error:
                    raise LostError(f"the command did not end within {self._timeout_seconds:g} s") from error
                if status:
                    said.seek(-min(said.seek(0, os.SEEK_END), 4 * _TOLD), os.SEEK_END)
                    text = shown(said.read().decode(errors="replace").strip())[-_TOLD:]
                    raise LostError(f"the command ended with status {process.returncode}: {text}")
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()

    def _piece(self, descriptor: int) -> bytes:
        if not select.select([descriptor], [], [], self._timeout_seconds)[0]:
            raise LostError(f"the command was silent for {self._timeout_seconds:g} s")
        return os.read(descriptor, CHUNK_BYTES)

    def sizes(self, names: list[str]) -> dict[str, int | None]:
        return {}
