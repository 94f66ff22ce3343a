"""The one pass over data: what it takes, what it refuses, and whom it disturbs."""

import contextlib
import sys
import threading
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from support import backend
from support.backend import NAME, array, dataset, tensor, tf
from support.distributed import strategy_of
from support.marks import slow

import keras_bn
from keras_bn.passes.data import batches

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import memory

KERAS = layers.BatchNormalization
OURS = keras_bn.BatchNormalization


def data(n=120, mean=3.0):
    return np.random.default_rng(0).normal(mean, 2.0, (n, 4)).astype("float32")


def chain(*inner):
    return keras.Sequential([keras.Input((4,)), *inner])


class Pairs(keras.utils.PyDataset):
    """Ten batches of twelve, with labels and weights."""

    began = ended = 0

    def __init__(self, length=10, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    @property
    def num_batches(self):
        return self.length

    def __getitem__(self, i):
        x = data()[12 * (i % 10) : 12 * (i % 10 + 1)]
        return x, x[:, 0], x[:, 1]

    def on_epoch_begin(self):
        self.began += 1

    def on_epoch_end(self):
        self.ended += 1


def loader():
    torch = pytest.importorskip("torch")
    return torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(data())), batch_size=12
    )


@pytest.mark.parametrize(
    "make",
    [
        data,
        lambda: tensor(data()),
        lambda: tf.data.Dataset.from_tensor_slices(data()).batch(12),
        lambda: dataset((data(), data(), data()), 12),
        Pairs,
        lambda: Pairs(workers=2),
        lambda: ((data()[i : i + 12],) for i in range(0, 120, 12)),
        loader,
    ],
)
@pytest.mark.parametrize("steps", [None, 3])
def test_what_fit_accepts(make, steps):
    found = [array(x) for x, _, _ in batches(make(), steps=steps, batch_size=12)]
    assert len(found) == (steps or 10)
    np.testing.assert_array_equal(np.concatenate(found), data()[: 12 * (steps or 10)])


def test_labels_and_weights():
    for x, y, weight in batches(Pairs()):
        np.testing.assert_array_equal(x[:, 0], y)
        np.testing.assert_array_equal(x[:, 1], weight)
    (got,) = batches(data(5), data(5)[:, 0], data(5)[:, 1])
    np.testing.assert_array_equal(got[1], data(5)[:, 0])


def test_a_generator_gives_no_more_than_asked_for():
    source = ((np.full((2, 4), float(i), "float32"),) for i in range(10))
    assert [x[0, 0] for x, _, _ in batches(source, steps=3)] == [0.0, 1.0, 2.0]
    assert [x[0, 0] for x, _, _ in batches(source, steps=2)] == [3.0, 4.0]


def test_batches_without_samples():
    model = chain(OURS(name="bn"), layers.Dense(4))
    model.compile("sgd", "mse")
    x = data(200)
    parts = [x[a:b] for a, b in ((0, 0), (0, 150), (150, 150), (150, 200))]
    found = keras_bn.statistics(model, ((p,) for p in parts), steps=4, verbose=0)
    np.testing.assert_allclose(found["bn"].mean, x.mean(0), rtol=1e-5)
    record = keras_bn.diagnose(model, ((p, p) for p in parts), steps=4).record
    assert (record.samples, record.batches) == (200, 2)
    assert np.isfinite(record.loss).all()


class SparsePairs(keras.utils.PyDataset):
    num_batches = 10

    def __getitem__(self, i):
        sparse = pytest.importorskip("scipy.sparse")
        return sparse.csr_matrix(data()[12 * i : 12 * (i + 1)]), np.zeros(12)


@pytest.mark.parametrize(
    "make", [SparsePairs, lambda: (batch for batch in SparsePairs())]
)
def test_sparse_matrices(make):
    model = chain(layers.Dense(4, kernel_initializer="identity"), OURS(name="bn"))
    keras_bn.recalibrate(model, make(), steps=10, verbose=0)
    found = model.get_layer("bn").moving_mean
    np.testing.assert_allclose(found, data().mean(0), rtol=1e-5)
    assert keras_bn.diagnose(model, make(), steps=10).record.samples == 120


