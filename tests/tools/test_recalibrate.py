"""recalibrate: the data's statistics, and nothing else."""

import io
import itertools
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support import backend
from support.backend import COMPILED, array, dataset, in_mode, tf
from support.marks import mostly_slow, mostly_slow_cases
from support.zoo import (
    Subclassed,
    convolutional,
    inputs_of,
    masked,
    randomized,
    wrapped,
)

import keras_bn
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_normalization

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization
pytestmark = [
    pytest.mark.filterwarnings("ignore:The statistics of"),
    pytest.mark.usefixtures("seeded"),
]


def data(n=100, width=4, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, width)) * [1, 2, 3, 4] + [4, 3, 2, 1]).astype("float32")


def chain(*stack, shape=(4,)):
    return randomized(keras.Sequential([keras.Input(shape), *stack]))


def statistics(model):
    return {
        path: (layer.moving_mean.numpy(), layer.moving_variance.numpy())
        for path, layer in walk(model)
        if is_normalization(layer)
    }


def recalibrate(model, x, **options):
    return keras_bn.recalibrate(model, x, verbose=0, **options)


@pytest.mark.parametrize("bn", [OURS, KERAS])
def test_statistics_are_pooled_not_averaged(bn):
    x = np.sort(data(), axis=0)  # so that no batch is like another
    model = chain(bn(name="bn"), layers.Dense(2))
    found = recalibrate(model, x, batch_size=32)
    mean, variance = x.mean(0, dtype="float64"), x.var(0, dtype="float64")
    np.testing.assert_allclose(model.layers[0].moving_mean.numpy(), mean, rtol=1e-6)
    np.testing.assert_allclose(
        model.layers[0].moving_variance.numpy(), variance, rtol=1e-5
    )
    assert list(found) == ["bn"]
    np.testing.assert_array_equal(found["bn"].count, 100)
    np.testing.assert_allclose(found["bn"].variance, variance, rtol=1e-5)


@pytest.mark.parametrize("bn", [OURS, KERAS])
@pytest.mark.parametrize("make", [convolutional, masked])
def test_exact_is_the_training_mode_on_the_whole_data(make, bn):
    # Keras 3.16 keeps a `training=False` of a graph; earlier ones let the model decide.
    options = {"training": None} if make is masked else {}
    model = randomized(make(bn, **options))
    x = inputs_of(model, 50)
    before = model.predict(x, verbose=0)
    expected = array(keras_bn.from_keras(model)(x, training=True))
    kept = statistics(model)
    recalibrate(model, x, exact=True, batch_size=16)
    np.testing.assert_allclose(
        model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5
    )
    assert np.abs(before - expected).max() > 0.1
    for path, (mean, _) in statistics(model).items():
        assert not np.allclose(mean, kept[path][0])


def test_once_differs_from_exact_and_both_mend():
    model = randomized(convolutional(OURS))
    x = inputs_of(model, 50) * np.linspace(0.1, 3.0, 50)[:, None, None, None]
    expected = array(keras_bn.from_keras(model)(x, training=True))
    once = recalibrate(model, x, batch_size=5)
    off = np.abs(model.predict(x, verbose=0) - expected).max()
    exact = recalibrate(model, x, exact=True)
    assert np.abs(model.predict(x, verbose=0) - expected).max() < 1e-4 < off
    assert exact.keys() == once.keys()
    np.testing.assert_allclose(exact["first"].mean, once["first"].mean, atol=1e-6)


def test_masks_are_respected():
    tokens = np.random.default_rng(0).integers(0, 5, (40, 7)).astype("int32")
    model = randomized(masked(OURS))
    table = model.layers[1].embeddings.numpy().astype("float64")
    found = recalibrate(model, tokens, batch_size=16)
    expected = table[tokens[tokens != 0]]
    np.testing.assert_array_equal(found["sequence"].count, len(expected))
    layer = model.get_layer("sequence")
    np.testing.assert_allclose(layer.moving_mean.numpy(), expected.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        layer.moving_variance.numpy(), expected.var(0), rtol=1e-5
    )


