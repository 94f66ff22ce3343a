"""Running a script in a process of its own."""

import os
import pathlib
import subprocess
import sys

HIDE = """
sys.modules[{name!r}] = None
try:
    import {name}
except ImportError:
    pass
else:
    raise AssertionError("{name} is importable")
"""


def run_alone(script, *arguments, without=None, **environment):
    """Run a script of this folder in a new process, from elsewhere.

    Args:
        script: its file name.
        *arguments: passed on as strings.
        without: name of a package that can't be imported there, installed or not.
        **environment: further variables of its environment.

    Returns:
        The lines it printed. Raises AssertionError with its error output if it failed.
    """
    code = "import runpy, sys"
    code += "" if without is None else HIDE.format(name=without)
    code += "\ndel sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    script = pathlib.Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, (script, *arguments))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
