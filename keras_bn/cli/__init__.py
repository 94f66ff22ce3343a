"""The commands of the command line, one file each, and the code that they share.

Each command has `add`, which adds its arguments to the command line, and a function
that runs it and returns the exit status. Every mistake of the user raises a
`UsageError`.
"""
