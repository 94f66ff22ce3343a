"""Running a function in a process of its own."""

import inspect
import subprocess
import sys
import textwrap


def run_alone(function, *arguments, without=None):
    """Call `function` in a new process, which knows nothing but its source.

    Args:
        function: a function that imports all it needs.
        *arguments: passed on as strings.
        without: name of a package that can't be imported there, installed or not.

    Returns:
        What it printed. Raises AssertionError with its error output if it failed.
    """
    source = textwrap.dedent(inspect.getsource(function))
    code = f"import sys\n{source}\n{function.__name__}(*sys.argv[1:])"
    if without is not None:
        code = f"import sys\nsys.modules[{without!r}] = None\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
