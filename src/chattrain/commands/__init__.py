"""What `command=` chooses: a file a command, each with a function `main` from the configuration to a result.

The other files serve all of them: execute.py picks the command, sweep.py runs several jobs, help.py prints `--help`, exit.py
turns an error into a message and an exit status.
"""
