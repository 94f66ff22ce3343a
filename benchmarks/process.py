"""A number that a module prints in a process of its own, where nothing has run yet."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def number(module, *arguments):
    """The last line that `python -m module arguments` prints, as a float.

    Raises:
        RuntimeError: if the process fails, with the end of what it said.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    if result.returncode:
        said = result.stderr[-2000:]
        raise RuntimeError(f"{' '.join(command)} returned {result.returncode}:\n{said}")
    return float(result.stdout.splitlines()[-1])
