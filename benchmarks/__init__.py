"""Speed as ratios within one run: ours against what a careful user would write with stock parts.

`python -m benchmarks` runs all cases, `python -m benchmarks.<case>` one. Figures drift between machines and minutes,
so ours and the reference take turns and the medians are compared.
"""
