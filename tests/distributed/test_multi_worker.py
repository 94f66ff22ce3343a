"""Two real processes on the loopback address: one device together, and one may die."""

import functools
import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from support.distributed import compare, load_everywhere, mean_of_separate_layers, split
from support.steps import array, oracle_step
from support.training import Loop, apart
from support.worker import (
    CASES,
    EVERY,
    SAVED,
    SHARES,
    STEPS,
    checkpoint_of,
    model_around,
    trainee,
    with_metrics,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from workers import WorkerError, cluster

WORKER = Path(__file__).parents[1] / "support" / "worker.py"

# Starting takes some seconds each; a worker that is lost is noticed after ten.
SECONDS = 120


def run(folder, *tasks):
    """The exit status of two workers after these tasks, and their logs."""
    command = [sys.executable, str(WORKER), str(folder), *tasks]
    with cluster(command, 2, folder) as workers:
        codes = [worker.wait(SECONDS) for worker in workers]
        return codes, [worker.log.read_text() for worker in workers]


def arrays(folder, name):
    """What the two workers left under a name, as dicts of arrays."""
    for index in range(2):
        with np.load(folder / f"{name} {index}.npz") as found:
            yield dict(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two workers that came to a good end left what they found."""
    folder = tmp_path_factory.mktemp("workers")
    codes, logs = run(folder, "layers", "train", "fit")
    assert codes == [0, 0], "\n".join(logs)
    return folder


def wanted(case):
    """What a step of a case must give on one device, or on two that agree."""
    x, upstream, mask, gamma, beta = case.draw()
    if case.together and not case.bad:
        return oracle_step(case.layer(), x, upstream, (2,), gamma, beta, mask)
    if case.together:
        # Nobody knows the mean of the whole batch, so all keep what they had.
        nothing = np.zeros(x.shape[-1])
        return {
            "moving_mean": nothing,
            "moving_variance": nothing + 1,
            "updates": np.stack([nothing] * 2),
        }
    xs, masks = split(x, case.shares), split(mask, case.shares)
    bad = [i for i, x in enumerate(xs) if not np.isfinite(x).all() or not len(x)]
    return mean_of_separate_layers(case.layer, xs, masks, bad)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_step_of_a_layer(folder, name):
    one, other = arrays(folder, name)
    got = {key: np.concatenate([one[key], other[key]]) for key in ("y", "dx")}
    # Each worker has its own contribution; the optimizer adds them up.
    got |= {key: one[key] + other[key] for key in ("d_gamma", "d_beta")}
    want = wanted(CASES[name])
    for key in one.keys() - got.keys():
        np.testing.assert_array_equal(one[key], other[key], key)
        got[key] = one[key]
        if key.startswith("read"):
            np.testing.assert_array_equal(one[key], one["moving_mean"], key)
    # The mean is 1e4 and its rounding 1e-12.
    compare(got, want, 1e-11)


@pytest.mark.slow
def test_every_file_has_what_every_worker_has(folder):
    case = CASES[SAVED]
    make = functools.partial(model_around, case.layer())
    for index, state in enumerate(arrays(folder, SAVED)):
        for model in load_everywhere(make, folder / f"saved {index}"):
            for key in ("moving_mean", "moving_variance"):
                found = array(getattr(model.layers[0], key))
                np.testing.assert_array_equal(found, state[key])


def in_one_process(steps, model=None):
    """A model after so many steps of training without any workers."""
    model = model or trainee()[0]
    loop = Loop(tf.distribute.get_strategy(), model, [sum(SHARES)])
    for step in range(steps):
        loop.step(step)
    return model


@pytest.mark.slow
def test_training_is_that_of_one_process(folder):
    one, other = arrays(folder, "trained")
    for weight, got in zip(in_one_process(STEPS).weights, one.values(), strict=True):
        assert np.max(np.abs(array(weight) - got)) < 1e-12, weight.path
    compare_bits(one, other)


@pytest.mark.slow
def test_one_worker_alone_makes_copies_while_the_other_trains_on(tmp_path):
    codes, logs = run(tmp_path, "alone")
    assert codes == [0, 0], "\n".join(logs)
    one, other = arrays(tmp_path, "trained alone")
    compare_bits(one, other)
    alone = in_one_process(STEPS, with_metrics())
    for weight, got in zip(alone.weights, one.values(), strict=True):
        assert np.max(np.abs(array(weight) - got)) < 1e-12, weight.path
    with np.load(tmp_path / "copies.npz") as outputs:
        for name, output in outputs.items():
            np.testing.assert_allclose(output, outputs["model"], 0, 1e-12, err_msg=name)
    compare_bits(*arrays(tmp_path, "recalibrated"))
    for index in range(2):
        said = json.loads((tmp_path / f"warnings {index}.json").read_text())
        assert len([each for each in said if "in each of 2 workers" in each]) == 1


def compare_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], name)


# A lost connection to the first worker shows at once, the silence of any other after
# ten seconds.
@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_worker_dies_in_the_middle_of_a_step(folder, tmp_path, dying):
    codes, logs = run(tmp_path, f"train={dying},{2 * EVERY + 1}")
    assert codes[dying] == -signal.SIGKILL
    assert codes[1 - dying] == 1
    assert "UnavailableError" in logs[1 - dying]
    assert "Collective ops is aborted" in logs[1 - dying]

    last = tf.train.latest_checkpoint(tmp_path / "checkpoints")
    model, _ = trainee()
    checkpoint_of(model).restore(last).expect_partial()
    assert apart(model, in_one_process(2 * EVERY)) < 1e-12

    codes, logs = run(tmp_path, "train")
    assert codes == [0, 0], "\n".join(logs)
    steps = [line for line in logs[0].splitlines() if line.startswith("step ")]
    assert steps == [f"step {i}" for i in range(2 * EVERY, STEPS)]
    for resumed, whole in zip(
        arrays(tmp_path, "trained"), arrays(folder, "trained"), strict=True
    ):
        compare_bits(resumed, whole)


@pytest.mark.slow
def test_fit_fails_inside_keras(folder):
    """docs/distributed.md says so, and why; once it works, it must say that."""
    for index in range(2):
        said = json.loads((folder / f"fit {index}.json").read_text())
        assert "PerReplica" in said


def python(code, folder):
    return cluster([sys.executable, "-uc", code], 2, folder)


def test_workers_are_told_who_they_are_and_none_is_left_behind(tmp_path):
    code = "import os, time; print(os.environ['TF_CONFIG']); time.sleep(600)"
    with python(code, tmp_path) as workers:
        configs = [json.loads(next(worker.lines(SECONDS))) for worker in workers]
    assert [worker.process.poll() for worker in workers] == [-signal.SIGKILL] * 2
    assert [config["task"]["index"] for config in configs] == [0, 1]
    addresses = configs[0]["cluster"]["worker"]
    assert configs[1]["cluster"]["worker"] == addresses
    assert len(set(addresses)) == 2


@pytest.mark.parametrize(
    ("code", "wait", "said"),
    [
        ("print('reason'); exit(3)", lambda w: w.check(9), "ended with status 3"),
        ("import time; time.sleep(9)", lambda w: w.check(0.1), "not ended within 0.1"),
        ("input()", lambda w: w.wait_for(Path("none"), 9), "without writing none"),
        (
            "import time; print('reason'); time.sleep(9)",
            lambda w: list(w.lines(0.5)),
            "was silent for 0.5 s",
        ),
    ],
)
def test_a_worker_that_fails_is_reported_with_its_log(tmp_path, code, wait, said):
    with python(code, tmp_path) as workers, pytest.raises(WorkerError) as error:
        wait(workers[0])
    assert said in str(error.value)
    assert str(tmp_path / "worker_0.log") in str(error.value)
    if "reason" in code:
        assert str(error.value).endswith("reason")
