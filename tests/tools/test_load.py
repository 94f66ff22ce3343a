"""load_model: files of Keras 3 and Keras 2, straight into our layers."""

import json
import re
import zipfile

import h5py
import keras
import numpy as np
import pytest
from conftest import require
from keras import layers
from support.backend import array, but_on
from support.marks import mostly_slow
from support.zoo import convolutional, inputs_of, randomized, sequential, wrapped

import keras_bn
from keras_bn.loading.configs import modern
from keras_bn.surgery.graph import walk
from keras_bn.surgery.norms import is_keras, is_ours


def kinds(model):
    found = [layer for _, layer in walk(model)]
    return sum(map(is_keras, found)), sum(map(is_ours, found))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize(
    "make",
    [
        convolutional,
        sequential,
        pytest.param(
            wrapped,
            marks=but_on("jax", "Keras cannot train a recurrent cell with state there"),
        ),
    ],
)
def test_files_of_keras_3(make, suffix, tmp_path):
    model = randomized(make())
    model.compile("adam", "mse")
    model.run_eagerly = True  # one step is no reason to trace; the file says nothing
    x = inputs_of(model)
    model.train_on_batch(x, model(x))
    model.save(tmp_path / f"model{suffix}")
    written = (tmp_path / f"model{suffix}").read_bytes()
    loaded = keras_bn.load_model(tmp_path / f"model{suffix}")
    assert (tmp_path / f"model{suffix}").read_bytes() == written
    theirs, ours = kinds(loaded)
    assert theirs == 0
    assert ours == kinds(model)[0] > 0
    np.testing.assert_allclose(array(loaded(x)), array(model(x)), rtol=1e-5, atol=1e-5)
    assert int(loaded.optimizer.iterations.numpy()) == 1
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def keras_2_model(k):
    k.utils.set_random_seed(0)
    x = k.Input((4,))
    inner = k.Model(x, k.layers.BatchNormalization(scale=False)(k.layers.Dense(4)(x)))
    image = k.Input((6, 6, 3))
    x = k.layers.Conv2D(4, 3)(image)
    x = k.layers.BatchNormalization(momentum=0.5, name="bn")(x)
    x = k.layers.ReLU()(x)
    return k.Model(image, inner(k.layers.GlobalAveragePooling2D()(x)))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_of_keras_2(suffix, tmp_path):
    tf_keras = require("tf_keras")
    model = keras_2_model(tf_keras)
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("float32")
    model.compile("adam", "mse")
    model.fit(x, np.ones((8, 4)), epochs=3, verbose=0)
    path = tmp_path / f"model{suffix}"
    model.save(path)
    loaded = keras_bn.load_model(path)
    assert kinds(loaded) == (0, 2)
    assert loaded.get_layer("bn").axis == 3
    assert loaded.get_layer("bn").momentum == 0.5
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(loaded.predict(x, verbose=0), expected, atol=1e-6)
    assert np.std(expected) > 1e-2
    before = loaded.get_layer("bn").moving_mean.numpy()
    loaded.fit(x, np.ones((8, 4)), verbose=0)
    assert not np.allclose(loaded.get_layer("bn").moving_mean.numpy(), before)


def of_time(k):
    """Normalizations and recurrent layers in wrappers, and a model in one."""
    frame = k.Sequential(
        [k.layers.Conv2D(3, 2, input_shape=(4, 4, 2)), k.layers.BatchNormalization()]
    )
    x = images = k.Input((5, 4, 4, 2))
    x = k.layers.TimeDistributed(frame)(x)
    x = k.layers.TimeDistributed(k.layers.Flatten())(x)
    x = k.layers.TimeDistributed(k.layers.BatchNormalization())(x)
    x = k.layers.Bidirectional(k.layers.LSTM(3, return_sequences=True))(x)
    x = k.layers.RNN(k.layers.GRUCell(3), return_sequences=True)(x)
    return k.Model(images, k.layers.BatchNormalization()(x))


def of_convolutions(k):
    """Layers whose configs had more arguments in Keras 2."""
    x = images = k.Input((8, 8, 3))
    for layer in (
        k.layers.DepthwiseConv2D(3),
        k.layers.SeparableConv2D(4, 3),
        k.layers.Conv2DTranspose(4, 3),
        k.layers.LeakyReLU(0.2),
    ):
        x = k.layers.BatchNormalization()(layer(x))
    return k.Model(images, k.layers.GlobalMaxPooling2D()(x))


