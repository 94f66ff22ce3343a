"""Keras's own tests of its layer, as installed, passed by ours in its place.

They know nothing of this package, so they hold it to what Keras's users may rely on.
"""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from conftest import require
from support.backend import NAME

import keras_bn

FILES = (
    "keras/src/layers/normalization/batch_normalization_test.py",
    "keras/src/layers/core/wrapper_test.py",
    "keras/src/legacy/saving/legacy_h5_format_test.py",
    "keras/src/dtype_policies/dtype_policy_map_test.py",
)

# Tests of Keras that cannot apply to our layer, by node id, and why.
NOT_APPLICABLE = {}

# Tests that compare with files of Keras 2: `tf_keras` writes them, on TensorFlow.
OF_KERAS_2 = "legacy_h5_format_test.py"

# Of the tests in these files, those that make a layer of ours: six of them test
# renormalization, which Keras has from 3.13 on.
RENORM = "renorm" in inspect.signature(keras.layers.BatchNormalization).parameters
LEAST = (36 if NAME == "tensorflow" else 32) + 6 * RENORM


def run_on_ours(site, record):
    """Run Keras's test files with our layer in the place of Keras's.

    Nothing of the outer run reaches the inner: no plugin, no settings, no conftest.

    Args:
        site: the folder that Keras is installed in; nothing is written there.
        record: file for what ran, beside which the tests run.

    Returns:
        What ran: `found`, every test by node id; `ran`, of each what came of it
        and whose layers it made; `package`, the file of ours. Raises AssertionError
        with what pytest printed if a test failed or none could run.
    """
    paths = [Path(__file__).parents[1] / "support", Path(keras_bn.__file__).parents[1]]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    outer = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "keras_own"),
            *("-p", "no:cacheprovider", "--import-mode=append", "--noconftest"),
            *("-c", os.devnull, "--rootdir", site),
            *("-q", "--no-header", "--tb=short", "--disable-warnings"),
            *("--record", record),
            *(f"--without={name}" for name in NOT_APPLICABLE),
            *(site / file for file in FILES),
        ],
        cwd=record.parent,
        env={
            **{key: value for key, value in os.environ.items() if key not in outer},
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(record.read_text())


def test_keras_own_tests_pass_on_our_layer(tmp_path):
    site = Path(keras.__file__).parents[1]
    if not any((site / file).exists() for file in FILES):
        # In CI too: Keras 3.15.1 brings its tests, 3.15.0 and 3.10 don't.
        pytest.skip(f"Keras {keras.__version__} is installed without its tests")
    record = run_on_ours(site, tmp_path / "record.json")
    assert record["package"] == keras_bn.__file__
    assert set(NOT_APPLICABLE) <= set(record["found"])
    ran = record["ran"].values()
    assert not [one for one in ran if "theirs" in one["made"]]
    skipped = [k for k, one in record["ran"].items() if one["outcome"] == "skipped"]
    if skipped and NAME == "tensorflow":
        require("tf_keras")
    assert all(OF_KERAS_2 in name for name in skipped)
    passed = [one for one in ran if one["outcome"] == "passed"]
    assert len(passed) == len(ran) - len(skipped)
    assert len([one for one in passed if "ours" in one["made"]]) >= LEAST
