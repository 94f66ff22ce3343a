"""A reference and ours, trained side by side, and how far apart they end.

float64: outputs, weights and moving statistics must agree to 1e-9.

float32: rounding alone drives two right implementations apart, a little at every
step and now and then by a leap, when it takes a ReLU across its kink. So the
reference is also trained with the rows of every batch in other orders. That is the
same training in exact arithmetic, and how far such trainings end from each other is
what rounding does here. Ours may be twice as far from the reference, no more.
"""

import contextlib
import dataclasses
import itertools
import time

import keras
import numpy as np

OURS = "keras_bn"
QUANTITIES = ("outputs", "weights", "moving statistics")
FLOAT64_TOLERANCE = 1e-9
REORDERED = 4


@contextlib.contextmanager
def precision(dtype):
    """Everything Keras makes and takes in here has this dtype, the optimizer's too."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


class _Tick(keras.callbacks.Callback):
    """Calls `tick` after every batch."""

    def __init__(self, tick):
        super().__init__()
        self.tick = tick

    def on_train_batch_end(self, batch, logs=None):
        self.tick()


class KerasSide:
    """A Keras model in training.

    `jit_compile` stays at Keras's "auto", off on a machine with CPUs only: it is what
    a user gets, and compiling would take longer than these trainings.

    Args:
        name: what the tables call it.
        model: a classifier; its outputs are logits if `from_logits`, else softmax's.
        weights: initial weights, as `set_weights` takes them.
        optimizer: a Keras optimizer, or the name of one.
    """

    def __init__(self, name, model, weights, optimizer="adam", from_logits=False):
        self.name, self.model = name, model
        model.set_weights(weights)
        model.compile(
            optimizer,
            keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits),
            metrics=["accuracy"],
        )

    def train(self, x, y, batch_size, tick):
        """One epoch over the rows as they come; returns mean loss and accuracy."""
        history = self.model.fit(
            x,
            y,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[_Tick(tick)],
        ).history
        return history["loss"][0], history["accuracy"][0]

    def outputs(self, x):
        return self.model.predict_on_batch(x)

    def weights(self):
        """`{name: array}`, in the order of the layers; as `moving_statistics`."""
        return _arrays(self.model.trainable_weights)

    def moving_statistics(self):
        return _arrays(self.model.non_trainable_weights)


def _arrays(variables):
    return {v.path.partition("/")[2]: v.numpy() for v in variables}


@dataclasses.dataclass
class Snapshot:
    """A side after an epoch; `arrays` is `{quantity: {name: float64 array}}`."""

    loss: float
    accuracy: float
    val_accuracy: float
    seconds: float
    arrays: dict


@dataclasses.dataclass
class Difference:
    """The largest absolute difference, and the name of the array it is in."""

    value: float
    where: str


def differences(a, b):
    """`{quantity: Difference}` of two snapshots; NaN, if any, counts as largest."""
    result = {}
    for quantity in QUANTITIES:
        one, other = a.arrays[quantity].values(), b.arrays[quantity]
        pairs = zip(one, other.values(), strict=True)
        largest = [np.max(np.abs(p - q)) for p, q in pairs]
        worst = int(np.argmax(largest))
        result[quantity] = Difference(float(largest[worst]), list(other)[worst])
    return result


@dataclasses.dataclass
class Run:
    """What came of it in one dtype.

    `epochs` has a list of snapshots for each epoch: of the reference, of ours, and in
    float32 of the reference trained on reordered batches. `reloaded_identical` says
    for each side that was saved whether its outputs came back bit for bit. `ours` is
    what the tables call ours.
    """

    title: str
    dtype: str
    reference: str
    epochs: list = dataclasses.field(default_factory=list)
    reloaded_identical: dict = dataclasses.field(default_factory=dict)
    ours: str = OURS

    def differences(self):
        """How far ours is from the reference, after each epoch."""
        return [differences(reference, ours) for reference, ours, *_ in self.epochs]

    def allowed(self):
        """How far it may be, after each epoch: `{quantity: float}`."""
        if self.dtype == "float64":
            return [dict.fromkeys(QUANTITIES, FLOAT64_TOLERANCE) for _ in self.epochs]
        return [
            {q: 2 * float(np.max([d[q].value for d in spread])) for q in QUANTITIES}
            for spread in map(_spread, self.epochs)
        ]

    def judged(self):
        """`(quantity, Difference, allowed, kept)` for each quantity, at the end."""
        difference, allowed = self.differences()[-1], self.allowed()[-1]
        return [
            (q, difference[q], allowed[q], difference[q].value <= allowed[q])
            for q in QUANTITIES
        ]

    def equivalent(self):
        kept = all(kept for *_, kept in self.judged())
        return kept and all(self.reloaded_identical.values())


def _spread(snapshots):
    """The differences between any two trainings of the reference."""
    reference, _, *reordered = snapshots
    pairs = itertools.combinations([reference, *reordered], 2)
    return [differences(a, b) for a, b in pairs]


def side_by_side(title, dtype, make_reference, make_ours, data, arguments, watch):
    """Train both on the same batches in the same order.

    Args:
        title: what the tables call the model.
        dtype: of everything; the caller is within `precision(dtype)`.
        make_reference, make_ours: functions that return a side: a `KerasSide`, or
            something else with its methods and its name.
        data: a `Data`.
        arguments: with `epochs`, `batch_size` and `seed`. The rows left over when all
            batches are full sit the epoch out.
        watch: a `Report`, or something else to tell what happens.

    Returns:
        `(run, reference, ours)`: a `Run`, and the two sides as they are then.
    """
    sides = [make_reference(), make_ours()]
    if dtype == "float32":
        sides += [make_reference() for _ in range(REORDERED)]
    x_train, x_val = (x.astype(dtype, copy=False) for x in (data.x_train, data.x_val))
    batch_size, epochs = arguments.batch_size, arguments.epochs
    batches = len(x_train) // batch_size
    run = Run(title, dtype, sides[0].name)
    shuffle, reorder = np.random.default_rng(arguments.seed).spawn(2)
    watch.start(run, epochs * len(sides) * batches)
    for epoch in range(1, epochs + 1):
        order = shuffle.permutation(len(x_train))[: batches * batch_size]
        order = order.reshape(batches, batch_size)
        run.epochs.append([])
        for index, side in enumerate(sides):
            again = index > 1
            watch.side(epoch, side.name + ", rows reordered" * again)
            rows = (reorder.permuted(order, axis=1) if again else order).ravel()
            start = time.perf_counter()
            loss, accuracy = side.train(
                x_train[rows], data.y_train[rows], batch_size, watch.step
            )
            seconds = time.perf_counter() - start
            run.epochs[-1].append(
                snapshot(side, x_val, data.y_val, loss, accuracy, seconds)
            )
        watch.epoch()
    watch.finish()
    return run, *sides[:2]


def snapshot(side, x_val, y_val, loss, accuracy, seconds):
    """A side as it is now; the last three figures are those of its last epoch."""
    outputs = side.outputs(x_val)
    found = {"validation images": outputs}, side.weights(), side.moving_statistics()
    arrays = {
        quantity: {name: array.astype("float64") for name, array in named.items()}
        for quantity, named in zip(QUANTITIES, found, strict=True)
    }
    val_accuracy = float(np.mean(outputs.argmax(axis=1) == y_val))
    return Snapshot(loss, accuracy, val_accuracy, seconds, arrays)