def with_input_shape(k):
    return k.Sequential(
        [
            k.layers.Conv2D(3, 2, input_shape=(5, 5, 2)),
            k.layers.BatchNormalization(axis=-1, name="bn"),
            k.layers.GlobalAveragePooling2D(),
        ]
    )


def with_input_dim(k):
    return k.Sequential([k.layers.Dense(3, input_dim=4), k.layers.BatchNormalization()])


def with_batch_input_shape(k):
    return k.Sequential(
        [k.layers.BatchNormalization(batch_input_shape=(None, 4)), k.layers.Dense(3)]
    )


def with_input_length(k):
    return k.Sequential(
        [
            k.layers.Embedding(5, 4, input_length=6),
            k.layers.BatchNormalization(),
            k.layers.GRU(3),
        ]
    )


def in_a_sequential(k):
    inner = with_input_shape(k)
    return k.Sequential([inner, k.layers.BatchNormalization(), k.layers.Dense(2)])


def with_input_layer(k):
    return k.Sequential(
        [k.layers.InputLayer(input_shape=(4,)), k.layers.BatchNormalization()]
    )


def of_half_precision(k):
    return k.Sequential(
        [
            k.layers.Dense(3, input_shape=(4,), dtype="mixed_float16"),
            k.layers.BatchNormalization(dtype="mixed_float16"),
        ]
    )


def synchronized(k):
    with_input = k.layers.Dense(3, input_shape=(4,))
    norm = k.layers.experimental.SyncBatchNormalization(name="sync")
    return k.Sequential([with_input, norm])


def with_initializers(k):
    return k.Sequential(
        [
            k.layers.Dense(3, input_shape=(4,), kernel_initializer="he_normal"),
            k.layers.BatchNormalization(
                gamma_initializer=k.initializers.RandomUniform(0.5, 1.5),
                beta_regularizer=k.regularizers.L2(0.1),
                gamma_constraint=k.constraints.NonNeg(),
            ),
        ]
    )


def of_attention(k):
    """Tensors given by keyword; shapes in the config of the layer."""
    x = k.Input((5, 6))
    y = k.layers.MultiHeadAttention(2, 4)(x, x)
    y = k.layers.MultiHeadAttention(3, 2, attention_axes=(1,), output_shape=6)(
        query=y, value=x, key=x
    )
    y = k.layers.Attention()([k.layers.BatchNormalization()(y), x])
    return k.Model(x, k.layers.BatchNormalization()(y))


def of_attention_in_a_sequential(k):
    inner = k.Input((5, 6))
    y = k.layers.MultiHeadAttention(2, 4, value_dim=3, use_bias=False)(inner, inner)
    inner = k.Model(inner, k.layers.Dense(6)(y))
    return k.Sequential([k.Input((5, 6)), inner, k.layers.BatchNormalization()])


def with_initial_states(k):
    x = k.Input((5, 6))
    y, *state = k.layers.LSTM(4, return_sequences=True, return_state=True)(x)
    y, state = k.layers.GRU(4, return_sequences=True, return_state=True)(
        y, initial_state=state[0]
    )
    y = k.layers.Bidirectional(k.layers.SimpleRNN(4))(y, initial_state=[state, state])
    return k.Model(x, k.layers.BatchNormalization()(y))


def with_a_mask_by_keyword(k):
    x = k.Input((5, 6))
    mask = k.layers.Rescaling(1e6)(k.layers.Dense(5)(k.layers.Flatten()(x)))
    mask = k.layers.Activation("sigmoid")(mask)
    y = k.layers.GlobalAveragePooling1D()(x, mask=mask)
    return k.Model(x, k.layers.BatchNormalization()(y))


OF_KERAS_2 = [
    of_attention,
    of_attention_in_a_sequential,
    with_initial_states,
    with_a_mask_by_keyword,
    of_time,
    of_convolutions,
    with_input_shape,
    with_input_dim,
    with_batch_input_shape,
    with_input_length,
    in_a_sequential,
    with_input_layer,
    of_half_precision,
    synchronized,
    with_initializers,
]