def test_wrapped_shared_and_recurrent_layers_pool_all_their_calls():
    model = randomized(wrapped(OURS))
    x = inputs_of(model, 20)
    found = recalibrate(model, x, batch_size=8)
    by_name = {path.rsplit("/", 1)[-1]: moments for path, moments in found.items()}
    assert set(by_name) == {"in_frame", "per_step", "cell_norm"}
    assert len(found) == 4
    frame = model.get_layer("each_frame").layer
    inner = array(frame.layers[0](x.reshape(-1, 6, 6, 2)))
    np.testing.assert_array_equal(by_name["in_frame"].count, 20 * 3 * 4 * 4)
    np.testing.assert_allclose(
        by_name["in_frame"].variance, inner.var((0, 1, 2)), rtol=1e-4
    )
    np.testing.assert_array_equal(by_name["per_step"].count, 20 * 3)
    # Except on JAX, Keras calls a cell once more, to see what it gives.
    calls = 3 if backend.NAME == "jax" else 4
    np.testing.assert_array_equal(by_name["cell_norm"].count, 20 * calls)

    norm = OURS(name="twice")
    a, b = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([a, b], [norm(a), norm(b)])
    recalibrate(model, [data(seed=1), data(60, seed=1)[:100].repeat(2, 0)[:100]])
    both = np.concatenate([data(seed=1), data(60, seed=1).repeat(2, 0)[:100]])
    np.testing.assert_allclose(norm.moving_mean.numpy(), both.mean(0), rtol=1e-5)


def test_subclassed_models():
    model = Subclassed(bn=OURS)
    model(data())
    recalibrate(model, data())
    np.testing.assert_allclose(
        model.norms["before"].moving_mean.numpy(), data().mean(0), rtol=1e-5
    )


def test_prior_counts_samples():
    model = chain(OURS(name="bn"))
    x = data(60)
    old = [statistics(model)["bn"]] * 1
    recalibrate(model, x, prior=20)
    mean, variance = (np.asarray(part, "float64") for part in old[0])
    w = 20 / 80
    delta = x.mean(0, dtype="float64") - mean
    expected = (
        mean + delta * (1 - w),
        (variance * w + x.var(0, dtype="float64") * (1 - w) + delta**2 * w * (1 - w)),
    )
    np.testing.assert_allclose(statistics(model)["bn"], expected, rtol=1e-5)

    # For images a sample is an image, not a pixel.
    images = np.random.default_rng(0).normal(2.0, 1.0, (6, 5, 5, 4)).astype("float32")
    model = chain(OURS(name="bn"), shape=(5, 5, 4))
    mean, _ = statistics(model)["bn"]
    recalibrate(model, images, prior=2)
    expected = 0.25 * mean + 0.75 * images.mean((0, 1, 2))
    np.testing.assert_allclose(statistics(model)["bn"][0], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="prior=-1"):
        recalibrate(model, images, prior=-1)


def test_frozen_layers_are_skipped_unless_asked():
    model = chain(OURS(name="a"), OURS(name="b"), KERAS(name="c"), OURS(name="d"))
    model.get_layer("b").freeze_statistics = True
    model.get_layer("c").trainable = False
    before = statistics(model)
    assert list(recalibrate(model, data())) == ["a", "d"]
    after = statistics(model)
    for name in "bc":
        np.testing.assert_array_equal(before[name], after[name])
    for name in "ad":
        assert not np.allclose(before[name], after[name])
    assert list(recalibrate(model, data(), include_frozen=True)) == list("abcd")
    model.trainable = False
    with pytest.raises(ValueError, match=r"frozen.*include_frozen=True"):
        recalibrate(model, data())


