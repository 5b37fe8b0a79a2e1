"""The exporter over real sockets on loopback."""

import json
import os
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from ddetr.launch.record import write_targets
from ddetr.monitoring.exporter import serve
from ddetr.monitoring.metrics import RunMetrics
from prometheus_client.parser import text_string_to_metric_families
from rank_process import step_report


def scrape(url: str) -> dict[str, float]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_serves_the_registry_on_a_free_port():
    metrics = RunMetrics("a", 0)
    with serve(metrics.registry, "127.0.0.1", 0) as exporter:
        host, port = exporter.address.split(":")
        assert host == "127.0.0.1"
        assert int(port) > 0
        assert exporter.url == f"http://127.0.0.1:{port}/metrics"
        assert scrape(exporter.url)["ddetr_steps_total"] == 0
        metrics.observe(step_report(1))
        assert scrape(exporter.url)["ddetr_steps_total"] == 1


def test_a_closed_exporter_frees_its_port_and_thread():
    threads = threading.active_count()
    exporter = serve(RunMetrics("a", 0).registry, "127.0.0.1", 0)
    assert scrape(exporter.url)
    exporter.close()
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(exporter.url, timeout=5)
    assert threading.active_count() == threads
    port = int(exporter.address.split(":")[1])
    with serve(RunMetrics("a", 0).registry, "127.0.0.1", port) as again:
        assert again.address == exporter.address


@pytest.mark.parametrize("said", [b"", b"GET /metr", b"x" * 70_000], ids=["nothing", "half a request", "no request"])
def test_a_client_that_hangs_up_prints_nothing(said: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    """As probes of ports do, which reset the connection."""
    with serve(RunMetrics("a", 0).registry, "127.0.0.1", 0) as exporter:
        host, port = exporter.address.split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(said)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert scrape(exporter.url)["ddetr_steps_total"] == 0
        time.sleep(0.2)  # the thread of the first request ends
    assert capfd.readouterr() == ("", "")


def test_what_fails_within_a_request_is_logged(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no handler")

    with serve(RunMetrics("a", 0).registry, "127.0.0.1", 0) as exporter:
        monkeypatch.setattr(exporter._server, "finish_request", failing)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(exporter.url, timeout=5)
    assert "a request for metrics from ('127.0.0.1', " in caplog.text
    assert "RuntimeError('no handler')" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_a_taken_port_is_one_clear_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is taken.*monitor.port=0"):
            serve(RunMetrics("a", 0).registry, "127.0.0.1", port)


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-name.invalid"])
def test_an_address_of_another_machine_names_the_setting(host: str):
    with pytest.raises(OSError, match=rf"{host}.*"):
        serve(RunMetrics("a", 0).registry, host, 0)
    with pytest.raises(OSError, match=r"monitor\.host"):
        serve(RunMetrics("a", 0).registry, host, 0)


def test_all_interfaces_are_announced_by_the_name_of_the_machine():
    with serve(RunMetrics("a", 0).registry, "0.0.0.0", 0) as exporter:
        name, port = exporter.address.rsplit(":", 1)
        assert name == socket.gethostname()
        assert "ddetr_steps_total" in scrape(f"http://127.0.0.1:{port}/metrics")


def test_ipv6_addresses_are_bracketed():
    try:
        exporter = serve(RunMetrics("a", 0).registry, "::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with exporter:
        assert exporter.address.startswith("[::1]:")
        assert "ddetr_steps_total" in scrape(exporter.url)


def test_targets_are_written_for_file_service_discovery(tmp_path: Path):
    path = tmp_path / "targets.json"
    write_targets(path, [("n0:9400", {"run": "a", "rank": "0"}), ("n1:9401", {"run": "a", "rank": "1"})])
    assert json.loads(path.read_text()) == [
        {"targets": ["n0:9400"], "labels": {"run": "a", "rank": "0"}},
        {"targets": ["n1:9401"], "labels": {"run": "a", "rank": "1"}},
    ]
    write_targets(path, [])
    assert json.loads(path.read_text()) == []
    assert os.listdir(tmp_path) == ["targets.json"]


def test_targets_are_never_seen_half_written(tmp_path: Path):
    path = tmp_path / "targets.json"
    write_targets(path, [])
    torn: list[Exception] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                json.loads(path.read_text())
            except (ValueError, OSError) as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for size in range(200):
        write_targets(path, [(f"n{index}:9400", {"rank": str(index)}) for index in range(size)])
    done.set()
    reader.join()
    assert not torn
