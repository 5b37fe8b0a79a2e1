"""What is said where S3 cannot be read; that it is read, `test_sources.py` shows with a server."""

import socket
import sys
from collections.abc import Iterator

import pytest
from ddetr.data.sources import LostError, SourceError, source_of


@pytest.fixture(autouse=True)
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[str]:
    """An endpoint where nobody listens, and no login but what a test gives."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield url


def read(location: str = "s3://sets/coco") -> bytes:
    return b"".join(source_of(location, 1).read("index.json", 0))


def test_a_missing_login_is_asked_for() -> None:
    with pytest.raises(
        SourceError, match=r"credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET"
    ) as error:
        read()
    assert not isinstance(error.value, LostError), "trying again is of no use"


def test_a_lost_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch, unreachable: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    with pytest.raises(LostError, match=rf'the connection to S3 was lost \(.*"{unreachable}/sets/coco/index.json"'):
        read()


def test_a_login_in_the_address_is_refused_unread() -> None:
    with pytest.raises(ValueError, match=r"a login has no place in s3://; set AWS_PROFILE") as error:
        source_of("s3://me:secret@sets/coco", 1)
    assert "secret" not in str(error.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(SourceError, match=r"reading s3:// needs boto3: pip install 'ddetr\[s3\]'"):
        read()