def test_options_of_the_layer():
    x = data()
    model = chain(OURS(unbiased=True), shape=(4,))
    recalibrate(model, x)
    np.testing.assert_allclose(
        model.layers[0].moving_variance.numpy(), x.var(0, ddof=1), rtol=1e-5
    )
    model = chain(OURS(renorm=True, epsilon=1e-2))
    recalibrate(model, x)
    layer, stddev = model.layers[0], np.sqrt(x.var(0) + 1e-2)
    np.testing.assert_allclose(layer.moving_stddev.numpy(), stddev, rtol=1e-5)
    np.testing.assert_allclose(layer.renorm_stddev.numpy(), stddev, rtol=1e-5)
    np.testing.assert_allclose(layer.renorm_mean.numpy(), x.mean(0), rtol=1e-5)
    for options in {"virtual_batch_size": 8}, {"debias": True}, {"momentum": None}:
        model = chain(OURS(**options, name="bn"))
        recalibrate(model, x)
        mean, variance = statistics(model)["bn"]
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5)
        np.testing.assert_allclose(variance, x.var(0), rtol=1e-4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("batch_size", [25, 1])
def test_a_sample_that_is_not_finite_is_left_out_and_named(batch_size, exact):
    x = data()
    x[[27, 60], [1, 2]] = np.nan, np.inf
    model = chain(OURS(name="bn"), layers.Dense(4), OURS(name="next"))
    with pytest.warns(UserWarning, match="2 of 100 samples .* first is sample 27"):
        found = recalibrate(model, x, batch_size=batch_size, exact=exact)
    np.testing.assert_array_equal(found["bn"].count, 98)
    np.testing.assert_array_equal(found["next"].count, 98)
    expected = np.delete(x, [27, 60], axis=0)
    np.testing.assert_allclose(found["bn"].mean, expected.mean(0), rtol=1e-5)


@pytest.mark.parametrize("exact", [False, True])
def test_a_first_batch_of_which_nothing_is_finite(exact):
    x = data()
    x[:25] = np.nan
    model = chain(OURS(name="bn"), layers.Dense(4), OURS(name="next"))
    with pytest.warns(UserWarning, match="25 of 100 samples .* first is sample 0"):
        found = recalibrate(model, x, batch_size=25, exact=exact)
    assert [part.count[0] for part in found.values()] == [75, 75]


@backend.only("tensorflow", "only TensorFlow has ragged tensors")
def test_a_ragged_sample_that_is_not_finite():
    class Ragged(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = OURS(name="bn")

        def call(self, x):
            return tf.reduce_mean(self.norm(x), axis=1)

    def rows(values):
        return tf.RaggedTensor.from_row_lengths(values, [3, 1, 5, 1])

    x = data(10)
    model = Ragged()
    model(rows(x))
    x[3, 1] = np.nan
    found = keras_bn.statistics(model, tf.data.Dataset.from_tensors(rows(x)))
    np.testing.assert_array_equal(found["bn"].count, 9)
    np.testing.assert_allclose(found["bn"].mean, np.delete(x, 3, 0).mean(0), rtol=1e-5)


def test_a_sample_that_is_not_finite_where_batches_have_one_size(recwarn):
    x = data()
    x[27] = np.nan
    inputs = keras.Input((4,), batch_size=25)
    recalibrate(keras.Model(inputs, OURS(name="bn")(inputs)), x, batch_size=25)
    messages = [str(w.message) for w in recwarn if "samples" in str(w.message)]
    assert len(messages) == 1
    assert "though the data was" not in str([w.message for w in recwarn])


def test_data_of_which_nothing_is_finite_is_refused():
    x = data()
    x[:, 2] = np.inf
    model = chain(OURS(name="bn"))
    before = statistics(model)["bn"]
    with pytest.raises(ValueError, match="None of the 100 samples in the data is fin"):
        recalibrate(model, x)
    np.testing.assert_array_equal(statistics(model)["bn"], before)


def test_a_layer_whose_input_overflows():
    model = chain(layers.Rescaling([1.0, 1e17, 1.0, 1.0]), OURS(name="bn"))
    x = data()
    x[30, 1] = 1e22
    with pytest.warns(UserWarning, match="input of 'bn' .* in 1 of 4 batches"):
        found = recalibrate(model, x, batch_size=25)
    np.testing.assert_array_equal(found["bn"].count, [100, 75, 100, 100])
    model = chain(layers.Rescaling(1e17), OURS(name="bn"))
    with pytest.raises(ValueError, match="No element of the data counts for bn"):
        recalibrate(model, np.full((40, 4), 1e22))


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return data()[25 * i : 25 * (i + 1)], np.zeros(25)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: data(),
        lambda: tf.data.Dataset.from_tensor_slices(data()).batch(30),
        lambda: dataset((data(), np.zeros(100)), 30),
        lambda: dataset((data(), data(), data()), 9),
        Batches,
    ],
)
def test_anything_that_fit_accepts(make, exact):
    model = chain(OURS(name="bn"))
    recalibrate(model, make(), exact=exact)
    np.testing.assert_allclose(statistics(model)["bn"][0], data().mean(0), rtol=1e-5)


