"""Evaluations of a model: validation loss, bits per byte, multiple-choice accuracy. All are the same on any number of ranks."""
