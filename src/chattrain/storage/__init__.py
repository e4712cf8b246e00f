"""Reading and writing files, tensors and checkpoints."""