def input_for(model):
    rng = np.random.default_rng(1)
    shape = (4, *(size or 5 for size in model.input_shape[1:]))
    if type(model.layers[0]).__name__ == "Embedding":
        return rng.integers(0, 5, (4, 6)).astype("float32")
    return rng.normal(0.3, 2.0, shape).astype("float32")


def randomized_2(model):
    """A model of Keras 2, with weights and statistics as if it had been trained."""
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if "variance" in variable.name or "gamma" in variable.name:
            variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        elif not variable.dtype.is_integer:
            variable.assign(rng.normal(0.0, 0.5, variable.shape))
    return model


def saved(make, path):
    """A model of Keras 2 in a file, its input and its output."""
    model = randomized_2(make(require("tf_keras")))
    model.save(path)
    x = input_for(model)
    return model, x, predicted(model, x)


def predicted(model, x):
    """The outputs of a model of Keras 2 or 3, without tracing it for one batch."""
    model.run_eagerly = True
    return model.predict(x, verbose=0)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", OF_KERAS_2)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whatever_keras_2_writes(make, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    model, x, expected = saved(make, path)
    loaded = keras_bn.load_model(path)
    wanted = sum("Normalization" in type(m).__name__ for m in model.submodules)
    assert kinds(loaded) == (0, wanted)
    got = predicted(loaded, x)
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-5)
    assert np.std(expected) > 1e-2
    assert loaded.input_shape == model.input_shape


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_synchronized_normalization_stays_so(suffix, tmp_path):
    saved(synchronized, tmp_path / f"model{suffix}")
    loaded = keras_bn.load_model(tmp_path / f"model{suffix}")
    assert loaded.get_layer("sync").synchronized


COMPILATIONS = {
    "legacy Adam": lambda k: {"optimizer": k.optimizers.legacy.Adam(0.02)},
    "legacy SGD": lambda k: {"optimizer": k.optimizers.legacy.SGD(0.02, 0.9)},
    "Adam": lambda k: {"optimizer": k.optimizers.Adam(0.02)},
    "RMSprop": lambda k: {
        "optimizer": k.optimizers.RMSprop(0.02, momentum=0.5),
        "loss": k.losses.BinaryCrossentropy(label_smoothing=0.1),
        "metrics": [k.metrics.AUC(), "mae"],
    },
    "accuracy": lambda k: {
        "optimizer": k.optimizers.Adam(0.02),
        "loss": "categorical_crossentropy",
        "metrics": ["accuracy"],
    },
    "weighted": lambda k: {
        "optimizer": k.optimizers.Adam(0.02),
        "loss": "mae",
        "loss_weights": [2.0],
        "weighted_metrics": ["mse", k.metrics.MeanAbsoluteError()],
    },
    "schedule": lambda k: {
        "optimizer": k.optimizers.SGD(
            k.optimizers.schedules.ExponentialDecay(0.02, 10**9, 0.9)
        ),
    },
    "half precision": lambda k: {
        "optimizer": k.mixed_precision.LossScaleOptimizer(k.optimizers.Adam(0.02)),
    },
}


@pytest.mark.parametrize("suffix", mostly_slow([".keras", ".h5"], [".h5"]))
@pytest.mark.parametrize("compilation", COMPILATIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_keras_2_has_compiled(compilation, suffix, tmp_path):
    tf_keras = require("tf_keras")
    tf_keras.utils.set_random_seed(0)
    model = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(3, input_shape=(4,)),
            tf_keras.layers.BatchNormalization(),
            tf_keras.layers.Dense(2, activation="softmax"),
        ]
    )
    model.compile(**{"loss": "mse", **COMPILATIONS[compilation](tf_keras)})
    model.run_eagerly = True  # one batch is no reason to trace; the file says nothing
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    y = np.eye(2)[np.arange(16) % 2]
    model.fit(x, y, verbose=0)
    model.save(tmp_path / f"model{suffix}")
    loaded = keras_bn.load_model(tmp_path / f"model{suffix}")
    optimizer = getattr(loaded.optimizer, "inner_optimizer", loaded.optimizer)
    assert np.isclose(optimizer.learning_rate, 0.02)
    assert not loaded.run_eagerly
    loaded.run_eagerly = True
    theirs, ours = (m.evaluate(x, y, verbose=0) for m in (model, loaded))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    before = loaded.layers[0].kernel.numpy()
    loaded.fit(x, y, verbose=0)
    assert not np.allclose(loaded.layers[0].kernel, before)


