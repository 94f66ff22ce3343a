"""The command line: arguments first, then one file for each command.

`arguments` and `checks` need no backend, so that mistakes and `--help` are answered at
once. The file of each command has `run(arguments)`, which returns the exit status.
Every mistake of the user raises a `UsageError`.
"""
