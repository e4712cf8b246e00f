"""`make gpu-check`: tests, speed and memory on a machine with one GPU, against the goals, in one command."""