# As Keras 2.0 to 2.2 wrote them: name, arguments, and what Keras 3 calls them.
OLD_OPTIMIZERS = [
    ("SGD", {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"rho": 0.8, "epsilon": 1e-6}, {"rho": 0.8, "epsilon": 1e-6}),
    ("Adagrad", {"epsilon": 1e-6}, {"epsilon": 1e-6}),
    ("Adadelta", {"rho": 0.9, "epsilon": 1e-6}, {"rho": 0.9}),
    ("Adam", {"beta_1": 0.8, "beta_2": 0.99, "amsgrad": True}, {"beta_1": 0.8}),
    ("Adamax", {"beta_1": 0.8, "beta_2": 0.99}, {"beta_2": 0.99}),
    ("Nadam", {"beta_1": 0.8, "schedule_decay": 0.004}, {"beta_1": 0.8}),
]


@pytest.mark.parametrize("decay", [None, 0.0, 0.5])
@pytest.mark.parametrize("old", OLD_OPTIMIZERS, ids=lambda old: old[0])
@pytest.mark.filterwarnings("ignore:.*HDF5", "error:.*compile the model")
def test_optimizers_as_keras_2_0_wrote_them(old, decay, tmp_path):
    kind, given, expected = old
    path = tmp_path / "model.h5"
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    model.compile("sgd", "mse")
    model.save(path)
    given = {"lr": 0.25, **given} if decay is None else {"lr": 0.25, "decay": decay}
    training = {
        "optimizer_config": {"class_name": kind, "config": given},
        "loss": "mse",
        "metrics": ["acc"],
        "sample_weight_mode": None,
        "loss_weights": None,
    }
    with h5py.File(path, "r+") as file:
        file.attrs["training_config"] = json.dumps(training)
        file.attrs["keras_version"] = "2.1.6"
        del file["optimizer_weights"]
    loaded = keras_bn.load_model(path)
    optimizer = loaded.optimizer
    assert isinstance(optimizer, getattr(keras.optimizers, kind))
    if decay is None:
        assert expected.items() <= optimizer.get_config().items()
    # Keras 2: lr / (1 + decay * iterations).
    for iterations in 0, 4:
        optimizer.iterations.assign(iterations)
        rate = float(optimizer.learning_rate)
        np.testing.assert_allclose(rate, 0.25 / (1 + (decay or 0) * iterations))
    x = np.ones((4, 3), "float32")
    loaded.train_on_batch(x, x)


@pytest.mark.parametrize("length", [30, 400])
def test_an_optimizer_of_more_names_than_an_attribute_takes(length, tmp_path):
    """As of EfficientNetV2L with Adam: Keras writes such a list in parts."""
    stack = [layers.Dense(1, name=f"{i:0{length}}") for i in range(50)]
    model = keras.Sequential([keras.Input((1,)), *stack, layers.BatchNormalization()])
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    for i, variable in enumerate(model.optimizer.variables):
        if "float" in str(variable.dtype):
            variable.assign(variable + i)
    model.save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5") as file:
        in_parts = "weight_names0" in file["optimizer_weights"].attrs
    assert in_parts == (length > 100)
    loaded = keras_bn.load_model(tmp_path / "model.h5").optimizer
    for got, want in zip(loaded.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(got), keras.ops.convert_to_numpy(want)
        )


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_a_compilation_that_cannot_be_read(suffix, tmp_path):
    """Of Keras 2 it is left out with a warning; of Keras 3, it is Keras's to refuse."""

    def strange(y, prediction):
        return y - prediction

    for k in (require("tf_keras"), keras):
        path = tmp_path / f"model{suffix}"
        model = k.Sequential([k.Input((3,)), k.layers.BatchNormalization()])
        model.compile("sgd", strange)
        model.save(path)
        if k is keras:
            # What Keras says of it differs between versions and formats.
            match = f"^{re.escape(str(path))} can't be loaded: .*"
            with pytest.raises(ValueError, match=match) as caught:
                keras_bn.load_model(path)
            assert caught.value.__cause__ is not None
        else:
            with pytest.warns(UserWarning, match="compile the model yourself"):
                loaded = keras_bn.load_model(path)
            assert not loaded.compiled
            own = {"strange": strange}
            assert keras_bn.load_model(path, custom_objects=own).compiled


