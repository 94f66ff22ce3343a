"""The studies, as a user runs them, and the rule their claims are judged by."""

import importlib
import json
import math

import numpy as np
import pytest
from support.scripts import ROOT, assert_is_a_drawing, error_lines, run

pytest.importorskip("matplotlib", reason="the examples draw with matplotlib")
pytest.importorskip("sklearn", reason="the examples take scikit-learn's digits")

STUDIES = [
    "gradient_explosion",
    "identity_bias",
    "first_figure",
    "convergence",
    "placement",
    "convolution",
    "sequences",
    "gan",
    "transfer",
    "small_batches",
    "shifted_domain",
    "inference_gap",
    "weight_averaging",
    "int8",
]


@pytest.fixture
def example(monkeypatch):
    """Imports a module of examples/studies/, or of examples/."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(ROOT / "examples" / "studies")
    return importlib.import_module


def check(name, folder, printed, short):
    """That what a study printed and wrote fits together.

    Args:
        name: of the study.
        folder: that it wrote to.
        printed: its standard output.
        short: whether it ran with --short.

    Returns:
        What the JSON holds.
    """
    results = json.loads((folder / f"{name}.json").read_text())
    assert results["example"] == name
    assert results["settings"]["short"] is short
    assert len(results["figures"]) == results["settings"]["seeds"]
    assert all(isinstance(figures, dict) for figures in results["figures"])
    for part in results["parts"]:
        assert len(part["values"]) == results["settings"]["seeds"]
        if "above" in part:
            agreeing = sum(x is not None and x > part["above"] for x in part["values"])
        else:
            agreeing = sum(x is not None and x < part["below"] for x in part["values"])
        assert part["held"] is (agreeing >= 0.75 * len(part["values"]))
    assert results["held"] is all(part["held"] for part in results["parts"])
    verdict = "held here." if results["held"] else "did NOT hold here."
    assert printed.splitlines()[-1] == f"The claim {verdict}"
    assert results["claim"] in " ".join(printed.split())
    assert f"Figures and picture are in {folder}" in printed
    assert_is_a_drawing(folder / f"{name}.png", least=400)
    return results


# The others take minutes together: `.ci/run` and `make test-all` run them all.
IN_EVERY_RUN = ("first_figure",)


@pytest.mark.parametrize(
    "name",
    [
        name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow)
        for name in STUDIES
    ],
)
def test_short(example, tmp_path, capsys, name):
    if name == "small_batches":
        # TensorFlow takes a number of replicas once in a process; other tests did.
        result = run(f"studies/{name}.py", "--short", "--out", tmp_path)
        assert result.returncode == 0, result.stderr
        printed = result.stdout
    else:
        assert example(name).main(["--short", "--out", str(tmp_path)]) == 0
        printed = capsys.readouterr().out
    check(name, tmp_path, printed, short=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", STUDIES)
def test_in_full(tmp_path, name):
    result = run(f"studies/{name}.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    if name != "int8":  # TensorFlow's converter writes lines of its own
        assert error_lines(result) == []
    check(name, tmp_path, result.stdout, short=False)


@pytest.mark.parametrize(
    ("values", "bound", "held"),
    [
        ([2, 2, 2, 0], {"above": 1}, True),
        ([2, 2, 0, 0], {"above": 1}, False),
        ([2, 2, 2, 0, 0], {"above": 1}, False),
        ([2, 2, 2, 2, 0], {"above": 1}, True),
        ([1, 1, 1, 1], {"above": 1}, False),
        ([1, 1, 1, 1], {"below": 1}, False),
        ([0, 0, 0, 9], {"below": 1}, True),
        ([0, math.nan], {"below": 1}, False),
        ([math.inf, math.inf], {"above": 1}, False),
        ([2], {"above": 1}, True),
    ],
)
def test_a_part_holds_where_three_seeds_in_four_agree(example, values, bound, held):
    claims = example("common.claims")
    part = claims.Part("", values, **bound)
    assert part.held is held
    assert claims.held([part, claims.Part("", [1], above=0)]) is held


@pytest.mark.parametrize("bounds", [{}, {"above": 1, "below": 2}])
def test_a_part_has_one_bound(example, bounds):
    with pytest.raises(ValueError, match="'margin' needs one of above and below"):
        example("common.claims").Part("margin", [1.0], **bounds)


@pytest.mark.parametrize("value", [1.0, -1.0, math.nan])
def test_the_frame_reports_what_was_measured(example, tmp_path, capsys, value):
    claims, drawing, gallery = map(
        example, ("common.claims", "common.drawing", "common.gallery")
    )
    given = ["--seeds", "3", "--out", str(tmp_path / "new" / "folder")]
    frame = gallery.Example("name", "", seeds=5, argv=given)
    figures = [{"seed": seed, "value": value} for seed in frame.each(frame.seeds)]
    figure, axes = drawing.new_figure("Title", [["a", "b"]])
    for color, axis in zip(drawing.COLORS, axes.values(), strict=False):
        drawing.tidy(axis, "title", "x", "y")
        drawing.dots(axis, 0, [1.0, 2.0, 3.0], color)
    part = claims.Part("value", [value] * 3, above=0)
    assert frame.conclude("It is so.", [part], figures, figure) == 0
    results = check("name", frame.out, capsys.readouterr().out, short=False)
    assert results["held"] is (value == 1.0)
    assert results["figures"][2] == {
        "seed": 2,
        "value": None if math.isnan(value) else value,
    }


@pytest.mark.parametrize(
    ("given", "seeds"),
    [
        ([], 5),
        (["--short"], 2),
        (["--short", "--seeds", "4"], 4),
        (["--seeds", "1"], 1),
    ],
)
def test_seeds(example, given, seeds):
    frame = example("common.gallery").Example("name", "", seeds=5, argv=given)
    assert frame.seeds == range(seeds)
    assert frame.short is ("--short" in given)


def test_small_digits_are_the_enlarged_ones(example):
    small = example("common.data").small_digits()
    large = example("digits").enlarged_digits()
    assert small.x_train.shape == (1440, 8, 8, 1)
    image = large.x_val[5].reshape(28, 28)[2:-2:3, 2:-2:3]
    assert (small.x_val[5, ..., 0] == image).all()


def test_restart_is_the_same_for_a_seed_and_another_for_others(example):
    keras = example("keras")
    layers = [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile("adam", "mse")
    restart = example("common.restart").Restart(model)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)), rng.normal(size=(8, 1))

    def trained(seed):
        restart(seed)
        model.reset_metrics()
        start = model.get_weights()
        losses = [float(model.train_on_batch(x, y)) for _ in range(3)]
        return start, losses

    (start, losses), (other, _), (again, again_losses) = map(trained, (0, 1, 0))
    assert (start[0] != other[0]).any()
    np.testing.assert_array_equal(start[0], again[0])
    np.testing.assert_allclose(losses, again_losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["separate batches", "mixed batches"])
def test_the_gradient_penalty_of_the_gan(example, kind):
    """Trained with it, the discriminator is less steep at the real images."""
    gan, keras = example("gan"), example("keras")
    images = example("common.data").small_digits().x_train
    rng = np.random.default_rng(0)
    real = keras.ops.convert_to_tensor(images[:60].reshape(-1, 64))
    fake = keras.ops.convert_to_tensor(rng.uniform(size=(60, 64)).astype("float32"))
    steepness = []
    for weight in (0.0, 3.0):
        pair = gan.Pair(kind, weight)
        pair.restart(0)
        for _ in range(5):
            pair.epoch(images, np.random.default_rng(0))
        assert bool(pair.judge(real, fake)[2] > 0) is (weight > 0)
        pair.penalty = 1.0
        steepness.append(float(pair.judge(real, fake)[2]))
    assert steepness[1] < 0.5 * steepness[0]


def test_the_growth_of_gradients_in_theory(example):
    """It is the limit at large batches; at 8 images, what Jacobians give."""
    study = example("gradient_explosion")
    assert study.growth_in_theory(2048, 1000) == pytest.approx(study.GROWTH, rel=5e-3)
    batch, rng = 8, np.random.default_rng(1)

    def normalized(h):
        return (h - h.mean()) / h.std()

    variance = np.mean(
        [
            np.var(np.maximum(normalized(h), 0)) * batch / (batch - 1)
            for h in rng.normal(size=(4000, batch))
        ]
    )
    factors = []
    for h in rng.normal(size=(4000, batch)) * np.sqrt(variance):
        steps = 1e-6 * np.eye(batch)
        jacobian = [
            (np.maximum(normalized(h + s), 0) - np.maximum(normalized(h - s), 0)) / 2e-6
            for s in steps
        ]
        g = rng.normal(size=batch)
        factors.append(np.sum((np.array(jacobian) @ (g - g.mean())) ** 2))
    simulated = np.mean(factors) / (batch - 1)
    assert study.growth_in_theory(batch, 100_000) == pytest.approx(simulated, rel=0.06)


def test_the_variance_after_relu_in_theory(example):
    """It is the limit for images of one norm; for others, what draws give."""
    study, keras = example("gradient_explosion"), example("keras")
    assert study.variance_in_theory() == pytest.approx(study.VARIANCE)
    rng = np.random.default_rng(0)
    norms = np.array([0.2, 0.7, 0.7, 2.4])
    before = rng.normal(size=(200_000, 4)) * norms / np.sqrt(np.mean(norms**2))
    after = np.maximum(before, 0)
    alike = np.mean(norms) / np.sqrt(np.mean(norms**2))
    expected = np.mean(after**2) - np.mean(after) ** 2
    assert study.variance_in_theory(alike) == pytest.approx(expected, rel=0.01)
    assert expected > 1.1 * study.VARIANCE
    layer = study.Norms()
    layer(keras.ops.convert_to_tensor(before.T.astype("float32")))
    assert float(layer.alike) == pytest.approx(alike, rel=1e-3)


def test_gradients_stored_by_the_optimizer(example):
    """They are those of the loss, by differences."""
    keras, study = example("keras"), example("gradient_explosion")
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, use_bias=False)])
    model.compile(study.Gradients(learning_rate=1.0), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(4, 3)), rng.normal(size=(4, 2))
    kernel = np.array(model.get_weights()[0], "float64")
    model.train_on_batch(x, y)
    expected = 2 * x.T @ (x @ kernel - y) / y.size
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-4, atol=1e-6)


def test_steadiness(example):
    """Two units: one rests; the median of the other moves and its spread grows."""
    resting = [[-1, 0, 1], [-1, 0, 1]]
    moving = [[-1, 0, 1], [2, 4, 8]]
    percentiles = np.stack([resting, moving], axis=-1)
    moves, spread_range = example("first_figure").steadiness(percentiles)
    np.testing.assert_allclose(moves, [0, 2 / 4])
    np.testing.assert_allclose(spread_range, [1, 3])


def test_the_first_figure_takes_mnist_from_a_file(example, tmp_path):
    rng = np.random.default_rng(0)

    def images(count):
        return rng.integers(0, 256, (count, 28, 28), "uint8"), np.arange(count) % 10

    (x_train, y_train), (x_test, y_test) = images(120), images(20)
    path = tmp_path / "mnist.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    study = example("first_figure")
    given = ["--short", "--data", "mnist", "--mnist-file", str(path)]
    assert study.main([*given, "--out", str(tmp_path)]) == 0
    settings = json.loads((tmp_path / "first_figure.json").read_text())["settings"]
    assert settings["data"] == "mnist"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--mnist-file", "mnist.npz"], "--mnist-file goes with --data mnist"),
        (["--data", "mnist", "--mnist-file", "none.npz"], "can't be read as MNIST"),
    ],
)
def test_the_first_figure_without_its_data(example, tmp_path, capsys, given, says):
    out = tmp_path / "out"
    assert example("first_figure").main([*given, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
