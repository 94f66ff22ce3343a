"""FreezeAfter: at which step of training the statistics begin to hold still."""

import keras
import numpy as np
import pytest
from support import backend
from support.marks import mostly_slow

import keras_bn


@backend.only("tensorflow", "elsewhere the optimizer's steps show after `fit` alone")
@pytest.mark.parametrize(
    ("steps", "together", "batches"),
    [(0, 1, 3), (5, 1, 3), (5, 3, 3), (6, 3, 3), (5, 3, 4), (7, 3, 4), (8, 3, 4)],
)
def test_freeze_after(steps, together, batches):
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    model.compile("sgd", "mse", steps_per_execution=together)
    x = np.ones((8 * batches, 2))
    callback = keras_bn.FreezeAfter(steps)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append((model.optimizer.iterations.numpy(), layer.freeze_statistics))

    layer = model.layers[0]
    for _ in range(2):
        callbacks = [callback, Watch()]
        model.fit(x, x, batch_size=8, epochs=2, verbose=0, callbacks=callbacks)
    assert seen[-1] == (4 * batches, True)
    assert all(frozen is bool(done >= steps) for done, frozen in seen)


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_freeze_after_in_a_loop_of_ones_own_and_without_a_length():
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    model.compile("sgd", "mse")
    x = np.ones((8, 2))
    by_hand = keras.callbacks.CallbackList([keras_bn.FreezeAfter(2)], model=model)
    for done in range(1, 4):
        model.train_on_batch(x, x)
        by_hand.on_train_batch_end(done)
        assert model.layers[0].freeze_statistics is (done >= 2)
    keras_bn.unfreeze(model)
    endless = ((x, x) for _ in range(5))
    model.fit(endless, verbose=0, callbacks=[keras_bn.FreezeAfter(6)])
    assert not model.layers[0].freeze_statistics
    endless = ((x, x) for _ in range(5))
    model.fit(endless, verbose=0, callbacks=[keras_bn.FreezeAfter(5)])
    assert model.layers[0].freeze_statistics


@pytest.mark.parametrize(
    ("layer", "advice"),
    [
        (keras.layers.BatchNormalization, r"Convert it by `keras_bn\.from_keras"),
        (keras.layers.ReLU, r"to freeze\.$"),
    ],
)
def test_what_could_not_be_frozen_later_is_refused_before_training(layer, advice):
    model = keras.Sequential([keras.Input((2,)), layer(), keras.layers.Dense(2)])
    model.compile("sgd", "mse")
    x, before = np.ones((32, 2)), model.get_weights()
    with pytest.raises(ValueError, match=advice):
        model.fit(x, x, batch_size=8, verbose=0, callbacks=[keras_bn.FreezeAfter(3)])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_freeze_after_takes_a_number_of_steps():
    for steps in -1, 1.5, True, "end":
        with pytest.raises(ValueError, match="`steps` must be a whole number"):
            keras_bn.FreezeAfter(steps)
    for steps in 3, 3.0, np.int64(3), np.float64(3.0), np.array(3):
        assert keras_bn.FreezeAfter(steps).steps == 3


class Crash(keras.callbacks.Callback):
    """Ends a training as a machine that fails does, after so many epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epochs:
            raise InterruptedError


@pytest.mark.parametrize("first", mostly_slow([True, False], [True]))
@pytest.mark.parametrize("per_update", [None, 2])
@pytest.mark.parametrize("steps", mostly_slow([3, 8, 10, 99], [8, 99]))
def test_steps_that_a_backup_restores_count(tmp_path, first, per_update, steps):
    """4 steps an epoch; the process ends after 2 epochs, and a new one goes on."""
    x = np.ones((32, 2))
    frozen = {}

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            frozen.setdefault(self.epoch, []).append(layer.freeze_statistics)

        def on_epoch_begin(self, epoch, logs=None):
            self.epoch = epoch

    for crash in 2, None:
        model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
        optimizer = keras.optimizers.SGD(gradient_accumulation_steps=per_update)
        model.compile(optimizer, "mse")
        layer = model.layers[0]
        callbacks = [keras_bn.FreezeAfter(steps)]
        callbacks.insert(
            0 if first else 1, keras.callbacks.BackupAndRestore(tmp_path / "backup")
        )
        callbacks += [Watch(), Crash(crash)]
        how = {"batch_size": 8, "epochs": 4, "verbose": 0, "callbacks": callbacks}
        if crash is None:
            model.fit(x, x, **how)
        else:
            with pytest.raises(InterruptedError):
                model.fit(x, x, **how)
    assert sorted(frozen) == [0, 1, 2, 3]
    done = {epoch: range(4 * epoch, 4 * epoch + 4) for epoch in frozen}
    assert {e: [n >= steps for n in done[e]] for e in done} == frozen


def test_steps_of_an_earlier_training_do_not_count():
    model = keras.Sequential([keras.Input((2,)), keras_bn.BatchNormalization()])
    model.compile("sgd", "mse")
    x = np.ones((32, 2))
    model.fit(x, x, batch_size=8, verbose=0)
    callback = keras_bn.FreezeAfter(np.int64(5))
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[callback])
    assert not model.layers[0].freeze_statistics
    model.fit(x, x, batch_size=8, verbose=0, callbacks=[callback])
    assert model.layers[0].freeze_statistics
