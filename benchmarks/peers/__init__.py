"""chattrain beside other trainers on the same rows, in one run: `python -m benchmarks.peers trl|nanochat`."""
