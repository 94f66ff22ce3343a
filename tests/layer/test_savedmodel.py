"""SavedModels: reloaded here, and where the package can't be imported."""

import numpy as np
import pytest
from support import backend
from support.alone import run_alone
from support.forms import FORMS, conv_model, examples, model_of

tf = backend.tensorflow("SavedModels are its own")

from support.reloaded import (  # noqa: E402
    LOADERS,
    compare_exported,
    compare_trainer,
    gradients,
    second_gradient,
)

BATCHES = (1, 13)  # neither seen before the export
EXPORTED = (
    "2-D",
    "channels first",
    "large",
    "two axes",
    "no scale",
    "no center",
    "float64",
    "float16",
    "mixed_float16",
)


def save_arrays(folder, **arrays):
    """Arrays beside a SavedModel, as float64, which holds every dtype exactly."""
    arrays = {name: tf.cast(a, tf.float64).numpy() for name, a in arrays.items()}
    np.savez(folder / "arrays.npz", **arrays)


def trained_conv_model():
    model = conv_model()
    model.compile("adam", "mse")
    model.fit(examples((8, 8, 3), 24), examples((5,), 24), batch_size=8, verbose=0)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder for every exported model, with inputs and outputs."""
    folder = tmp_path_factory.mktemp("exported")
    models = {form: model_of(form) for form in EXPORTED}
    for name, model in {**models, "conv": trained_conv_model()}.items():
        model.export(folder / name, verbose=False)
        inputs = {n: examples(model.input_shape[1:], batch=n) for n in BATCHES}
        arrays = {f"x{n}": x for n, x in inputs.items()}
        outputs = {f"y{n}": model(x, training=False) for n, x in inputs.items()}
        save_arrays(folder / name, **arrays, **outputs)
    return folder


@pytest.mark.parametrize("name", [*EXPORTED, "conv"])
def test_exported_model_gives_the_same(name, exported):
    assert len(list(compare_exported(exported / name))) == 2 * len(BATCHES)


class Trainer(tf.Module):
    """A layer with what a SavedModel needs to train it and to apply it."""

    def __init__(self, layer, shape):
        super().__init__()
        self.layer = layer
        # Keras's variables: a tf.Variable of one would be saved as a second variable.
        self.parameters = layer.trainable_weights
        self.statistics = layer.non_trainable_weights
        batch = tf.TensorSpec((None, *shape), tf.float32)

        def function(python_function, *specs):
            return tf.function(python_function, specs, autograph=False)

        self.apply = function(lambda x: layer(x, training=False), batch)
        self.forward = function(lambda x: layer(x, training=True), batch)
        self.train = function(self._train, batch, batch)

    def _train(self, x, upstream):
        """One step of gradient descent, the gradient taken in here."""
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = self.layer(x, training=True)
        upstream = tf.cast(upstream, y.dtype)
        parameters = [p.value for p in self.parameters]
        dx, *gradients = tape.gradient(y, [x, *parameters], upstream)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.assign_sub(0.1 * gradient)
        return {"y": y, "dx": dx}


TRAINED = ("2-D", "large", "channels first", "mixed_float16", "renorm ramp")
DIFFERENTIATED_TWICE = ("2-D", "large")
FUSED = "large"


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """A folder for every saved trainer, with what it does in its next steps."""
    folder = tmp_path_factory.mktemp("trainers")
    for form in TRAINED:
        (layer,) = model_of(form).layers
        shape = FORMS[form][1]
        trainer = Trainer(layer, shape)
        signatures = {"train": trainer.train, "apply": trainer.apply}
        tf.saved_model.save(trainer, folder / form, signatures)

        x, upstream = (tf.constant(examples(shape, 7, seed)) for seed in (1, 2))
        before = [s.numpy() for s in trainer.statistics]
        parameters = [p.value for p in trainer.parameters]
        arrays = {"x": x, "upstream": upstream, "applied": trainer.apply(x)}
        outside = gradients(trainer.forward, parameters, x, upstream)
        arrays |= {f"gradient{i}": g for i, g in enumerate(outside)}
        arrays |= trainer.train(x, upstream)
        variables = [*trainer.parameters, *trainer.statistics]
        arrays |= {f"variable{i}": v.numpy() for i, v in enumerate(variables)}
        if form in DIFFERENTIATED_TWICE:
            second = second_gradient(trainer.forward, x, upstream)
            arrays |= {} if form == FUSED else {"second": second}
        for old, new in zip(before, trainer.statistics, strict=True):
            assert (new.numpy() != old).all()
        save_arrays(folder / form, **arrays)
    return folder


def test_saved_training_signature_takes_the_same_step(trainers):
    assert {"dx", "gradient1", "second"} <= set(compare_trainer(trainers / "2-D"))


def test_second_gradient_from_outside_is_refused_aloud(trainers):
    """TensorFlow saves a custom gradient, but not the custom gradient of that."""
    trainer = tf.saved_model.load(str(trainers / FUSED))
    x = tf.constant(examples(FORMS[FUSED][1]))
    with pytest.raises((LookupError, TypeError), match=r"No gradient|out of scope"):
        second_gradient(trainer.forward, x, x)


@pytest.mark.slow
def test_the_package_is_not_needed_to_serve_or_to_train(exported, trainers):
    served = ("2-D", "large", "two axes", "mixed_float16", "conv")
    paths = [exported / name for name in served] + [trainers / f for f in TRAINED]
    compared = run_alone("reloaded.py", *paths, without="keras_bn")
    for line in (f"{how} x{n}" for how in LOADERS for n in BATCHES):
        assert compared.count(line) == len(served)
    for line in ("applied", "gradient0", "gradient1", "y", "dx", "variable1"):
        assert compared.count(line) == len(TRAINED)
