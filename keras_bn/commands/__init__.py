"""What the command line can do: one file for each command, and what they share.

Each command has `add`, which adds its arguments to the command line, and a function
that runs it and returns the exit status. Whatever the user can cause ends with a
`UsageError`.
"""
