"""What a scrape of one rank says, read back by prometheus_client's own parser."""

import ast
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ddetr.core.training.reports import MissedReport
from ddetr.monitoring.metrics import METRICS, RunMetrics, reference_table
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from rank_process import CheckpointReport, EvaluationReport, WaitingReport, evaluation_report, step_report

REPOSITORY = Path(__file__).resolve().parents[2]


def samples(metrics: RunMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of an exposition, by name and by labels other than run and rank, which are checked here."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert (labels.pop("run"), labels.pop("rank")) == ("first try", "3")
            found[sample.name, frozenset(labels.items())] = sample.value
    return found


def value(metrics: RunMetrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


@pytest.fixture
def metrics() -> RunMetrics:
    return RunMetrics("first try", 3)


def test_gauges_hold_the_last_step(metrics: RunMetrics):
    before = time.time()
    for step in (1, 2, 3):
        metrics.observe(step_report(step))
    report = step_report(3)
    for part in ("total", "class", "l1", "giou"):
        assert value(metrics, "ddetr_train_loss", part=part) == report.losses[part]
    assert value(metrics, "ddetr_learning_rate") == 4e-4
    assert value(metrics, "ddetr_gradient_norm") == report.gradient_norm
    assert value(metrics, "ddetr_loss_scale") == 65536
    assert value(metrics, "ddetr_device_memory_bytes") == 900_000_000
    assert (value(metrics, "ddetr_current_step"), value(metrics, "ddetr_current_epoch")) == (3, 0)
    assert before <= value(metrics, "ddetr_last_step_timestamp_seconds") <= time.time()


def test_evaluations_are_counted_by_how_they_ended_and_the_newest_checkpoint_is_shown(metrics: RunMetrics) -> None:
    for end in ("done", "failed", "unreachable", "left_out"):
        assert value(metrics, "ddetr_evaluations_total", result=end) == 0
    metrics.observe(evaluation_report(20))
    metrics.observe(MissedReport(30, "unreachable", "no answer", again=True))
    earlier = evaluation_report(10)  # made up for
    metrics.observe(
        replace(earlier, result=replace(earlier.result, metrics=dict.fromkeys(earlier.result.metrics, 0.0)))
    )
    assert value(metrics, "ddetr_evaluation_step") == 20
    assert value(metrics, "ddetr_evaluation_headline_ratio", metric="AP") == 0.2
    assert value(metrics, "ddetr_evaluations_total", result="done") == 2
    assert value(metrics, "ddetr_evaluations_total", result="unreachable") == 1
    metrics.observe(WaitingReport(3))
    assert value(metrics, "ddetr_evaluation_waiting_checkpoints") == 3


def test_counters_and_histograms_add_up(metrics: RunMetrics):
    seconds = [0.3, 0.31, 700.0]  # on a bucket's bound, above it, above all
    for step, duration in enumerate(seconds):
        report = replace(step_report(step), step_seconds=duration, data_wait_seconds=duration / 10, skipped=step == 2)
        report = replace(report, own_seconds=duration / 2)
        metrics.observe(report)
    assert value(metrics, "ddetr_steps_total") == 3
    assert value(metrics, "ddetr_skipped_steps_total") == 1
    assert value(metrics, "ddetr_images_total") == 24
    assert value(metrics, "ddetr_step_seconds_count") == 3
    assert value(metrics, "ddetr_step_seconds_sum") == pytest.approx(700.61)
    assert value(metrics, "ddetr_step_seconds_bucket", le="0.3") == 1
    assert value(metrics, "ddetr_step_seconds_bucket", le="0.4") == 2
    assert value(metrics, "ddetr_step_seconds_bucket", le="180.0") == 2
    assert value(metrics, "ddetr_data_wait_seconds_sum") == pytest.approx(70.061)
    assert value(metrics, "ddetr_own_seconds_total") == pytest.approx(350.305)


def test_evaluation_and_checkpoint(metrics: RunMetrics):
    before = time.time()
    metrics.observe(evaluation_report(10))
    metrics.observe(CheckpointReport("", "the disk is full"))
    assert "ddetr_last_checkpoint_timestamp_seconds" not in {name for name, _ in samples(metrics)}
    metrics.observe(CheckpointReport("runs/a/checkpoints/step_00000010", None))
    assert value(metrics, "ddetr_evaluation_score_ratio", metric="AP") == 0.2
    assert value(metrics, "ddetr_evaluation_score_ratio", metric="AP50") == 0.4
    assert math.isnan(value(metrics, "ddetr_evaluation_score_ratio", metric="AP_large"))
    assert value(metrics, "ddetr_evaluation_headline_ratio", metric="AP") == 0.2
    assert value(metrics, "ddetr_evaluation_seconds") == 12.5
    assert value(metrics, "ddetr_evaluation_images") == 100
    assert value(metrics, "ddetr_evaluation_bad_images") == 2
    assert value(metrics, "ddetr_evaluation_part_seconds", part="model") == 20
    assert value(metrics, "ddetr_evaluation_not_finite_queries") == 0
    assert before <= value(metrics, "ddetr_last_checkpoint_timestamp_seconds") <= time.time()


def test_an_evaluation_without_a_score(metrics: RunMetrics):
    metrics.observe(evaluation_report(10))
    result = evaluation_report(20).result
    diverged = replace(result, metrics=dict.fromkeys(result.metrics, math.nan), num_not_finite=7)
    metrics.observe(EvaluationReport(20, diverged))
    assert math.isnan(value(metrics, "ddetr_evaluation_score_ratio", metric="AP"))
    assert value(metrics, "ddetr_evaluation_not_finite_queries") == 7


def test_before_the_first_step_counters_are_zero_and_gauges_absent(metrics: RunMetrics):
    found = samples(metrics)
    assert found["ddetr_steps_total", frozenset()] == 0
    assert found["ddetr_step_seconds_count", frozenset()] == 0
    names = {name for name, _ in found}
    assert "ddetr_train_loss" not in names
    assert "ddetr_last_step_timestamp_seconds" not in names
    assert "ddetr_start_timestamp_seconds" in names


def test_a_loss_that_is_not_finite_is_exported_as_such(metrics: RunMetrics):
    metrics.observe(replace(step_report(1), losses={"total": math.nan, "class": 1.0, "l1": math.inf, "giou": 1.0}))
    assert math.isnan(value(metrics, "ddetr_train_loss", part="total"))
    assert value(metrics, "ddetr_train_loss", part="l1") == math.inf


def test_process_memory_is_this_process_now(metrics: RunMetrics):
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the resident memory is read from /proc, which this system lacks")
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0]) * 1024
    assert value(metrics, "ddetr_process_memory_bytes") == pytest.approx(resident, rel=0.05)


