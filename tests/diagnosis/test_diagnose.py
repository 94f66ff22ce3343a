"""diagnose: models made sick on purpose, one for each finding, and healthy ones."""

import dataclasses
import itertools
import json

import keras
import numpy as np
import pytest
from conftest import require
from keras import layers
from support.backend import array

import keras_bn
from keras_bn.diagnosis.findings import findings

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization
pytestmark = pytest.mark.filterwarnings("ignore:The statistics of")


def data(n=256, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, 4)) * [1, 2, 3, 4] + [4, 3, 2, 1]).astype("float32")


def labels(x):
    return (x[:, 0] * 2 > x[:, 1]).astype("int32")


def made(bn=OURS, use_bias=False, mend=True, **options):
    """A model whose statistics are those of the data."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, use_bias=use_bias, name="dense"),
            bn(name="bn", **options),
            layers.Dropout(0.5),
            layers.Dense(2),
        ],
        name="model",
    )
    if mend:
        how = {"include_frozen": True, "batch_size": 256, "verbose": 0}
        keras_bn.recalibrate(model, data(), **how)
    return model


def kinds(report, layer="bn"):
    return [finding.kind for finding in report.findings if finding.layer == layer]


def the(report, kind):
    return next(finding for finding in report.findings if finding.kind == kind)


def corrupt(model, name, value, channel=0):
    variable = getattr(model.get_layer("bn"), name)
    array = variable.numpy()
    array[channel] = value
    variable.assign(array)


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_a_healthy_model_gets_a_clean_bill(bn):
    report = keras_bn.diagnose(made(bn), data())
    assert report.findings == []
    assert report.healthy
    assert "No problems found." in str(report)


@pytest.mark.parametrize("options", [{"renorm": True}, {"virtual_batch_size": 16}])
def test_healthy_with_options_of_training(options):
    assert keras_bn.diagnose(made(**options), data()).findings == []


def test_a_trained_model_gets_a_clean_bill():
    x = data()
    model = made(mend=False, momentum=0.9)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.layers[-1].activation = keras.activations.softmax
    model.fit(x, labels(x), epochs=8, verbose=0)
    report = keras_bn.diagnose(model, (x, labels(x)))
    assert report.findings == []
    assert report.record.steps == 64
    assert report.record.accuracy[0] > 0.5


def test_nothing_in_the_model_changes():
    x = data()
    model = made(debias=True)
    before = [v.numpy() for v in model.variables]
    attributes = set(vars(model.get_layer("bn")))
    state = model.layers[2].seed_generator.state.numpy()
    keras_bn.diagnose(model, x + 3)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    np.testing.assert_array_equal(model.layers[2].seed_generator.state, state)
    assert set(vars(model.get_layer("bn"))) == attributes


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_never_updated(bn):
    report = keras_bn.diagnose(made(bn, mend=False), data())
    assert kinds(report) == ["never-updated"]
    assert kinds(report, "model") == ["train-inference-gap"]
    assert the(report, "never-updated").severity == "error"


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_stale_statistics(bn):
    assert kinds(keras_bn.diagnose(made(bn), data() * 2 + 5)) == ["stale-statistics"]


def test_drift_is_that_of_the_arrays():
    model, x = made(), data() + 2
    record = keras_bn.diagnose(model, x).layer("bn")
    inputs = array(model.layers[0](x))
    layer = model.get_layer("bn")
    expected = (layer.moving_mean.numpy() - inputs.mean(0)) / np.sqrt(
        inputs.var(0) + layer.epsilon
    )
    np.testing.assert_allclose(record.mean_drift, expected, rtol=1e-4, atol=1e-5)
    ratio = (layer.moving_variance.numpy() + 1e-3) / (inputs.var(0) + 1e-3)
    np.testing.assert_allclose(record.stddev_ratio**2, ratio, rtol=1e-4)
    assert record.elements == 32


def test_the_gap_is_that_of_the_outputs():
    model, x = made(), data() + 2
    report = keras_bn.diagnose(model, x, batch_size=256)
    model.get_layer("bn").momentum = 1.0
    inference = array(model(x, training=False))
    inputs = model.layers[0](x)
    y = array(model.layers[-1](model.layers[1](inputs, training=True)))
    expected = np.sqrt(np.square(y - inference).mean()) / y.std()
    assert report.record.gap == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_non_finite_statistics(name, bad):
    model = made(KERAS)
    corrupt(model, name, bad)
    report = keras_bn.diagnose(model, data())
    assert kinds(report) == ["non-finite-statistics"]
    assert "1 of 6 channels" in the(report, "non-finite-statistics").message
    assert "from_keras" in the(report, "non-finite-statistics").remedy
    json.dumps(report.to_dict(), allow_nan=False)
    assert str(report)


@pytest.mark.parametrize("labelled", [False, True])
def test_samples_that_are_not_finite_are_of_the_data(labelled):
    model, x = made(), data()
    model.compile("sgd", "mse")
    y = model.predict(x, verbose=0)
    x[70, 1] = np.nan
    x[200] = np.inf
    report = keras_bn.diagnose(model, (x, y) if labelled else x)
    assert [finding.kind for finding in report.findings] == ["non-finite-data"]
    message = the(report, "non-finite-data").message
    assert "2 of 256 samples" in message
    assert "first is sample 70" in message
    assert report.record.samples == 254
    assert np.isfinite(report.record.gap)
    if labelled:
        assert report.record.loss[0] < 0.1
    else:
        assert report.record.loss is None


@pytest.mark.parametrize("part", [1, 2])
def test_labels_and_weights_that_are_not_finite_are_of_the_data(part):
    model = made()
    model.compile("sgd", "mse")
    given = [data(), model.predict(data(), verbose=0), np.ones(256)]
    given[0][70], given[part][71] = np.nan, np.nan
    report = keras_bn.diagnose(model, tuple(given))
    assert [finding.kind for finding in report.findings] == ["non-finite-data"]
    assert "2 of 256 samples" in the(report, "non-finite-data").message
    assert np.isfinite(report.record.loss).all()


@pytest.mark.parametrize("mixed", [True, False])
def test_batches_of_one_class_where_inference_follows_inputs(mixed):
    model = made()
    keras_bn.adapt(model, prior=4)
    y = np.arange(256) % 2
    report = keras_bn.diagnose(model, (data(), y if mixed else np.sort(y)))
    finding = the(report, "follows-inputs")
    assert finding.severity == ("note" if mixed else "warning")
    assert ("8 of 8 batches are of one class" in finding.message) != mixed


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize("given", [True, False])
def test_non_finite_parameters(name, given):
    model = made()
    corrupt(model, name, np.inf)
    report = keras_bn.diagnose(model, data() if given else None)
    assert kinds(report) == ["non-finite-parameters"]
    assert f"{name} in 1 of 6 channels" in report.findings[0].message
    assert not report.healthy


def test_weights_that_are_not_finite_are_no_gap():
    model, x = made(), data()
    model.compile("sgd", "mse")
    model.layers[-1].kernel.assign(np.full((6, 2), np.nan))
    report = keras_bn.diagnose(model, (x, np.zeros((256, 2))))
    assert [finding.kind for finding in report.findings] == ["non-finite-parameters"]
    assert "a weight is" in report.findings[0].message


def test_negative_variance():
    model = made()
    corrupt(model, "moving_variance", -0.5)
    report = keras_bn.diagnose(model, data())
    assert kinds(report) == ["negative-variance"]


def test_dead_channel():
    model, x = made(), data()
    kernel = model.layers[0].kernel.numpy()
    kernel[:, 2] = 0.0
    model.layers[0].kernel.assign(kernel)
    keras_bn.recalibrate(model, x, verbose=0)
    report = keras_bn.diagnose(model, x)
    assert kinds(report) == ["dead-channel"]
    assert the(report, "dead-channel").message.startswith("1 of 6 channels")


def test_small_gamma():
    model = made()
    corrupt(model, "gamma", 1e-5)
    report = keras_bn.diagnose(model, data())
    assert kinds(report) == ["small-gamma"]


@pytest.mark.parametrize(
    ("bn", "options"),
    [
        (OURS, {"freeze_statistics": True}),
        (OURS, {"trainable": False}),
        (KERAS, {"trainable": False}),
    ],
)
def test_frozen(bn, options):
    report = keras_bn.diagnose(made(bn, **options), data())
    assert kinds(report) == ["frozen"]
    assert report.healthy
    assert "No errors, no warnings." in str(report)
    assert report.layer("bn").gap == 0.0


class Still(layers.Layer):
    """Calls its normalization in inference mode, always."""

    def __init__(self):
        super().__init__(name="still")
        self.bn = OURS(name="bn")

    def build(self, input_shape):
        self.bn.build(input_shape)

    def call(self, inputs):
        return self.bn(inputs, training=False)


def test_frozen_by_the_call():
    model = keras.Sequential([keras.Input((4,)), Still()])
    keras_bn.recalibrate(model, data(), verbose=0)
    report = keras_bn.diagnose(model, data())
    assert kinds(report, "still/bn") == ["frozen"]
    assert "training=False" in report.findings[0].message
    assert report.record.gap == 0.0


def test_momentum_too_slow():
    x = data()
    model = made(mend=False, momentum=0.999)
    model.compile("sgd", "mse")
    model.fit(x, np.zeros((len(x), 2)), verbose=0)
    report = keras_bn.diagnose(model, x)
    assert kinds(report) == ["momentum-too-slow"]
    assert "After 8 steps at momentum 0.999, 99%" in report.findings[0].message
    keras_bn.recalibrate(model, x, verbose=0)
    assert keras_bn.diagnose(model, x).findings == []


def test_small_batch():
    model = made()
    report = keras_bn.diagnose(model, data(32), batch_size=4)
    assert "small-batch" in kinds(report)
    ghost = keras_bn.diagnose(made(virtual_batch_size=4), data(64))
    assert "small-batch" in kinds(ghost)
    assert ghost.layer("bn").elements == 4


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_redundant_bias(bn):
    report = keras_bn.diagnose(made(bn, use_bias=True), data())
    assert kinds(report) == ["redundant-bias"]
    assert the(report, "redundant-bias").remedy == "use_bias=False in 'dense'"


def test_a_bias_along_another_axis_or_used_elsewhere_is_not_redundant():
    x = keras.Input((5, 4))
    y = layers.Dense(3)(x)
    apart = keras.Model(x, OURS(axis=1, name="bn")(y))
    both = keras.Model(x, layers.add([OURS(name="bn")(y), y]))
    inputs = np.random.default_rng(0).normal(size=(64, 5, 4)).astype("float32")
    for model in apart, both:
        assert "redundant-bias" not in kinds(keras_bn.diagnose(model, inputs))


def test_train_inference_gap_in_loss_and_accuracy():
    model, x = made(), data()
    model.compile("sgd", "mse")
    target = np.eye(2)[model.predict(x, verbose=0).argmax(1)]
    assert keras_bn.diagnose(model, (x, target)).findings == []
    first, second = model.layers[-1].kernel.numpy().T
    layer = model.get_layer("bn")
    layer.moving_mean.assign(layer.moving_mean + 20 * (first - second))
    report = keras_bn.diagnose(model, (x, target))
    message = the(report, "train-inference-gap").message
    assert "the loss is" in message
    assert "the accuracy is" in message
    outputs = model.predict(x, verbose=0)
    loss, accuracy = report.record.loss[0], report.record.accuracy[0]
    assert loss == pytest.approx(np.mean((outputs - target) ** 2), rel=1e-4)
    assert accuracy == np.mean(outputs.argmax(1) == target.argmax(1))


@pytest.fixture(scope="module")
def healthy():
    """The record of a healthy model."""
    return keras_bn.diagnose(made(), data()).record


def gap_is_found(record, elements=8192.0, **values):
    """Whether a gap is found in a record with other values."""
    layer = dataclasses.replace(record.layers[0], elements=elements)
    record = dataclasses.replace(record, layers=[layer], **values)
    kinds = [finding.kind for finding in findings(record)]
    assert set(kinds) <= {"train-inference-gap", "small-batch"}
    return "train-inference-gap" in kinds


@pytest.mark.parametrize(("samples", "found"), [(40, False), (4000, True)])
def test_an_accuracy_of_few_samples_differs_by_chance(healthy, samples, found):
    assert gap_is_found(healthy, samples=samples, accuracy=(0.8, 0.9)) is found
    assert not gap_is_found(healthy, samples=samples, accuracy=(0.9, 0.8))


@pytest.mark.parametrize(("elements", "found"), [(8.0, False), (8192.0, True)])
def test_small_batches_make_the_loss_and_the_outputs_noisy(healthy, elements, found):
    assert gap_is_found(healthy, elements=elements, loss=(1.8, 1.0)) is found
    assert gap_is_found(healthy, elements=elements, gap=0.8) is found
    assert gap_is_found(healthy, elements=elements, loss=(3.0, 1.0))


def given():
    """Data as `diagnose` takes it, and what `x` in a remedy stands for."""
    x = data() * 2 + 5
    batches = keras.utils.PyDataset
    yield x, x
    yield (x, labels(x)), x

    class Labelled(batches):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            part = slice(32 * index, 32 * index + 32)
            return x[part], labels(x)[part]

    yield Labelled(), Labelled()


@pytest.mark.parametrize(
    ("diagnosed", "x"), list(given()), ids=["x", "(x, y)", "data set"]
)
def test_the_remedy_is_exact_code(diagnosed, x):
    model = made()
    finding = keras_bn.diagnose(model, diagnosed).findings[0]
    assert finding.remedy == "keras_bn.recalibrate(model, x)"
    exec(finding.remedy, {"keras_bn": keras_bn, "model": model, "x": x})
    assert keras_bn.diagnose(model, diagnosed).findings == []


def test_masked_elements_have_no_part():
    tokens = keras.Input((6, 2))
    x = layers.Masking()(tokens)
    model = keras.Model(tokens, OURS(name="bn")(x))
    rng = np.random.default_rng(0)
    x = rng.normal(1.0, 1.0, (64, 6, 2)).astype("float32")
    x[:, 3:] = 0.0
    record = keras_bn.diagnose(model, x).layer("bn")
    np.testing.assert_array_equal(record.data.count, 64 * 3)
    np.testing.assert_allclose(record.data.mean, x[:, :3].mean((0, 1)), rtol=1e-4)
    assert record.elements == 96


def test_as_a_dict():
    report = keras_bn.diagnose(made(use_bias=True), (data(), labels(data())))
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["samples"] == 256
    assert found["accuracy"]["inference"] == pytest.approx(report.record.accuracy[0])
    assert found["loss"] is None
    assert found["findings"][0]["kind"] == "redundant-bias"
    assert found["layers"][0]["mean_drift"]["worst"] < 0.01


def test_the_figure_shows_every_layer_and_finding(tmp_path):
    pytest.importorskip("matplotlib")
    model = made(mend=False, use_bias=True)
    corrupt(model, "moving_variance", np.nan)
    figure = keras_bn.diagnose(model, data()).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    texts = {t.get_text() for axis in figure.axes for t in axis.texts}
    assert any("non-finite-statistics" in text for text in texts)
    assert "bn" in [t.get_text() for t in figure.axes[0].get_yticklabels()]


def drawn(report):
    """The figure of a report, laid out."""
    pytest.importorskip("matplotlib")
    figure = report.plot()
    figure.draw_without_rendering()
    return figure


def test_an_outlier_does_not_flatten_the_bars_of_the_others():
    report = keras_bn.diagnose(made(), data())
    (layer,) = report.record.layers
    others = [dataclasses.replace(layer, layer=f"bn_{k}", gap=0.5) for k in range(3)]
    far = dataclasses.replace(layer, layer="far", gap=1e6)
    record = dataclasses.replace(report.record, layers=[*others, far], gap=0.5)
    gaps = drawn(dataclasses.replace(report, record=record)).axes[2]
    shares = [bar.get_width() / gaps.get_xlim()[1] for bar in gaps.patches]
    assert min(shares) > 0.1
    assert max(shares) <= 1
    assert "1000000.00" in " ".join(text.get_text() for text in gaps.texts)


def test_titles_and_labels_of_the_figure_stand_apart():
    figure = drawn(keras_bn.diagnose(made(mend=False), data()))
    titles = [
        child
        for axis in figure.axes
        for child in axis.get_children()
        if getattr(child, "get_text", str)() == axis.get_title(loc="left") != ""
    ]
    labels = [axis.xaxis.label for axis in figure.axes[:3]]
    assert (len(titles), len(labels)) == (4, 3)
    for parts in titles, labels:
        boxes = [part.get_window_extent() for part in parts]
        for first, second in itertools.pairwise(boxes):
            assert first.x1 < second.x0
    ratio = figure.axes[1]
    ticks = [text.get_text() for text in ratio.get_xticklabels()]
    assert {"1/2", "1", "2"} <= set(ticks)


def test_a_name_with_dollar_signs_is_drawn_as_it_is():
    report = keras_bn.diagnose(made(), data())
    (layer,) = report.record.layers
    record = dataclasses.replace(
        report.record, model="$a_$", layers=[dataclasses.replace(layer, layer="$x^_$")]
    )
    figure = drawn(dataclasses.replace(report, record=record))
    assert "$x^_$" in [t.get_text() for t in figure.axes[0].get_yticklabels()]
    logger = keras_bn.StatisticsLogger(data())
    logger.rows = [keras_bn.DriftRow(0, n, *[0.5] * 5) for n in ("$x^_$", "model")]
    logger.plot().draw_without_rendering()


def test_as_a_table_for_pandas():
    require("pandas")
    report = keras_bn.diagnose(made(use_bias=True), data())
    frame = report.to_dataframe()
    assert list(frame.index) == ["bn"]
    assert frame.loc["bn", "findings"] == "redundant-bias"
    assert frame.loc["bn", "mean_drift_worst"] == report.layer("bn").drift.worst_mean
    assert keras_bn.diagnose(made()).to_dataframe().loc["bn", "channels"] > 1


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("model", TypeError, "Expected a Keras layer or model"),
        (keras.Sequential([OURS()]), ValueError, "not built"),
        (
            keras.Sequential([keras.Input((4,)), layers.Dense(1)]),
            ValueError,
            "no batch",
        ),
    ],
)
def test_refused(model, error, message):
    with pytest.raises(error, match=message):
        keras_bn.diagnose(model, data())


def test_no_data():
    with pytest.raises(ValueError, match="no data"):
        keras_bn.diagnose(made(), data()[:0])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="net")
        self.bn = OURS(name="bn")
        self.dense = layers.Dense(2)


class Without(Subclassed):
    def call(self, inputs):
        return self.dense(self.bn(inputs))


class With(Subclassed):
    def call(self, inputs, training=None):
        return self.dense(self.bn(inputs, training=training))


class OwnStep(Without):
    def train_step(self, *args):
        return super().train_step(*args)


def fitted(kind):
    keras.utils.set_random_seed(0)
    model, x = kind(), data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    model.fit(x, labels(x), batch_size=64, epochs=3, verbose=0)
    return model, (x, labels(x))


@pytest.mark.parametrize("with_data", [True, False])
def test_a_model_that_fit_calls_without_training(with_data):
    # Keras calls a model with `training=True` only where its `call` takes it.
    model, pair = fitted(Without)
    assert not array(model.bn.moving_mean).any()
    report = keras_bn.diagnose(model, pair if with_data else None)
    (finding,) = report.findings  # the gap that other statistics would make is none
    assert finding.kind == "never-updated"
    assert finding.severity == "error"
    assert "`call` of the model takes no `training`" in finding.message
    assert "training=None" in finding.remedy
    assert finding.tool is None


class Pretrained(Without):
    def __init__(self):
        super().__init__()
        self.first = OURS(name="first", trainable=False)

    def call(self, inputs):
        return super().call(self.first(inputs))


@pytest.mark.parametrize("with_data", [True, False])
def test_statistics_that_fit_keeps_are_said_to_be_kept(with_data):
    model, pair = fitted(Pretrained)
    model.first.trainable = True
    model.first.moving_mean.assign(data().mean(0))
    model.first.moving_variance.assign(data().var(0))
    report = keras_bn.diagnose(model, pair if with_data else None)
    found = {f.layer: (f.kind, f.severity) for f in report.findings}
    assert found["bn"] == ("never-updated", "error")
    assert found["first"] == ("frozen", "warning")


def test_a_loop_of_ones_own_may_train_a_model_that_takes_no_training():
    model, pair = fitted(Without)
    # Such a loop moves them near to those of the data.
    keras_bn.recalibrate(model, pair[0], verbose=0)
    model.bn.moving_variance.assign(2.2 * array(model.bn.moving_variance))
    found = keras_bn.diagnose(model, pair).findings
    assert all("takes no `training`" not in f.message for f in found)
    assert [f.kind for f in found] == ["momentum-too-slow"]


@pytest.mark.parametrize("kind", [With, OwnStep])
def test_a_model_that_may_get_training_is_not_blamed(kind):
    model, _ = fitted(kind)
    found = keras_bn.diagnose(model).findings
    assert all("takes no `training`" not in f.message for f in found)
    assert [f.tool for f in found] == ["recalibrate"] * (kind is OwnStep)
