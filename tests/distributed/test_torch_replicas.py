"""Two processes of PyTorch are one, with the whole batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import require

pytestmark = pytest.mark.slow

WORKER = str(Path(__file__).parents[1] / "support" / "ddp_worker.py")
CHANNELS = 3
GAMMA, BETA = np.ones(CHANNELS), np.zeros(CHANNELS)


def share(rng, rows, mean=0.0):
    return {
        "x": rng.normal(mean, 1, (rows, CHANNELS)),
        "upstream": rng.normal(size=(rows, CHANNELS)),
    }


def draw():
    """The shares of two ranks by case."""
    rng = np.random.default_rng(0)
    cases = {
        "even": [share(rng, 6), share(rng, 6, mean=3.0)],
        "uneven": [share(rng, 9), share(rng, 2, mean=-1.0)],
        "empty": [share(rng, 0), share(rng, 5)],
        "large_mean": [share(rng, 6, mean=1e6), share(rng, 7, mean=1e6)],
        "masked": [share(rng, 6), share(rng, 6, mean=3.0)],
        "all_masked_here": [share(rng, 6), share(rng, 6, mean=3.0)],
        "nan_here": [share(rng, 4), share(rng, 4)],
        "local": [share(rng, 6), share(rng, 6, mean=3.0)],
        "local_empty": [share(rng, 0), share(rng, 6, mean=3.0)],
    }
    for part in cases["masked"]:
        part["mask"] = rng.random(6) < 0.6
    cases["all_masked_here"][0]["mask"] = np.zeros(6, bool)
    cases["all_masked_here"][1]["mask"] = np.ones(6, bool)
    cases["nan_here"][1]["x"][2, 1] = np.nan
    return cases


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The cases, and what each rank got."""
    require("torch")
    path = tmp_path_factory.mktemp("ddp") / "cases.npz"
    cases = draw()
    np.savez(
        path,
        **{
            f"{name}/{key}{rank}": value
            for name, parts in cases.items()
            for rank, part in enumerate(parts)
            for key, value in part.items()
        },
    )
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(port), str(path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
    results = []
    for rank in (0, 1):
        with np.load(f"{path}.{rank}.npz") as found:
            results.append(dict(found))
    return cases, results


def whole(parts, key):
    return np.concatenate([part[key] for part in parts])


SHARED = ["even", "uneven", "empty", "large_mean", "masked", "all_masked_here"]


@pytest.mark.parametrize("name", SHARED)
def test_synchronized_replicas_are_one(name, trained):
    cases, (first, second) = trained
    parts = cases[name]
    x, upstream = whole(parts, "x"), whole(parts, "upstream")
    mask = whole(parts, "mask") if "mask" in parts[0] else None
    _, mean, variance = oracle.moments(x, (1,), mask)
    dx, d_gamma, d_beta = oracle.backward(x, GAMMA, (1,), 1e-3, upstream, mask)
    want = {
        "y": oracle.forward(x, GAMMA, BETA, (1,), 1e-3, mask),
        "dx": dx,
        "d_gamma": d_gamma,
        "d_beta": d_beta,
        "moving_mean": oracle.moving(0, mean, 0.5),
        "moving_variance": oracle.moving(1, variance, 0.5),
    }
    tolerance = 1e-9 if name == "large_mean" else 1e-11
    for key, value in want.items():
        ours = [first[f"{name}/{key}"], second[f"{name}/{key}"]]
        if key in ("y", "dx"):
            ours = [np.concatenate(ours)]
        for each in ours:
            np.testing.assert_allclose(each, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [*SHARED, "nan_here", "local", "local_empty"])
def test_statistics_are_the_same_to_the_bit(name, trained):
    _, (first, second) = trained
    for key in ("moving_mean", "moving_variance"):
        np.testing.assert_array_equal(first[f"{name}/{key}"], second[f"{name}/{key}"])


def test_a_nan_on_one_replica_spoils_its_channel_alone(trained):
    cases, (first, _) = trained
    mean = whole(cases["nan_here"], "x").mean(0)
    got = first["nan_here/moving_mean"]
    assert got[1] == 0
    np.testing.assert_allclose(got[[0, 2]], 0.5 * mean[[0, 2]], rtol=1e-12)


def test_local_statistics_average_the_steps(trained):
    cases, results = trained
    parts = cases["local"]
    for part, result in zip(parts, results, strict=True):
        want = oracle.forward(part["x"], GAMMA, BETA, (1,), 1e-3, None)
        np.testing.assert_allclose(result["local/y"], want, rtol=1e-11, atol=1e-11)
    mean = np.mean([part["x"].mean(0) for part in parts], axis=0)
    np.testing.assert_allclose(results[0]["local/moving_mean"], 0.5 * mean, rtol=1e-12)
    alone = cases["local_empty"][1]["x"].mean(0)
    got = results[0]["local_empty/moving_mean"]
    np.testing.assert_allclose(got, 0.5 * alone, rtol=1e-12)


def test_processes_with_different_numbers_of_batches():
    require("torch")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(WORKER).with_name("ddp_join.py")
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(port)],
            env={**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    results = []
    for process in processes:
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, errors[-3000:]
        results.append(json.loads(output.splitlines()[-1]))
    for rank, result in enumerate(results):
        assert result["apart"][:2] == ["at the end", 3 + 2 * rank]
        ended, steps, _ = result["synchronized"]
        assert steps == 0
        assert "pass throw_on_early_termination=True" in ended
        for name in ("apart, ending early", "synchronized, ending early"):
            assert "exhausted" in result[name][0]
            assert result[name][1] == 3
    for name, (_, _, mean) in results[0].items():
        assert mean == results[1][name][2], name
