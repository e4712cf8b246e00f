"""What `command=` chooses: a file a command, each with a function `main` from the configuration to a result.

The other files serve all of them: execute.py picks the command, help/ answers `--help`, completion.py the Tab of a shell, exit.py
turns an error into a message and an exit status.
"""