class Choosing(keras.Model):
    """A model whose second normalization is reached by some batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = OURS(name="first"), OURS(name="second")

    def call(self, x):
        large = float(np.max(array(x))) > 100.0
        x = self.first(x)
        return self.second(x) if large else x


@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_that_only_later_batches_reach(exact):
    model = Choosing()
    model.first.build((None, 4))
    model.second.build((None, 4))
    model.built = True
    x = np.concatenate([data(), data(mean=200.0)])
    found = keras_bn.recalibrate(model, x, batch_size=120, exact=exact, verbose=0)
    assert list(found) == ["first", "second"]
    np.testing.assert_array_equal(found["second"].count, 120)


def test_data_sets_are_told_when_epochs_begin_and_end():
    source = Pairs()
    list(batches(source))
    for _ in batches(source, steps=2):
        pass
    with contextlib.closing(batches(source)) as abandoned:
        next(abandoned)
    assert (source.began, source.ended) == (3, 3)


ENDLESS = {
    "tf.data": lambda: tf.data.Dataset.from_tensor_slices(data()).batch(12).repeat(),
    "PyDataset": lambda: Pairs(None),
    "PyDataset with workers": lambda: Pairs(None, workers=2),
}


@pytest.mark.parametrize("kind", ENDLESS)
@pytest.mark.parametrize("tool", ["recalibrate", "exact", "diagnose"])
def test_data_without_end(kind, tool):
    model, source = chain(OURS(name="bn")), ENDLESS[kind]()

    def run(**options):
        if tool == "diagnose":
            return keras_bn.diagnose(model, source, **options).record.samples
        options["exact"] = tool == "exact"
        found = keras_bn.recalibrate(model, source, verbose=0, **options)
        return found["bn"].count[0]

    before = model.get_layer("bn").moving_mean.numpy()
    with pytest.raises(ValueError, match="has no end: give `steps`"):
        run()
    np.testing.assert_array_equal(model.get_layer("bn").moving_mean, before)
    assert run(steps=10) == 120


@pytest.mark.filterwarnings("default:The data ended")
def test_data_that_ends_early():
    model = chain(OURS(name="bn"))
    for source in (
        ((data()[i : i + 12],) for i in range(0, 120, 12)),
        dataset((data(),), 12),
        Pairs(),
    ):
        with pytest.warns(UserWarning, match="ended after 10 batches.*steps=12"):
            found = keras_bn.recalibrate(model, source, steps=12, verbose=0)
        assert found["bn"].count[0] == 120


def many():
    while True:
        yield data(), data()[:, :2]


def callback(kind, source, **options):
    if kind == "recalibrate":
        return keras_bn.Recalibrate(source, **options)
    return keras_bn.StatisticsLogger(source, **options)


@pytest.mark.parametrize("kind", ["recalibrate", "log"])
def test_callbacks_refuse_when_fit_begins(kind):
    trained = []

    def fit(model, source, **options):
        model.compile("sgd", "mse")
        spy = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: trained.append(batch)
        )
        each = callback(kind, source, **options)
        model.fit(data(), data()[:, :2], callbacks=[each, spy], verbose=0)

    normal = chain(OURS(), layers.Dense(2))
    for source in many(), *(make() for make in ENDLESS.values()):
        with pytest.raises(ValueError, match="`steps`"):
            fit(normal, source)
    with pytest.raises(ValueError, match="no batch normalization"):
        fit(chain(layers.Dense(2)), data())
    assert not trained


@pytest.mark.parametrize("kind", ["recalibrate", "log"])
def test_callbacks_read_endless_data_in_steps(kind):
    model = chain(OURS(name="bn"), layers.Dense(2))
    model.compile("sgd", "mse")
    each = callback(kind, many(), steps=2)
    model.fit(many(), steps_per_epoch=3, epochs=2, callbacks=[each], verbose=0)
    if kind == "log":
        assert [row.epoch for row in each.rows if row.layer == "bn"] == [0, 1, 2]
    else:
        np.testing.assert_allclose(
            model.get_layer("bn").moving_mean, data().mean(0), rtol=1e-4
        )


class Pair(keras.Model):
    """Two models trained by a step of its own, and no call."""

    def __init__(self):
        super().__init__()
        self.first = chain(OURS(name="bn"), layers.Dense(2))
        self.second = chain(KERAS(name="bn"), layers.Dense(2))
        self.built = True  # PyTorch's `fit` would call it to find out

    def train_step(self, *given):
        if NAME == "jax":  # a step there is without effects, and gives the state
            return {"loss": 0.0}, given[0]
        (batch,) = given
        self.first(batch[0], training=True)
        return {"loss": 0.0}


def test_callbacks_for_a_part_of_what_is_fitted():
    model = Pair()
    model.compile("sgd")
    x = data()
    model.fit(
        x,
        x,
        verbose=0,
        callbacks=[
            keras_bn.Recalibrate(x, model=model.first),
            logger := keras_bn.StatisticsLogger(x, model=model.second),
        ],
    )
    np.testing.assert_allclose(
        model.first.get_layer("bn").moving_mean, x.mean(0), rtol=1e-4
    )
    assert [row.layer for row in logger.rows] == ["bn", model.second.name] * 2
    assert logger.rows[0].mean_drift > 1


@pytest.mark.parametrize("kind", ["recalibrate", "log"])
def test_a_model_without_call_is_refused_when_fit_begins(kind):
    model = Pair()
    model.compile("sgd")
    spy = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_: 1 / 0)
    with pytest.raises(ValueError, match=r"has no `call`.*`model=`"):
        model.fit(data(), data(), callbacks=[callback(kind, data()), spy], verbose=0)
    for tool in keras_bn.recalibrate, keras_bn.diagnose:
        with pytest.raises(ValueError, match="has no `call`"):
            tool(model, data(), verbose=0)


class Doubled(OURS):
    def call(self, x, training=None, mask=None):
        return 2.0 * super().call(x, training=training, mask=mask)


class KerasDoubled(KERAS):
    def call(self, x, training=None, mask=None):
        return 2.0 * super().call(x, training=training, mask=mask)


class Named(OURS):
    def __init__(self, label, **kwargs):
        super().__init__(**kwargs)
        self.label = label


class KerasNamed(KERAS):
    def __init__(self, label, **kwargs):
        super().__init__(momentum=0.5, **kwargs)
        self.label = label


def test_subclasses_without_a_call_are_normalizations():
    model = chain(Named("a", name="a"), KerasNamed("b", name="b"), layers.Dense(2))
    model.compile("sgd", "mse")
    report = keras_bn.diagnose(model, data())
    assert [each.layer for each in report.record.layers] == ["a", "b"]
    found = keras_bn.recalibrate(model, data(), verbose=0)
    assert list(found) == ["a", "b"]
    np.testing.assert_allclose(
        model.get_layer("a").moving_mean, data().mean(0), rtol=1e-5
    )
    assert not keras_bn.diagnose(model, data()).record.layers[1].drift.mean > 0.1
    assert {fold.layer for fold in keras_bn.plan_fold(model)} == {"a", "b"}
    assert len(keras_bn.fold(model).layers) == 1
    assert keras_bn.freeze(model) == ["a"]


@pytest.mark.filterwarnings("default:Skipped")
@pytest.mark.parametrize("other", [Doubled, KerasDoubled])
def test_subclasses_with_a_call_are_left_alone_and_named(other):
    model = chain(other(name="doubled"), OURS(name="bn"))
    model.compile("sgd", "mse")
    before = model.get_layer("doubled").moving_mean.numpy()
    with pytest.warns(UserWarning, match="call` of its own: doubled"):
        found = keras_bn.recalibrate(model, data(), verbose=0)
    assert list(found) == ["bn"]
    np.testing.assert_array_equal(model.get_layer("doubled").moving_mean, before)
    with pytest.warns(UserWarning, match="call` of its own: doubled"):
        report = keras_bn.diagnose(model, data())
    assert [each.layer for each in report.record.layers] == ["bn"]
    with pytest.warns(UserWarning, match="call` of its own: doubled"):
        model.fit(
            data(),
            data(),
            verbose=0,
            callbacks=[keras_bn.StatisticsLogger(data())],
        )
    plan = {fold.layer: fold for fold in keras_bn.plan_fold(model)}
    assert plan["doubled"].into is None
    assert "`call` of its own" in plan["doubled"].reason


def test_a_normalization_that_was_never_built():
    class Idle(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = OURS(name="used"), KERAS(name="unused")

        def call(self, x):
            return self.used(x)

    model = Idle()
    model(data())
    for tool in (
        lambda: keras_bn.recalibrate(model, data(), verbose=0),
        lambda: keras_bn.diagnose(model, data()),
        lambda: keras_bn.plan_fold(model),
        lambda: keras_bn.fold(model),
    ):
        with pytest.raises(ValueError, match="'unused' is not built"):
            tool()


def served(model, x, work):
    """How many answers of the model were wrong while `work` ran in another thread."""
    ways = [lambda: array(model(x))]
    if NAME != "jax":  # where Keras's `predict` deletes the variables while it runs
        ways.append(lambda: model.predict(x, verbose=0))
    expected = model.predict(x, verbose=0)
    wrong, answers, stop = [], [], threading.Event()

    def serve():
        while not stop.is_set():
            for answer in ways:
                answers.append(1)
                if not np.allclose(answer(), expected, rtol=1e-4, atol=1e-4):
                    wrong.append(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(3):
            work()
    finally:
        stop.set()
        thread.join()
    assert answers
    return len(wrong)


@pytest.mark.parametrize("kind", [OURS, KERAS])
def test_other_threads_are_served_as_ever(kind):
    model = chain(kind(), layers.Dense(8), layers.ReLU(), kind(), layers.Dense(2))
    other = data(mean=-1.0)

    def recalibrate():
        keras_bn.recalibrate(model, data(), batch_size=12, verbose=0)

    recalibrate()  # so that it changes nothing when it runs again

    assert served(model, other, recalibrate) == 0
    assert served(model, other, lambda: keras_bn.diagnose(model, other)) == 0


@pytest.mark.parametrize("tool", [keras_bn.recalibrate, keras_bn.diagnose])
def test_a_call_that_the_user_replaced_stays(tool):
    model = chain(OURS(name="bn"), layers.Dense(2))
    layer, seen = model.get_layer("bn"), []

    def spy(*args, **kwargs):
        seen.append(1)
        return OURS.call(layer, *args, **kwargs)

    layer.call = spy
    tool(model, data(), verbose=0)
    assert layer.call is spy
    before = len(seen)
    model(data())
    assert len(seen) == before + 1


@backend.only("torch", "elsewhere nothing is kept unless a tape asks for it")
def test_a_pass_keeps_nothing_for_gradients():
    class Look(layers.Layer):
        def call(self, x):
            asked.append(x.requires_grad)
            return x

    asked = []
    model = chain(layers.Dense(4), OURS(), Look())
    asked.clear()
    keras_bn.recalibrate(model, data(), verbose=0)
    keras_bn.diagnose(model, data())
    assert asked
    assert not any(asked)
    assert model(tensor(data())).requires_grad


@pytest.mark.skipif(sys.platform != "linux", reason="Linux says what the peak was")
@pytest.mark.parametrize("tool", [keras_bn.statistics, keras_bn.diagnose])
def test_the_peak_of_memory_does_not_grow_with_the_data(tool):
    model = keras.Sequential([keras.Input((32, 32, 256)), OURS()])
    start = np.random.default_rng(0).normal(size=(8, 32, 32, 256)).astype("float32")

    def images(count):
        for i in range(count):
            yield (start + np.float32(i),)

    def peak(count):
        tool(model, images(count), steps=count, verbose=0)
        return memory.resident(peak=True)

    memory.forget_peak()
    few = peak(3)
    data = 60 * start.nbytes
    assert peak(60) - few < data / 8


def test_two_passes_at_once():
    model = chain(OURS(name="a"), layers.Dense(8), OURS(name="b"))
    reports = {}

    def run(name, source):
        reports[name] = keras_bn.diagnose(model, source, batch_size=12)

    sources = {"near": data(), "far": data(mean=50.0)}
    threads = [threading.Thread(target=run, args=pair) for pair in sources.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, source in sources.items():
        found = reports[name].record.layers[0].data.mean
        np.testing.assert_allclose(found, source.mean(0), rtol=1e-5)
    assert not any("call" in vars(layer) for layer in model.layers)


@pytest.mark.parametrize("norms", [slow(1), 2])
@pytest.mark.parametrize("synchronized", [slow(False), True])
def test_replicas(norms, synchronized):
    strategy = strategy_of("mirrored 2")
    with strategy.scope():
        inner = [OURS(name=f"bn_{i}", synchronized=synchronized) for i in range(norms)]
        model = chain(*inner, layers.Dense(2))
        model.compile("sgd", "mse")
    x, y = data(), data()[:, :2]
    logger = keras_bn.StatisticsLogger(x, batch_size=40)
    callbacks = [keras_bn.Recalibrate(x, batch_size=40), logger]
    model.fit(x, y, batch_size=20, epochs=2, callbacks=callbacks, verbose=0)
    assert len(logger.rows) == 3 * (norms + 1)
    report = keras_bn.diagnose(model, (x, y))
    expected = model.evaluate(x, y, verbose=0)
    np.testing.assert_allclose(report.record.loss[0], expected, rtol=1e-5)
    np.testing.assert_allclose(report.record.layers[0].data.mean, x.mean(0), rtol=1e-5)
    with strategy.scope():
        again = keras_bn.diagnose(model, (x, y))
    np.testing.assert_allclose(again.record.loss[0], expected, rtol=1e-5)


@pytest.mark.parametrize("tool", [keras_bn.recalibrate, keras_bn.diagnose])
def test_a_distributed_data_set_is_refused_in_words(tool):
    strategy = strategy_of("mirrored 2")
    with strategy.scope():
        model = chain(OURS(), layers.Dense(2))
        model.compile("sgd", "mse")
    whole = tf.data.Dataset.from_tensor_slices((data(), data()[:, :2])).batch(20)
    with pytest.raises(ValueError, match="is distributed over replicas"):
        tool(model, strategy.experimental_distribute_dataset(whole), verbose=0)
    tool(model, whole, verbose=0)
