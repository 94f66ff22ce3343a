"""Weights go from Keras's layer to this one and back."""

import inspect

import keras
import ml_dtypes
import numpy as np
import pytest
from support.backend import KERAS_IS_A_JUDGE
from support.forms import (
    FORMS,
    assert_same_bits,
    conv_model,
    examples,
    model_of,
    randomize,
)
from support.marks import slow

import keras_bn

BEYOND_KERAS = {
    "two axes",
    "renorm ramp",
    "ghost batches",
    "plain mean",
    "frozen statistics",
    "frozen gamma",
}
if "renorm" not in inspect.signature(keras.layers.BatchNormalization).parameters:
    BEYOND_KERAS.add("renorm")
if not KERAS_IS_A_JUDGE:
    BEYOND_KERAS.add("synchronized")
SHARED = [form for form in FORMS if form not in BEYOND_KERAS]
WAYS = {
    "to keras_bn": (keras.layers.BatchNormalization, keras_bn.BatchNormalization),
    "to Keras": (keras_bn.BatchNormalization, keras.layers.BatchNormalization),
}


def by_set_weights(source, target, path):
    target.set_weights(source.get_weights())


def by_file(source, target, path):
    source.save_weights(path / "of_the_source.weights.h5")
    target.load_weights(path / "of_the_source.weights.h5")


@pytest.mark.parametrize("transfer", [slow(by_set_weights), by_file])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", SHARED)
def test_weights_load(form, way, transfer, tmp_path):
    source, target = (model_of(form, layer) for layer in WAYS[way])
    randomize(source.layers[0], seed=1)
    transfer(source, target, tmp_path)
    for got, want in zip(target.weights, source.weights, strict=True):
        assert got.name == want.name
        assert_same_bits(got.numpy(), want.numpy().astype(got.dtype))

    x = examples(source.input_shape[1:])
    got, want = (
        keras.ops.convert_to_numpy(model(x, training=False))
        for model in (target, source)
    )
    assert got.dtype == want.dtype
    # The two layers round at different places: 4 units of the largest value at most.
    single = got.dtype == "float64" and not KERAS_IS_A_JUDGE
    unit = float(ml_dtypes.finfo("float32" if single else got.dtype).eps)
    got, want = got.astype("float64"), want.astype("float64")
    assert np.max(np.abs(got - want)) <= 4 * unit * np.max(np.abs(want))


@pytest.mark.parametrize("way", WAYS)
def test_weights_of_a_whole_trained_model_load(way, tmp_path):
    source, target = (
        conv_model(seed=seed, batch_normalization=layer)
        for seed, layer in enumerate(WAYS[way])
    )
    source.compile("adam", "mse")
    source.train_on_batch(examples((8, 8, 3)), examples((5,)))
    by_file(source, target, tmp_path)
    for got, want in zip(target.weights, source.weights, strict=True):
        assert_same_bits(got.numpy(), want.numpy())


@pytest.mark.parametrize("transfer", [slow(by_set_weights), by_file])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float32_weights_round_to_the_nearest_in_keras_half(dtype, transfer, tmp_path):
    ours = model_of(dtype)
    theirs = model_of(dtype, keras.layers.BatchNormalization)
    rng = np.random.default_rng(0)
    ours.set_weights([rng.normal(size=w.shape) for w in ours.weights])
    transfer(ours, theirs, tmp_path)
    for mine, its in zip(ours.weights, theirs.weights, strict=True):
        assert mine.dtype == "float32"
        assert its.dtype == dtype
        assert_same_bits(its.numpy(), mine.numpy().astype(its.numpy().dtype))