def test_generators_need_steps_and_cannot_be_exact():
    def forever():
        while True:
            yield data()[:50], np.zeros(50)

    model = chain(OURS(name="bn"))
    found = recalibrate(model, forever(), steps=3)
    np.testing.assert_array_equal(found["bn"].count, 150)
    with pytest.raises(ValueError, match="generator"):
        recalibrate(model, forever(), steps=3, exact=True)


def everything(model):
    variables = [*model.variables, *model.optimizer.variables]
    # Keras has the state of recurrent layers in no list of variables.
    variables += [v for la in model.layers for v in getattr(la, "states", ())]
    return {f"{i}/{v.path}": v.numpy() for i, v in enumerate(variables)}


def noisy():
    """A model in which much might move: dropout at all times, recurrent state."""
    x = keras.Input((6, 4), batch_size=10)
    y = layers.Dropout(0.5, seed=1)(OURS(name="bn")(x), training=True)
    y = layers.GaussianNoise(0.1, seed=2)(y)
    y = layers.LSTM(3, stateful=True)(y)
    y = layers.BatchNormalization(name="last")(y)
    model = randomized(keras.Model(x, y))
    model.compile("adam", "mse")
    # Not by training: on PyTorch Keras's stateful LSTM cannot be trained.
    model.predict(np.ones((10, 6, 4)), batch_size=10, verbose=0)
    model.optimizer.build(model.trainable_variables)
    for variable in model.optimizer.variables[2:]:
        variable.assign(np.ones(variable.shape))
    return model


def sequences(n=30):
    return np.random.default_rng(0).normal(3.0, 2.0, (n, 6, 4)).astype("float32")


def test_nothing_else_changes():
    model = noisy()
    flags = [layer.trainable for layer in model.layers]
    before = everything(model)
    recalibrate(model, sequences(), batch_size=10)
    after = everything(model)
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {path.rsplit("/", 2)[-2] for path in changed} == {"bn", "last"}
    assert {path.rsplit("/", 1)[-1] for path in changed} == {
        "moving_mean",
        "moving_variance",
    }
    assert flags == [layer.trainable for layer in model.layers]
    assert not any("call" in vars(layer) for layer in model.layers)
    expected = np.asarray(model.get_layer("bn").moving_mean)
    np.testing.assert_allclose(expected, sequences().mean((0, 1)), rtol=1e-4)


class FailureError(Exception):
    pass


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("error", [FailureError, KeyboardInterrupt])
def test_if_anything_goes_wrong_the_model_is_as_it_was(error, exact):
    class Breaking(keras.utils.PyDataset):
        reads = 1

        def __len__(self):
            return 3

        def __getitem__(self, i):
            Breaking.reads += 1
            if Breaking.reads > 3 + 3 * exact:
                raise error
            return sequences(10)

    model = noisy()
    before = everything(model)
    reported = (tf.errors.UnknownError,) if backend.NAME == "tensorflow" else ()
    with pytest.raises((error, *reported)):
        recalibrate(model, Breaking(), exact=exact)
    after = everything(model)
    for path, value in before.items():
        np.testing.assert_array_equal(value, after[path])
    assert not any("call" in vars(layer) for layer in model.layers)


