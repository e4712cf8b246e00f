"""Where numbers and messages go: metrics.jsonl first, then the console, MLflow, the report."""
