"""Speed as ratios within one run: chattrain ("ours") against what a careful user would write with stock parts.

`python -m benchmarks` runs all cases, `python -m benchmarks.<case>` one. Absolute figures drift, so ours and the reference run in
alternating rounds, and their medians are compared.
"""
