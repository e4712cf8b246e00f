"""Measurements of a model: validation loss and bits per byte, multiple-choice accuracy. The same on any number of ranks."""