def rewritten(path, change):
    """Have `change` alter the config in a model file."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            config = change(json.loads(file.attrs["model_config"]))
            file.attrs["model_config"] = json.dumps(config)
        return
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    parts["config.json"] = json.dumps(change(json.loads(parts["config.json"])))
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def everywhere(change):
    """`change` for every dict of a config."""

    def changed(config):
        if isinstance(config, list):
            return [changed(part) for part in config]
        if not isinstance(config, dict):
            return config
        return change({key: changed(part) for key, part in config.items()})

    return changed


def as_of_tensorflow_1(name):
    """How TensorFlow 1 would have written a config of Keras 2."""

    def change(config):
        kind, inner = config.get("class_name"), config.get("config", {})
        if kind == "BatchNormalization":
            config["class_name"] = name
        if kind in ("Zeros", "Ones", "GlorotUniform", "Orthogonal"):
            config = {"class_name": kind, "config": {**inner, "dtype": "float32"}}
        if kind == "Sequential":
            layers = inner["layers"]
            if layers[0]["class_name"] == "InputLayer":
                del layers[0]
            inner.pop("build_input_shape", None)
        if kind in ("TimeDistributed", "Bidirectional", "RNN"):
            for key in ("layer", "cell"):
                if key in inner:
                    kept = ("class_name", "config")
                    inner[key] = {k: inner[key][k] for k in kept}
        return config

    return everywhere(change)


@pytest.mark.parametrize(
    "name",
    [
        "BatchNormalization",
        "BatchNormalizationV1",
        "BatchNormalizationV2",
        "SyncBatchNormalization",
    ],
)
@pytest.mark.parametrize(
    "make", [of_time, with_input_shape, with_input_dim, keras_2_model]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_files_of_tensorflow_1(make, name, tmp_path):
    path = tmp_path / "model.h5"
    _, x, expected = saved(make, path)
    rewritten(path, as_of_tensorflow_1(name))
    loaded = keras_bn.load_model(path)
    assert kinds(loaded)[0] == 0
    np.testing.assert_allclose(predicted(loaded, x), expected, atol=1e-5)


def test_a_config_without_names_of_models(tmp_path):
    """Until Keras 2.2, a Sequential model was the list of its layers."""
    path = tmp_path / "model.h5"
    with pytest.warns(UserWarning, match="HDF5"):
        _, x, expected = saved(with_input_dim, path)

    def change(config):
        if config.get("class_name") == "Sequential":
            return {**config, "config": config["config"]["layers"]}
        return config

    rewritten(path, everywhere(change))
    loaded = keras_bn.load_model(path)
    np.testing.assert_allclose(predicted(loaded, x), expected, atol=1e-6)


@pytest.mark.parametrize("package", ["tf_keras", "keras_core", "tensorflow.keras"])
@pytest.mark.parametrize("make", [of_time, with_input_shape, keras_2_model])
def test_files_of_other_packages(make, package, tmp_path):
    path = tmp_path / "model.keras"
    _, x, expected = saved(make, path)

    def change(config):
        module = str(config.get("module"))
        if module.split(".")[0] in ("keras", "tf_keras"):
            config["module"] = module.replace("tf_keras", "keras", 1).replace(
                "keras", package, 1
            )
        return config

    rewritten(path, everywhere(change))
    loaded = keras_bn.load_model(path)
    assert kinds(loaded)[0] == 0
    np.testing.assert_allclose(predicted(loaded, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        "keras.layers",
        "keras.layers.experimental",
        "keras.layers.normalization",
        "keras.src.layers.normalization.batch_normalization",
        "tf_keras.src.layers.normalization.batch_normalization_v1",
        "tensorflow.python.keras.layers.normalization_v2",
    ],
)
def test_every_place_the_layer_has_been(module):
    for name in ("BatchNormalization", "BatchNormalizationV1"):
        for registered in (None, name):
            config = {"module": module, "class_name": name, "config": {"axis": [1]}}
            layer = keras.saving.deserialize_keras_object(
                modern({**config, "registered_name": registered})
            )
            assert is_ours(layer)
            assert layer.axis == 1


def test_what_is_not_of_keras_is_left_alone():
    for config in (
        # An addition in a graph has the name of a layer.
        {"module": "keras.src.ops.numpy", "class_name": "Add", "config": {"name": "a"}},
        {
            "module": "mine",
            "class_name": "BatchNormalization",
            "config": {"axis": [1]},
            "registered_name": "mine>BatchNormalization",
        },
        {"module": "mine", "class_name": "BatchNormalization", "config": {}},
        {"class_name": "mine>BatchNormalization", "config": {"groups": 1}},
        {"class_name": "not", "and": [1, None, "x"]},
    ):
        assert modern(config) == config


class BatchNormalization(layers.BatchNormalization):
    """A class of the user's, of the same name as Keras's."""

    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_a_class_of_the_same_name_that_is_given_is_used(suffix, tmp_path):
    model = keras.Sequential([keras.Input((3,)), BatchNormalization(name="bn")])
    path = tmp_path / f"model{suffix}"
    model.save(path)
    own = {"BatchNormalization": BatchNormalization}
    loaded = keras_bn.load_model(path, custom_objects=own)
    assert type(loaded.get_layer("bn")) is BatchNormalization
    with keras.saving.custom_object_scope(own):
        loaded = keras_bn.load_model(path)
    assert type(loaded.get_layer("bn")) is BatchNormalization


@keras.saving.register_keras_serializable(package="keras_bn_tests")
class Registered(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, x):
        return self.norm(x)


def test_layers_that_a_class_makes_itself(tmp_path):
    model = Registered()
    model(np.ones((2, 3), "float32"))
    randomized(model).save(tmp_path / "model.keras")
    loaded = keras_bn.load_model(tmp_path / "model.keras")
    assert kinds(loaded) == (0, 1)
    np.testing.assert_array_equal(loaded.norm.moving_mean, model.norm.moving_mean)


def in_a_wrapper(function):
    return keras.Sequential(
        [keras.Input((2, 3)), layers.TimeDistributed(layers.Lambda(function))]
    )


def in_a_nested_model(function):
    inner = keras.Sequential([keras.Input((2, 3)), layers.Lambda(function)])
    return keras.Sequential([keras.Input((2, 3)), inner])


def in_a_graph(function):
    x = keras.Input((2, 3))
    return keras.Model(x, layers.Lambda(function)(x))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("make", [in_a_wrapper, in_a_nested_model, in_a_graph])
@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_safe_mode_is_on(make, suffix, tmp_path):
    """Up to Keras 3.11.2, Keras's own reader of .h5 files has none."""
    path = tmp_path / f"model{suffix}"
    make(lambda x: x + 1).save(path)
    with pytest.raises(ValueError, match=r"a Python lambda.*`safe_mode=False`"):
        keras_bn.load_model(path)
    if suffix == ".keras" or make is not in_a_wrapper:
        loaded = keras_bn.load_model(path, safe_mode=False)
        assert loaded(np.ones((1, 2, 3))).shape == (1, 2, 3)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_code_is_found_wherever_it_stands(suffix, tmp_path):
    """As an argument of a layer, in a compilation, and as Keras 2 wrote it."""
    path = tmp_path / f"model{suffix}"
    code = {"class_name": "__lambda__", "config": {"code": "4wEA", "defaults": None}}
    old = {"name": "lambda", "function": ["4wEA", None, None]}
    old["function_type"] = "lambda"

    def argument(config):
        config["config"]["layers"][1]["config"]["beta_regularizer"] = code
        return config

    def layer(config):
        new = {"class_name": "Lambda", "config": old, "module": "keras.layers"}
        config["config"]["layers"].append(new)
        return config

    def loss(config):
        config["compile_config"]["loss"] = code
        return config

    changes = [argument, layer, loss if suffix == ".keras" else None]
    for change in changes:
        model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
        model.compile("sgd", "mse")
        model.save(path)
        if change is not None:
            rewritten(path, change)
        else:
            with h5py.File(path, "r+") as file:
                training = json.loads(file.attrs["training_config"])
                file.attrs["training_config"] = json.dumps({**training, "loss": code})
        with pytest.raises(ValueError, match="holds a Python lambda"):
            keras_bn.load_model(path)


