"""Metrics and messages of a run: metrics.jsonl first, then the console, MLflow and the report."""
