"""Prometheus metrics, their exporter, rules and dashboard."""
