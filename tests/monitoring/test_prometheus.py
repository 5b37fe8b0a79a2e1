"""The shipped Prometheus configuration, rules and dashboard, run by Prometheus itself."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ddetr.launch.record import write_targets
from ddetr.monitoring.metrics import METRICS

HERE = Path(__file__).resolve().parent
RULES = HERE.parents[1] / "monitoring" / "prometheus"


def promtool(*arguments: str | Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.integration
def test_promtool_accepts_the_configuration():
    promtool("check", "config", RULES / "prometheus.yml")


@pytest.mark.integration
def test_promtool_accepts_the_rules():
    promtool("check", "rules", RULES / "rules.yml", RULES / "alerts.yml")


@pytest.mark.integration
def test_rules_and_alerts_give_what_was_worked_out_by_hand():
    promtool("test", "rules", HERE / "rules_test.yml", HERE / "throughput_test.yml")


def test_every_rule_and_alert_is_worked_out_by_hand():
    cases = (HERE / "rules_test.yml").read_text()
    for file in ("rules.yml", "alerts.yml"):
        for rule in yaml.safe_load((RULES / file).read_text())["groups"][0]["rules"]:
            assert (rule.get("record") or rule["alert"]) in cases


def test_every_alert_is_explained():
    page = (HERE.parents[1] / "docs" / "operations.md").read_text()
    for rule in yaml.safe_load((RULES / "alerts.yml").read_text())["groups"][0]["rules"]:
        assert f"### {rule['alert']}\n" in page


def test_dashboard_panels_have_units_descriptions_and_room(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = Counter(
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    )
    assert max(cells.values()) == 1, "panels overlap"
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["fieldConfig"]["defaults"]["unit"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all('run=~"$run"' in target["expr"] for target in panel["targets"])


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[tuple[Path, list[subprocess.Popen[str]]]]:
    """A targets.json and the two processes that it names."""
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank_process.py"), "demo", str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    addresses = [process.stdout.readline().strip() for process in processes if process.stdout]
    targets = tmp_path / "targets.json"
    write_targets(targets, [(a, {"run": "demo", "rank": str(rank)}) for rank, a in enumerate(addresses)])
    yield targets, processes
    for process in processes:
        process.communicate(timeout=10)  # closes its standard input, upon which it ends
        assert process.returncode in (0, -signal.SIGKILL)


def images_seen(address: str) -> tuple[float, float]:
    """When an exporter was asked, and the images that it had counted."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        page = answer.read().decode()
    (line,) = [line for line in page.splitlines() if line.startswith("ddetr_images_total{")]
    return time.monotonic(), float(line.rsplit(" ", 1)[1])


@pytest.mark.integration
def test_a_prometheus_without_a_run_is_silent_and_finds_one_that_starts_later(prometheus, ranks):
    """Its log lies in the folder that it watches, where one error would call forth the next."""
    targets, _ = ranks
    server = prometheus()
    server.wait_for(lambda: server.get("targets")["activeTargets"] == [], "an answer, without targets")
    time.sleep(3)
    server.link(targets)
    server.wait_for(lambda: len(server.query("up == 1")) == 2, "both ranks of the run that was linked later")
    assert server.log.stat().st_size < 10_000


@pytest.mark.integration
def test_a_real_prometheus_of_two_ranks(prometheus, ranks, dashboard, dashboard_expressions):
    targets, processes = ranks
    address = json.loads(targets.read_text())[0]["targets"][0]
    server = prometheus(targets)
    begin, images_before = images_seen(address)

    for title, expressions in dashboard_expressions.items():
        for expression in expressions:
            server.wait_for(lambda expression=expression: server.query(expression), f"data for {title}: {expression}")
    recorded = "run_rank:ddetr_data_wait:share5m"  # a rate: exists for a rank once it was scraped twice
    server.wait_for(lambda: len(server.query(recorded)) == 2, "rules for both ranks")
    variable = re.fullmatch(r"label_values\((\w+), (\w+)\)", dashboard["templating"]["list"][1]["definition"])
    assert variable is not None
    assert server.get(f"label/{variable[2]}/values", **{"match[]": variable[1]}) == ["demo"]

    rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    assert {(rule["name"], rule["health"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"} == set()
    for rule in rules:
        if rule["type"] == "recording":
            assert server.query(rule["name"]), f"no data for {rule['name']}"
        else:
            server.get("query", query=rule["query"])  # raises when the expression does not evaluate

    # What the processes reported arrives, and labels are those of the exporter, once.
    assert {(s["metric"]["rank"], s["value"]) for s in server.query("up")} == {("0", 1.0), ("1", 1.0)}
    assert server.query("run:ddetr_ranks:up")[0]["value"] == 2
    shares = {s["metric"]["rank"]: s["value"] for s in server.query(recorded)}
    assert shares == {"0": pytest.approx(0.1), "1": pytest.approx(0.2)}
    # As many images as the exporter itself has counted meanwhile, once although both ranks report them.
    end, images = images_seen(address)
    rate = server.query("run:ddetr_images:rate5m")[0]["value"]
    assert rate == pytest.approx((images - images_before) / (end - begin), rel=0.4)
    assert 0.2 <= server.query("run:ddetr_step_seconds:p50")[0]["value"] <= 0.3
    (precision,) = server.query('ddetr_evaluation_score_ratio{metric="AP"}')
    assert precision["value"] == pytest.approx(0.2)
    assert set(precision["metric"]) == {"__name__", "instance", "job", "run", "rank", "metric"}

    # Nothing is stored that is not declared.
    declared = {metric.name for metric in METRICS if metric.kind != "histogram"}
    declared |= {f"{m.name}_{end}" for m in METRICS if m.kind == "histogram" for end in ("bucket", "count", "sum")}
    stored = {name for name in server.get("label/__name__/values") if name.startswith("ddetr_")}
    assert stored == declared

    # A rank that dies is reported; a run that ended is forgotten.
    processes[1].kill()

    def missing() -> list[dict]:
        return [a for a in server.get("alerts")["alerts"] if a["labels"]["alertname"] == "DdetrRankMissing"]

    alert = server.wait_for(missing, "an alert about the killed rank")
    assert [a["labels"]["rank"] for a in alert] == ["1"]
    write_targets(targets, [])
    # Those about the last five minutes may go on for as long.
    server.wait_for(lambda: not missing() and not server.query("up"), "no targets, no rank is missing")
