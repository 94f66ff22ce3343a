"""Running the examples, and what they draw."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np

import keras_bn

ROOT = pathlib.Path(keras_bn.__file__).parents[1]


def run(script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        encoding="utf-8",
        capture_output=True,
        timeout=300,
    )


def error_lines(result):
    """What a script printed to its standard error, without TensorFlow's notices.

    TensorFlow prints these while it is loaded, before it reads any setting.
    """
    notice = re.compile(r"WARNING: All log messages before absl|[IW]\d{4} ")
    return [line for line in result.stderr.splitlines() if not notice.match(line)]


def assert_is_a_drawing(path, least=500):
    from matplotlib import image

    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > least
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 100
