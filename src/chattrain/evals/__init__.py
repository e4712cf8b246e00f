"""Measurements of a model: validation loss and bits per byte, multiple-choice accuracy. Sums over sums, on any number of ranks."""