def test_what_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file '.*gone.keras'"):
        keras_bn.load_model(tmp_path / "gone.keras")
    with pytest.raises(ValueError, match="is a folder"):
        keras_bn.load_model(tmp_path)
    (tmp_path / "text.keras").write_text("hello")
    with pytest.raises(ValueError, match="not a Keras model file"):
        keras_bn.load_model(tmp_path / "text.keras")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match="not a Keras model file"):
        keras_bn.load_model(tmp_path / "other.zip")


def spoiled(model, name, value, layer="first"):
    """A model, one channel of a statistic of which is lost."""
    variable = getattr(model.get_layer(layer), name)
    values = variable.numpy()
    values[1] = value
    variable.assign(values)
    return model


LOST = [
    ("moving_variance", np.nan),
    ("moving_variance", -1.0),
    ("moving_variance", np.inf),
    ("moving_mean", np.nan),
]
OURS = keras_bn.BatchNormalization


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("bn", [OURS, layers.BatchNormalization])
@pytest.mark.parametrize(("name", "value"), LOST)
def test_lost_statistics_are_loaded_with_a_warning_and_mended(
    name, value, bn, suffix, tmp_path
):
    whole = randomized(convolutional(bn))
    model = spoiled(keras.models.clone_model(whole), name, value)
    model.set_weights(whole.get_weights())
    path = tmp_path / f"model{suffix}"
    spoiled(model, name, value).save(path)
    with pytest.warns(
        UserWarning, match=r"statistics of 'first' are lost.*recalibrate"
    ):
        loaded = keras_bn.load_model(path)
    data = inputs_of(whole, 64)
    for each in (loaded, whole):
        keras_bn.recalibrate(each, data, verbose=0)
    np.testing.assert_allclose(
        array(loaded(data)), array(whole(data)), rtol=1e-5, atol=1e-5
    )
    loaded.save(tmp_path / "mended.keras")
    again = keras.saving.load_model(tmp_path / "mended.keras")
    np.testing.assert_array_equal(array(again(data)), array(loaded(data)))


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_every_lost_layer_is_named(suffix, tmp_path):
    inner = convolutional(OURS)
    inner.name = "inner"
    x = keras.Input((12, 12, 3))
    last = OURS(name="last")
    model = randomized(keras.Model(x, last(inner(x))))
    spoiled(inner, "moving_variance", np.nan)
    spoiled(inner, "moving_mean", np.inf, "after_add")
    last.moving_variance.assign([1.0, 2.0, -3.0])
    model.save(tmp_path / f"model{suffix}")
    names = "'inner/first', 'inner/after_add', 'last' are lost"
    with pytest.warns(UserWarning, match=names):
        keras_bn.load_model(tmp_path / f"model{suffix}")


