"""Speed as ratios within one run: chattrain ("ours") against what a careful user would write with stock parts.

`python -m benchmarks` runs all cases, `python -m benchmarks.<case>` one. Absolute figures drift, so ours and the reference run in
alternating rounds, and their medians are compared. On a GPU: `make gpu-check`. Beside other trainers: `benchmarks.peers`.
"""

import time

STARTED = time.perf_counter()  # of this process, before it imports torch
