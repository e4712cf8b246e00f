"""The model and text generation with it."""