def test_the_number_of_series_does_not_grow(metrics: RunMetrics):
    metrics.observe(step_report(1))
    metrics.observe(evaluation_report(1))
    metrics.observe(WaitingReport(2))
    metrics.observe(CheckpointReport("", "the disk is full"))
    assert "ddetr_last_checkpoint_timestamp_seconds" not in {name for name, _ in samples(metrics)}
    metrics.observe(CheckpointReport("runs/a/checkpoints/step_00000010", None))
    first = set(samples(metrics))
    for step in range(2, 40):
        metrics.observe(step_report(step))
        metrics.observe(evaluation_report(step))
    assert set(samples(metrics)) == first
    names = {name for name, _ in first}
    for metric in METRICS:  # and each declared metric is among them
        assert names & {metric.name, f"{metric.name}_bucket"}, metric.name


def test_two_ranks_in_one_process_do_not_mix():
    one, other = RunMetrics("first try", 3), RunMetrics("first try", 3)
    one.observe(step_report(1))
    assert value(one, "ddetr_steps_total") == 1
    assert value(other, "ddetr_steps_total") == 0


def test_a_report_without_metrics_here_is_ignored(metrics: RunMetrics):
    before = samples(metrics)
    metrics.observe(object())
    assert set(samples(metrics)) == set(before)


def test_parts_and_scores_are_those_of_the_report(metrics: RunMetrics):
    step = step_report(1)
    metrics.observe(replace(step, parts=(*step.parts, "angle"), losses={**step.losses, "angle": 0.75}))
    assert value(metrics, "ddetr_train_loss", part="angle") == 0.75
    result = replace(evaluation_report(10).result, metrics={"AP": 0.25, "hits": 0.5}, headline="hits")
    metrics.observe(EvaluationReport(10, result))
    assert value(metrics, "ddetr_evaluation_score_ratio", metric="hits") == 0.5
    assert value(metrics, "ddetr_evaluation_headline_ratio", metric="hits") == 0.5


def test_names_follow_the_convention():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    nouns = ("loss", "rate", "norm", "scale", "epoch", "step", "images", "queries", "checkpoints")
    for metric in METRICS:
        assert re.fullmatch(r"ddetr(_[a-z0-9]+)+", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        if metric.kind != "counter":
            assert metric.name.endswith(("_seconds", "_bytes", "_ratio", *nouns)), metric.name
        assert metric.documentation.endswith(".")
        assert bool(metric.label) == bool(metric.values)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_documentation_lists_every_metric():
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    assert reference_table() in page, "paste the output of `python -m ddetr.monitoring.metrics` into docs/operations.md"


def test_monitoring_imports_no_sibling():
    for source in (REPOSITORY / "monitoring").glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{source.name} imports from outside monitoring"
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(str(name).startswith("ddetr") for name in names), f"{source.name} imports a sibling"
