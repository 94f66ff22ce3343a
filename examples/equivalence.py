"""Two trainings compared: a reference, and the same with our layer.

They start from the same weights and train on the same batches. How far apart may they
end?

float64: outputs, weights and moving statistics must agree to 1e-9.

float32: rounding alone drives two right implementations apart, a little at every step
and sometimes by a leap, when it takes a ReLU across its kink. So the reference is
also trained with the rows of every batch in other orders. That is the same training in
exact arithmetic, so the distance between such trainings is what rounding does here.
Ours may be twice as far from the reference, no more.
"""

import contextlib
import dataclasses
import itertools
import time
import typing

import keras
import numpy as np

OURS = "keras_bn"
QUANTITIES = ("outputs", "weights", "moving statistics")
FLOAT64_TOLERANCE = 1e-9
REORDERED = 4  # trainings of the reference with the rows of each batch in other orders


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


class KerasSide:
    """A compiled Keras model as one side; each example adds how it trains:

    `train(x, y, batch_size, tick)` goes through the rows once, in their order, calls
    `tick()` after each batch, and returns the mean loss and accuracy.
    """

    def __init__(self, name, model):
        self.name, self.model = name, model

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

    @classmethod
    def of(cls, side, data, loss, accuracy, seconds):
        """A side as it is now; the last three figures are those of its last epoch."""
        outputs = side.outputs(data.x_val.astype(keras.config.floatx(), copy=False))
        found = {"validation images": outputs}, side.weights(), side.moving_statistics()
        arrays = {
            quantity: {name: array.astype("float64") for name, array in named.items()}
            for quantity, named in zip(QUANTITIES, found, strict=True)
        }
        right = float(np.mean(outputs.argmax(axis=1) == data.y_val))
        return cls(loss, accuracy, right, seconds, arrays)

    def numbers(self):
        return {name: x for name, x in vars(self).items() if name != "arrays"}


class Difference(typing.NamedTuple):
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
        limits = []
        for reference, _, *reordered in self.epochs:
            pairs = itertools.combinations([reference, *reordered], 2)
            spread = [differences(a, b) for a, b in pairs]
            limits.append(
                {q: 2 * float(np.max([d[q].value for d in spread])) for q in QUANTITIES}
            )
        return limits

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


def side_by_side(title, dtype, make_reference, make_ours, data, given, watch):
    """Train both on the same batches in the same order.

    Args:
        title: what the tables call the model.
        dtype: of everything; the caller is within `precision(dtype)`.
        make_reference, make_ours: functions that return a side: a `KerasSide`, or
            something else with its methods and its name.
        data: with `x_train`, `y_train`, `x_val` and `y_val`.
        given: with `epochs`, `batch_size` and `seed`. The rows left over when all
            batches are full are left out of the epoch.
        watch: a `report.Report`, or something else to tell what happens.

    Returns:
        `(run, reference, ours)`: a `Run`, and the two sides as they are then.
    """
    sides = [make_reference(), make_ours()]
    if dtype == "float32":
        sides += [make_reference() for _ in range(REORDERED)]
    x_train = data.x_train.astype(dtype, copy=False)
    batches = len(x_train) // given.batch_size
    run = Run(title, dtype, sides[0].name)
    shuffle, reorder = np.random.default_rng(given.seed).spawn(2)
    watch.start(run, given.epochs * len(sides) * batches)
    for epoch in range(1, given.epochs + 1):
        order = shuffle.permutation(len(x_train))[: batches * given.batch_size]
        order = order.reshape(batches, given.batch_size)
        run.epochs.append([])
        for index, side in enumerate(sides):
            again = index > 1
            watch.side(epoch, side.name + ", rows reordered" * again)
            rows = (reorder.permuted(order, axis=1) if again else order).ravel()
            x, y = x_train[rows], data.y_train[rows]
            start = time.perf_counter()
            loss, accuracy = side.train(x, y, given.batch_size, watch.step)
            seconds = time.perf_counter() - start
            run.epochs[-1].append(Snapshot.of(side, data, loss, accuracy, seconds))
        watch.epoch()
    watch.finish()
    return run, *sides[:2]
