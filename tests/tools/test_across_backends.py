"""A model trained on PyTorch is loaded, converted, folded and served on TensorFlow."""

import numpy as np
import pytest
from conftest import require
from support import backend
from support.alone import run_alone

import keras_bn
from keras_bn.surgery.graph import walk

pytestmark = pytest.mark.slow
tf = backend.tensorflow("it serves what another process trained")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The file that a process with Keras's PyTorch backend left, and its arrays."""
    require("torch")
    folder = tmp_path_factory.mktemp("trained")
    # Keras would import TensorFlow there too, and a CUDA build of PyTorch not bear it.
    run_alone("pytorch_side.py", folder, without="tensorflow", KERAS_BACKEND="torch")
    return folder / "model.keras", dict(np.load(folder / "arrays.npz"))


def normalizations(model, kind):
    return [path for path, layer in walk(model) if isinstance(layer, kind)]


def assert_same_outputs(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_it_was_trained(trained):
    _, arrays = trained
    assert arrays["loss"][-1] < 0.8 * arrays["loss"][0]
    assert np.ptp(arrays["y"], axis=0).min() > 0.03


def test_it_is_loaded_with_its_weights_and_trains_on(trained):
    path, arrays = trained
    model = keras_bn.load_model(path)
    assert len(normalizations(model, keras_bn.BatchNormalization)) == 3
    weights = np.concatenate([w.ravel() for w in model.get_weights()])
    np.testing.assert_array_equal(weights, arrays["weights"])
    assert_same_outputs(model.predict(arrays["x"], verbose=0), arrays["y"])
    steps = 6 * len(arrays["loss"])
    assert int(model.optimizer.iterations) == steps
    again = model.fit(arrays["x"], arrays["labels"], batch_size=16, verbose=0)
    assert again.history["loss"][0] < 1.05 * arrays["loss"][-1]
    assert int(model.optimizer.iterations) == steps + 6


@pytest.mark.parametrize(
    "tool",
    [keras_bn.to_keras, keras_bn.fold, lambda m: keras_bn.fold(keras_bn.to_keras(m))],
    ids=["to_keras", "fold", "to_keras, fold"],
)
def test_it_is_converted_folded_and_served(tool, trained, tmp_path):
    path, arrays = trained
    model = tool(keras_bn.load_model(path))
    assert not normalizations(model, keras_bn.BatchNormalization)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "served"))
    assert_same_outputs(served.serve(arrays["x"]), arrays["y"])