def test_an_interrupted_assignment_is_taken_back(monkeypatch):
    model = chain(OURS(name="a"), OURS(name="b"))
    before = statistics(model)
    last = model.get_layer("b").moving_variance
    assign, old = type(last).assign, backend.array(last)

    def interrupted(self, value):
        if self is last and not np.array_equal(backend.array(value), old):
            raise KeyboardInterrupt
        return assign(self, value)

    monkeypatch.setattr(type(last), "assign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, data())
    for path, value in before.items():
        np.testing.assert_array_equal(value, statistics(model)[path])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(
    "empty",
    [
        lambda: np.zeros((0, 4), "float32"),
        lambda: dataset((data()[:0],), 10),
    ],
)
def test_no_data(empty, exact):
    model = chain(OURS(name="bn"))
    before = statistics(model)["bn"]
    with pytest.raises(ValueError, match="no data"):
        recalibrate(model, empty(), exact=exact)
    np.testing.assert_array_equal(before, statistics(model)["bn"])


def test_what_cannot_be_recalibrated():
    with pytest.raises(TypeError, match="Keras layer or model"):
        recalibrate(None, data())
    with pytest.raises(ValueError, match="no batch normalization"):
        recalibrate(chain(layers.Dense(2)), data())
    with pytest.raises(ValueError, match="not built"):
        recalibrate(keras.Sequential([OURS()]), data())


@backend.but_on("torch", "functions are not compiled there")
def test_a_layer_inside_a_compiled_function_is_refused():
    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = OURS(name="norm")
            self.norm.build((None, 4))
            self.run = in_mode(self.norm, COMPILED, self.norm.variables)

        def call(self, x):
            return self.run(x)

    model = Compiled()
    model(data())
    with pytest.raises(ValueError, match="'norm' is called inside a compiled function"):
        recalibrate(model, data())


@pytest.mark.filterwarnings("default:The statistics of")
def test_warnings():
    model = chain(OURS(name="bn"), layers.Dense(10))
    with pytest.warns(UserWarning, match="'bn' rest on 60 elements"):
        recalibrate(model, data(60))
    skewed = dataset((data(200), np.repeat([3, 7], [190, 10])), 50)
    with pytest.warns(UserWarning, match=r"1\.2 classes in effect.*10 apart"):
        recalibrate(model, skewed)


def test_progress_is_shown(capfd):
    model = chain(OURS(), layers.ReLU(), OURS())
    keras_bn.recalibrate(model, data(), batch_size=25, verbose=1)
    assert "recalibrating 4/4" in capfd.readouterr().err
    keras_bn.recalibrate(model, data(), exact=True, verbose=1)
    assert "recalibrating 2/2" in capfd.readouterr().err
    keras_bn.diagnose(model, data(), batch_size=25, verbose=1)
    assert "diagnosing 4/4" in capfd.readouterr().err
    recalibrate(model, data())
    assert capfd.readouterr() == ("", "")


def test_progress_is_shown_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(verbose):
        monkeypatch.setattr(sys, "stderr", Terminal())
        model = chain(OURS(), layers.ReLU())
        model.layers[0].moving_mean.assign(np.full(4, 9.0))
        keras_bn.diagnose(model, data(), **verbose).fix()
        lines = filter(None, sys.stderr.getvalue().splitlines())
        return [word for word, _ in itertools.groupby(w.split()[0] for w in lines)]

    assert shown({}) == ["diagnosing", "recalibrating", "diagnosing"]
    assert shown({"verbose": 0}) == []
    monkeypatch.setattr(sys, "stderr", None)  # as without a console
    keras_bn.recalibrate(chain(OURS()), data())


class Spy(keras.callbacks.Callback):
    """Notes, at each validation and epoch's end, how far the statistics are off."""

    def __init__(self, x):
        super().__init__()
        self.x, self.off = x, []

    def note(self):
        reference = keras_bn.from_keras(self.model)
        recalibrate(reference, self.x, batch_size=32)
        self.off.append(
            max(
                np.abs(a[0] - b[0]).max()
                for a, b in zip(
                    statistics(self.model).values(),
                    statistics(reference).values(),
                    strict=True,
                )
            )
        )

    def on_test_begin(self, logs=None):
        self.note()

    def on_epoch_end(self, epoch, logs=None):
        self.note()


@pytest.mark.parametrize(
    ("when", "swap"),
    mostly_slow_cases(
        [("epoch", None), ("epoch", False), ("epoch", True), ("end", None)],
        [("epoch", None), ("epoch", True)],
    ),
)
def test_callback(when, swap):
    x = data(64)
    model = chain(layers.Dense(4), OURS(), layers.ReLU(), layers.Dense(4), OURS())
    model.compile(keras.optimizers.SGD(0.05, use_ema=swap is not None), "mse")
    spy = Spy(x)
    callbacks = [keras_bn.Recalibrate(x, when=when, batch_size=32), spy]
    if swap is not None:
        callbacks.insert(0, keras.callbacks.SwapEMAWeights(swap_on_epoch=swap))
    model.fit(x, x, validation_data=(x, x), epochs=2, callbacks=callbacks, verbose=0)
    assert len(spy.off) == 4
    if when == "epoch":
        assert max(spy.off) < 1e-5
    else:
        assert min(spy.off) > 1e-2
    spy.off.clear()
    spy.note()
    assert spy.off[0] < 1e-5
    model.evaluate(x, x, callbacks=callbacks[-2:-1], verbose=0)
    with pytest.raises(ValueError, match="'epoch' or 'end'"):
        keras_bn.Recalibrate(x, when="often")


@pytest.mark.parametrize("place", [0, 1])
def test_a_training_goes_on_once_everything_is_frozen(place):
    x = data(64)
    model = chain(layers.Dense(4), OURS(name="bn"), layers.Dense(4))
    model.compile("sgd", "mse")
    callbacks = [keras_bn.Recalibrate(x)]
    callbacks.insert(place, keras_bn.FreezeAfter(3))
    with pytest.warns(UserWarning, match="Recalibrate: every .* is frozen") as caught:
        history = model.fit(
            x, x, epochs=4, validation_data=(x, x), callbacks=callbacks, verbose=0
        )
    assert len(history.epoch) == 4
    assert sum("is frozen" in str(warning.message) for warning in caught) == 1
    # The first epoch has 2 steps, and was recalibrated; the second froze that.
    kept = statistics(model)["bn"]
    assert not np.allclose(kept[0], 0)
    # Frozen by `trainable`, from the start, and asked for all the same.
    model.trainable = False
    model.compile("sgd", "mse")
    with pytest.warns(UserWarning, match="is frozen"):
        model.fit(x, x, callbacks=[keras_bn.Recalibrate(x)], verbose=0)
    np.testing.assert_array_equal(statistics(model)["bn"], kept)
    again = keras_bn.Recalibrate(x * 2, include_frozen=True)
    model.fit(x, x, callbacks=[again], verbose=0)
    assert not np.allclose(statistics(model)["bn"], kept)


class Shrinking(keras.utils.PyDataset):
    """Data that has nothing left when it is read again."""

    def __init__(self):
        super().__init__()
        self.length = 4

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return (data(64)[16 * index : 16 * index + 16],)

    def on_epoch_end(self):
        self.length = 0


def _once():
    return (data(64)[i : i + 16] for i in (0, 16, 32, 48))


def _dataset_of_a_generator():
    batches = _once()
    signature = tf.TensorSpec((None, 4))
    return tf.data.Dataset.from_generator(lambda: batches, output_signature=signature)


@pytest.mark.parametrize(
    "callback",
    mostly_slow(
        [keras_bn.Recalibrate, keras_bn.StatisticsLogger], [keras_bn.Recalibrate]
    ),
)
@pytest.mark.parametrize(
    "ending",
    [
        lambda: (_once(), 4),
        lambda: (_once(), 2),
        lambda: (_dataset_of_a_generator(), None),
        lambda: (Shrinking(), None),
    ],
    ids=["generator", "in two parts", "dataset", "PyDataset"],
)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_a_training_goes_on_when_the_data_has_ended(callback, ending):
    given, steps = ending()
    x = data(64)
    model = chain(layers.Dense(4), OURS(name="bn"), layers.Dense(4))
    model.compile("sgd", "mse")
    ours = callback(given, steps=steps)
    with pytest.warns(UserWarning, match=f"{callback.__name__}: the data") as caught:
        history = model.fit(x, x, epochs=4, callbacks=[ours], verbose=0)
    assert len(history.epoch) == 4
    assert sum("the data has no" in str(w.message) for w in caught) == 1
    if callback is keras_bn.StatisticsLogger:
        epochs = sorted({row.epoch for row in ours.rows})
        assert epochs == ([0, 1] if steps == 2 else [0])


class Saver(keras.callbacks.Callback):
    """Saves the weights as a callback of anyone's may."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        self.model.save_weights(self.path.format(epoch=epoch + 1))


@pytest.mark.parametrize("place", mostly_slow([0, 1], [1]))
@pytest.mark.parametrize("together", [1] if backend.NAME == "torch" else [1, 3])
@pytest.mark.parametrize(
    "saver",
    [
        Saver,
        lambda path: keras.callbacks.ModelCheckpoint(path, save_weights_only=True),
    ],
)
def test_what_is_saved_at_the_end_of_an_epoch_is_recalibrated(
    tmp_path, place, together, saver
):
    """Wherever the callback stands, and without validation."""
    x = data(96)
    model = chain(layers.Dense(4), OURS(name="bn"), layers.Dense(4))
    model.compile("sgd", "mse", steps_per_execution=together)
    callbacks = [keras_bn.Recalibrate(x)]
    callbacks.insert(place, saver(str(tmp_path / "{epoch}.weights.h5")))
    model.fit(x, x, batch_size=12, epochs=3, callbacks=callbacks, verbose=0)
    for epoch in 1, 2, 3:
        model.load_weights(tmp_path / f"{epoch}.weights.h5")
        saved = statistics(model)["bn"]
        recalibrate(model, x)
        np.testing.assert_allclose(saved, statistics(model)["bn"], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_the_length_of_an_epoch_is_known_from_the_first(tmp_path):
    x = data(64)
    model = chain(layers.Dense(4), OURS(name="bn"), layers.Dense(4))
    model.compile("sgd", "mse")
    callbacks = [Saver(str(tmp_path / "{epoch}.weights.h5")), keras_bn.Recalibrate(x)]

    signature = (tf.TensorSpec((None, 4)), tf.TensorSpec((None, 4)))
    unknown = tf.data.Dataset.from_generator(
        lambda: ((x[i : i + 16], x[i : i + 16]) for i in range(0, 64, 16)),
        output_signature=signature,
    )
    model.fit(unknown, epochs=2, callbacks=callbacks, verbose=0)
    off = []
    for epoch in 1, 2:
        model.load_weights(tmp_path / f"{epoch}.weights.h5")
        saved = statistics(model)["bn"]
        recalibrate(model, x)
        off.append(np.abs(np.subtract(saved, statistics(model)["bn"])).max())
    assert off[0] > 1e-2 > 1e-5 > off[1]


@pytest.mark.slow
@backend.only("tensorflow", "its strategies")
def test_replicas():
    script = Path(__file__).parents[1] / "support" / "two_replicas.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["all hold"], done.stderr[-2000:]
