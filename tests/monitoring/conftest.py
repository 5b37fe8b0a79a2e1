"""A real Prometheus on loopback, with the shipped configuration at a shorter interval."""

import json
import math
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

HERE = Path(__file__).resolve().parent
MONITORING = HERE.parents[1] / "monitoring"
sys.path.insert(0, str(HERE))  # tests take their reports from rank_process.py, which is also a program of its own


class Prometheus:
    """A Prometheus process that runs in `folder` on a copy of monitoring/prometheus, with `targets` linked as told."""

    def __init__(self, folder: Path, targets: Path | None):
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("prometheus is not installed (Debian: apt-get install prometheus)")
        shutil.copytree(MONITORING / "prometheus", folder)
        self.folder = folder
        if targets is not None:
            self.link(targets)
        config = yaml.safe_load((folder / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
        config["scrape_configs"][0]["file_sd_configs"][0]["refresh_interval"] = "1s"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.url = f"http://{address}"
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    program,
                    "--config.file=prometheus.yml",
                    "--storage.tsdb.path=storage",
                    f"--web.listen-address={address}",
                    "--log.level=warn",
                ],
                cwd=folder,
                stderr=log,
            )

    def link(self, targets: Path) -> None:
        (self.folder / "targets-demo.json").symlink_to(targets)

    def get(self, path: str, **parameters: str) -> Any:
        """The `data` of an API answer. Raises HTTPError for an expression that Prometheus refuses."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant query that have a number now; each has `metric` (labels) and `value`."""
        series = self.get("query", query=expression)["result"]
        values = [{"metric": item["metric"], "value": float(item["value"][1])} for item in series]
        return [item for item in values if not math.isnan(item["value"])]

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """The first true value of `condition`; fails after `seconds` or when Prometheus ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                pytest.fail(f"prometheus ended with {self.process.returncode}:\n{self.log.read_text()}")
            try:
                if value := condition():
                    return value
            except (urllib.error.URLError, ConnectionError):  # it is still starting
                pass
            time.sleep(0.2)
        return pytest.fail(f"not within {seconds} s: {what}\n{self.log.read_text()}")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[..., Prometheus]]:
    """Call, perhaps with a targets.json, to start a Prometheus on it; it ends with the test."""
    started: list[Prometheus] = []

    def start(targets: Path | None = None) -> Prometheus:
        started.append(Prometheus(tmp_path / f"prometheus_{len(started)}", targets))
        return started[-1]

    yield start
    for process in started:
        process.end()


@pytest.fixture(scope="session")
def dashboard() -> dict[str, Any]:
    return json.loads((MONITORING / "grafana" / "dashboard.json").read_text())


@pytest.fixture(scope="session")
def dashboard_expressions(dashboard: dict[str, Any]) -> dict[str, list[str]]:
    """The expressions of every panel, by the panel's title and id, as Grafana sends them when all runs are chosen."""
    return {
        f"{panel['title']} ({panel['id']})": [target["expr"].replace("$run", ".+") for target in panel["targets"]]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }
