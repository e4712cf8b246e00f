"""Processes of a run: launch, ranks and collectives, failures, and the strategies that distribute a step over ranks."""
