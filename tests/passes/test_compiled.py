"""Compiled passes give what eager ones give, with every tool and kind of model."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops
from support import zoo
from support.backend import NAME, array, only
from support.marks import mostly_slow_cases
from support.zoo import inputs_of, randomized

import keras_bn

OURS = keras_bn.BatchNormalization
KERAS = layers.BatchNormalization
pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("seeded"),
]


class Looking(keras.Model):
    """A model whose Python looks at values, so that it cannot be traced."""

    def __init__(self, bn):
        super().__init__()
        self.norm, self.dense = bn(name="norm"), layers.Dense(3)

    def call(self, x):
        x = self.norm(x)
        return self.dense(x if float(np.max(array(x))) > 0 else -x)


def called(kind):
    """A subclassed model that has been called."""

    def make(bn):
        model = kind(bn=bn)
        model(np.zeros((2, 4), "float32"))
        return model

    return make


def chain(*stack):
    return keras.Sequential([keras.Input((4,)), *stack, layers.Dense(3)])


def options(bn):
    """Layers whose output in training is not that of the plain formula."""
    return chain(
        OURS(renorm=True),
        layers.Dense(6),
        OURS(virtual_batch_size=4, unbiased=True),
        layers.ReLU(),
        OURS(freeze_statistics=True),
        layers.Dropout(0.5),
        bn(trainable=False),
    )


def mixed(bn):
    policy = {"dtype": "mixed_float16" if NAME == "tensorflow" else "mixed_bfloat16"}
    return chain(layers.Dense(8, **policy), bn(**policy), layers.ReLU(**policy))


def noisy(bn):
    """Random numbers are drawn in inference, too."""
    x = keras.Input((4,))
    y = layers.Dropout(0.5, seed=1)(x, training=True)
    return keras.Model(x, layers.Dense(3)(bn()(y)))


class Adding(layers.Layer):
    """Adds a loss in its call."""

    def call(self, x):
        self.add_loss(ops.mean(ops.square(x)))
        return x


def adding(bn):
    return chain(bn(), layers.Dense(4, kernel_regularizer="l2"), Adding())


def stateful(bn):
    """Its states go on from batch to batch, and Keras has them in no list."""
    x = keras.Input((6, 4), batch_size=7)
    return keras.Model(x, layers.Dense(3)(bn()(layers.LSTM(3, stateful=True)(x))))


MODELS = {
    **{make.__name__: make for make in zoo.GRAPHS},
    "subclassed": called(zoo.Subclassed),
    "looking": called(Looking),
    "options": options,
    "mixed": mixed,
    "noisy": noisy,
    "adding": adding,
    "stateful": stateful,
}


def size(name):
    """That of a batch; with 21 samples, the last one is usually smaller."""
    return 7 if name == "stateful" else 8


# The models of the default run.
FAST = "subclassed", "options", "noisy", "adding", "stateful"
USUAL = [*itertools.product(FAST, (OURS, KERAS))]


def both_ways(tool, make):
    """What a tool gives, compiled and eagerly, each with a model as new."""
    results = []
    for eagerly in False, True:
        keras.backend.clear_session()  # so that the names are the same
        keras.utils.set_random_seed(0)
        model = randomized(make())
        model.compile("sgd", "mse", run_eagerly=eagerly)
        results.append(tool(model))
    return results


def close(got, expected, mixed):
    tolerance = 1e-2 if mixed else 1e-4
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "bn"),
    mostly_slow_cases([*zip(MODELS, itertools.cycle([OURS, KERAS]))], USUAL),
)
@pytest.mark.parametrize("how", [{}, {"exact": True, "prior": 3}])
def test_recalibrate(name, bn, how):
    def tool(model):
        x = inputs_of(model, 21) if name not in SUBCLASSED else rows(21)
        moments = keras_bn.recalibrate(
            model, x, batch_size=size(name), include_frozen=True, verbose=0, **how
        )
        variables = [array(v) for v in model.variables]
        parts = [part for each in moments.values() for part in each]
        return list(moments), [*parts, *variables]

    compiled, eager = both_ways(tool, lambda: MODELS[name](bn))
    assert compiled[0] == eager[0]
    close(compiled[1], eager[1], name == "mixed")


SUBCLASSED = "subclassed", "looking"


def rows(n):
    return np.random.default_rng(1).normal(0.3, 2.0, (n, 4)).astype("float32")


@pytest.mark.parametrize(
    ("name", "bn"),
    mostly_slow_cases([*zip(MODELS, itertools.cycle([KERAS, OURS]))], USUAL),
)
def test_diagnose(name, bn):
    def tool(model):
        x = inputs_of(model, 21) if name not in SUBCLASSED else rows(21)
        y = keras.tree.map_structure(
            lambda t: np.eye(t.shape[-1])[np.arange(21) % t.shape[-1]],
            model(keras.tree.map_structure(lambda a: a[: size(name)], x)),
        )
        weight = np.linspace(0.5, 1.5, 21)
        data = (x, y, weight) if not isinstance(y, dict) else (x, y)
        record = keras_bn.diagnose(model, data, batch_size=size(name)).record
        numbers = [record.gap, *record.loss, *(record.accuracy or ())]
        for layer in record.layers:
            numbers += [layer.elements, layer.gap, *layer.data]
        layout = [(layer.layer, layer.inference_mode) for layer in record.layers]
        return [*layout, record.samples, record.accuracy is None], numbers

    compiled, eager = both_ways(tool, lambda: MODELS[name](bn))
    assert compiled[0] == eager[0]
    close(compiled[1], eager[1], name == "mixed")


def test_the_logger_sees_new_weights_and_frozen_layers():
    def tool(model):
        class Freezing(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == 2:
                    model.layers[0].freeze_statistics = True

        x = rows(40)
        logger = keras_bn.StatisticsLogger(x, batch_size=16)
        callbacks = [Freezing(), logger]
        model.fit(x, x[:, :3], epochs=4, shuffle=False, callbacks=callbacks, verbose=0)
        return [row.layer for row in logger.rows], [list(r[2:]) for r in logger.rows]

    compiled, eager = both_ways(
        tool, lambda: chain(OURS(name="bn"), layers.Dense(5), KERAS())
    )
    assert compiled[0] == eager[0]
    close(compiled[1], eager[1], False)
    drifts = [row[0] for row in compiled[1][::3]]
    assert len(set(drifts)) == 3  # frozen from then on


class Counting(layers.Layer):
    """Counts how often Python runs."""

    calls = 0

    def call(self, x):
        self.calls += 1
        return x


@pytest.mark.skipif(NAME == "torch", reason="nothing is compiled there")
@pytest.mark.parametrize("tool", ["recalibrate", "exact", "diagnose", "log"])
def test_python_runs_once_for_each_trace(tool):
    spy = Counting()
    model = chain(OURS(), layers.Dense(4), spy, OURS())
    model.compile("sgd", "mse")
    x = rows(64)
    spy.calls = 0
    if tool == "log":
        logger = keras_bn.StatisticsLogger(x, batch_size=8)
        model.fit(x, x[:, :3], epochs=3, callbacks=[logger], verbose=0)
    elif tool == "diagnose":
        keras_bn.diagnose(model, (x, x[:, :3]), batch_size=8)
    else:
        exact = tool == "exact"
        keras_bn.recalibrate(model, x, batch_size=8, exact=exact, verbose=0)
    # `diagnose` runs once eagerly, then both modes in one trace; `fit` traces, too.
    assert spy.calls <= {"recalibrate": 1, "exact": 1, "diagnose": 3, "log": 5}[tool]


def test_what_cannot_be_traced_runs_eagerly():
    model = called(Looking)(OURS)
    keras_bn.recalibrate(model, rows(40), verbose=0)
    np.testing.assert_allclose(model.norm.moving_mean, rows(40).mean(0), rtol=1e-4)


@only("tensorflow", "elsewhere the sizes of a trace are known")
def test_sequences_of_any_length_share_few_traces():
    spy = Counting()
    x = keras.Input((None, 4))
    model = keras.Model(x, spy(OURS(name="bn")(x)))
    spy.calls = 0
    batches = [rows(8 * n).reshape(8, n, 4) for n in range(2, 12)]
    moments = keras_bn.recalibrate(model, ((b,) for b in batches), steps=10, verbose=0)
    whole = np.concatenate([b.reshape(-1, 4) for b in batches])
    np.testing.assert_allclose(moments["bn"].mean, whole.mean(0), rtol=1e-4)
    assert spy.calls <= 3


def test_a_single_input_in_a_list_is_no_reason_to_warn(recwarn):
    x = keras.Input((4,))
    model = keras.Model([x], OURS(name="bn")(x))
    keras_bn.recalibrate(model, rows(200), verbose=0)
    assert not [w for w in recwarn if "structure" in str(w.message)]
