"""What several test files share."""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys

# PyTorch may bring triton, whose import after TensorFlow ends the process: before it.
if "tensorflow" not in sys.modules:
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401

import keras
import pytest
from support import graphs

REPLICAS = 4
BACKEND = keras.backend.backend()
if BACKEND == "tensorflow":
    import tensorflow as tf

    # Devices to distribute over; only before TensorFlow starts can they be made.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * REPLICAS,
    )
elif BACKEND == "jax":
    import jax

    # Without it JAX computes float64 in float32.
    jax.config.update("jax_enable_x64", True)


def in_ci():
    """Whether this is CI, where nothing is skipped that could be there."""
    return os.environ.get("CI", "").lower() in ("1", "true")


def require(package):
    """Import an optional package, or skip the test; in CI its absence is a failure.

    Args:
        package: name of the package to import.

    Returns:
        The imported module.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        reason = f"needs {package}, which is not installed"
    if in_ci():
        pytest.fail(f"{reason}; in CI nothing is skipped")
    pytest.skip(reason)


@pytest.fixture(autouse=True, scope="module")
def _graphs():
    """The graphs of one file are not kept while the next is run."""
    yield
    graphs.forget()


@pytest.fixture
def seeded():
    """Keras's initializers draw the same every time: what is compared is rounding."""
    keras.utils.set_random_seed(0)


@pytest.fixture
def browser(tmp_path):
    """Runs a headless Chromium: `browser(url, (width, height), *options)`.

    It gives what the browser printed. Without one the test is skipped; in CI it fails,
    unless `.ci/run` says in NO_BROWSER why there can be none.
    """
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        reason = (
            os.environ.get("NO_BROWSER") or "needs chromium, which is not installed"
        )
        if in_ci() and "NO_BROWSER" not in os.environ:
            pytest.fail(f"{reason}; in CI nothing is skipped")
        pytest.skip(reason)
    quiet = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--hide-scrollbars"
    )

    def run(url, size, *options):
        command = [
            program,
            *quiet.split(),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={size[0]},{size[1]}",
            *options,
            url,
        ]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    return run


def pytest_terminal_summary(terminalreporter):
    """The comparison with Keras's layer, row by row, where it was run."""
    rows = [
        value
        for report in terminalreporter.getreports("passed")
        + terminalreporter.getreports("failed")
        if report.when == "call"
        for name, value in report.user_properties
        if name == "comparison"
    ]
    if rows:
        terminalreporter.section("keras.layers.BatchNormalization | keras_bn")
        for row, theirs, ours in sorted(rows):
            terminalreporter.write_line(f"{row:40} | {theirs:60} | {ours}")


def pytest_ignore_collect(collection_path, config):
    """Scripts beside the tests hold no doctests, and some do things when imported."""
    is_test = collection_path.name.startswith("test_")
    if collection_path.suffix == ".py" and not is_test:
        return True
    return None
