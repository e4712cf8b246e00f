"""What `command=` chooses: one small file each, a function `main` from the configuration to a result."""
