"""A run before and after the loop: set up once, its components built in each process, its summary written at the end."""
