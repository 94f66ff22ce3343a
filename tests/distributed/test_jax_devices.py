"""Under JAX a batch on many devices is one batch: statistics are those of all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = str(Path(__file__).parents[1] / "support" / "jax_devices.py")


def test_eight_devices_train_as_one(tmp_path):
    pytest.importorskip("jax", reason="`.ci/backends` has it")
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "data.npz",
        x=rng.normal(1e3, 1, (64, 5)),
        y=rng.normal(size=(64, 1)),
    )
    result = subprocess.run(
        [sys.executable, SCRIPT, str(tmp_path / "data.npz")],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["devices"] == found["holding"] == 8
    # The sums are those of other orders.
    assert max(found["apart"].values()) < 1e-9


@pytest.mark.parametrize(
    "case",
    ["synchronized", "without_checks", "large_means", "apart", "pmapped", "two_axes"],
)
def test_a_step_that_is_mapped_over_devices(case):
    pytest.importorskip("jax", reason="`.ci/backends` has it")
    script = Path(SCRIPT).with_name("jax_mapped.py")
    result = subprocess.run(
        [sys.executable, str(script), case],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "as it must be" in result.stdout
