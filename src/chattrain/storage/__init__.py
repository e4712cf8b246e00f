"""What lies on disk: files, tensors, checkpoints."""
