"""Every application of Keras that contains batch normalization, through every tool."""

import subprocess
import sys
from pathlib import Path

import applications
import pytest

CASES = [
    pytest.param(name, marks=[] if name == "MobileNetV2" else pytest.mark.slow)
    for name in applications.names()
]


@pytest.mark.parametrize("name", CASES)
def test_every_tool_works_on(name):
    script = Path(applications.__file__)
    done = subprocess.run(
        [sys.executable, script, name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_a_wrong_figure_is_seen():
    good = dict.fromkeys(applications.COLUMNS, 0.0)
    assert applications.holds(good)
    for key in "convert", "fold", "recalibrate", "export", "train":
        assert not applications.holds({**good, key: 0.1})
        assert not applications.holds({**good, key: float("nan")})


def test_there_is_a_list_of_them():
    names = applications.names()
    assert len(names) >= 30
    assert set(applications.SUBSET) <= set(names)