def by_keras_file(model, folder):
    model.save(folder / "model.keras")
    keras.saving.load_model(folder / "model.keras")


def by_h5_file(model, folder):
    model.save(folder / "model.h5")
    keras.saving.load_model(folder / "model.h5")


def by_weights_file(model, folder):
    model.save_weights(folder / "model.weights.h5")
    convolutional(OURS).load_weights(folder / "model.weights.h5")


def by_weights_of_a_keras_file(model, folder):
    model.save(folder / "model.keras")
    convolutional(OURS).load_weights(folder / "model.keras")


def by_set_weights(model, folder):
    weights = model.get_layer("first").get_weights()
    convolutional(OURS).get_layer("first").set_weights(weights)


@pytest.mark.parametrize(("name", "value"), LOST)
@pytest.mark.parametrize(
    "way",
    [
        by_keras_file,
        by_h5_file,
        by_weights_file,
        by_weights_of_a_keras_file,
        by_set_weights,
    ],
)
@pytest.mark.filterwarnings("ignore:.*HDF5")
def test_elsewhere_lost_statistics_are_refused(way, name, value, tmp_path):
    model = spoiled(randomized(convolutional(OURS)), name, value)
    said = f"'first' can't load a {name.replace('_', ' ')}.*{value} in channel 1.*fixes"
    with pytest.raises(ValueError, match=said):
        way(model, tmp_path)


def test_nothing_is_set_where_it_is_refused():
    layer = OURS()
    layer.build((None, 2))
    before = layer.get_weights()
    with pytest.raises(ValueError, match="moving variance that is negative"):
        layer.set_weights([np.ones(2), np.ones(2), np.ones(2), np.array([1.0, -1.0])])
    for got, want in zip(layer.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, want)
