"""Classes that make their own layers: what is folded, saved and loaded of them."""

import pickle
import warnings
import zipfile

import keras
import numpy as np
import pytest
from keras import layers
from support import classes
from support.backend import only
from support.marks import mostly_slow, takes_fake_quantization
from support.zoo import randomized

import keras_bn
from keras_bn.surgery.norms import is_normalization, is_ours
from keras_bn.surgery.view import ModelView

REMEDY = r"`keras_bn.load_model\(path\)` loads"


def data():
    return np.random.default_rng(0).normal(size=(8, 6, 3)).astype("float32")


def outputs(model, x=None):
    x = data() if x is None else x
    named = isinstance(model.input, dict) if hasattr(model, "input") else False
    values = keras.tree.flatten(model({"x": x} if named else x, training=False))
    return [keras.ops.convert_to_numpy(value) for value in values]


def assert_same(model, other):
    for got, want in zip(outputs(model), outputs(other), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def norms(model):
    return list(ModelView(model).normalizations.values())


def converted(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return keras_bn.from_keras(randomized(make()))


@pytest.mark.parametrize("make", classes.GRAPHS)
@pytest.mark.parametrize("ours", [True, False])
def test_the_file_of_a_folded_model_loads(make, ours, tmp_path):
    model = converted(make) if ours else randomized(make())
    before = len(norms(model))
    folded = keras_bn.fold(model)
    assert_same(folded, model)
    assert type(folded).__module__.startswith("keras.")
    assert len(norms(folded)) < before == len(norms(model))
    folded.save(tmp_path / "folded.keras")
    for load in keras.saving.load_model, keras_bn.load_model:
        again = load(tmp_path / "folded.keras")
        assert_same(again, model)
        assert len(norms(again)) == len(norms(folded))


def test_a_class_that_takes_its_graph_stays_and_so_does_one_without_change():
    class Training(keras.Model):
        def train_step(self, data):
            return {"loss": 0.0}

    inputs = keras.Input((6, 3))
    x = layers.BatchNormalization()(layers.Dense(3)(inputs))
    assert type(keras_bn.fold(Training(inputs, x))) is Training
    alone = Training(inputs, layers.ReLU()(layers.BatchNormalization()(inputs)))
    assert type(keras_bn.fold(alone)) is Training


@takes_fake_quantization
@only("tensorflow", "quantize_aware runs there")
@pytest.mark.parametrize("make", [classes.Net, classes.Stack])
def test_the_file_of_an_aware_model_loads(make, tmp_path):
    model = converted(make)
    aware = keras_bn.quantize_aware(model, data())
    aware.save(tmp_path / "aware.keras")
    for load in keras.saving.load_model, keras_bn.load_model:
        assert_same(load(tmp_path / "aware.keras"), aware)


def options(layer):
    config = layer.get_config()
    return {n: value for n, value in config.items() if n not in ("name", "dtype")}


CHANGES = {
    "frozen": lambda model: keras_bn.freeze(model),
    "frozen affine": lambda model: keras_bn.freeze(model, affine=True),
    "gamma": lambda model: setattr(norms(model)[0], "freeze_affine", "gamma"),
    "groups": lambda model: setattr(norms(model)[-1], "virtual_batch_size", 4),
    "unbiased": lambda model: [setattr(la, "unbiased", True) for la in norms(model)],
    "momentum": lambda model: setattr(norms(model)[0], "momentum", 0.5),
    "Keras's momentum": lambda model: setattr(norms(model)[0], "momentum", 0.99),
    "epsilon": lambda model: setattr(norms(model)[-1], "epsilon", 0.1),
    "synchronized": lambda model: setattr(norms(model)[0], "synchronized", True),
    "penalty": lambda model: setattr(
        norms(model)[0], "gamma_regularizer", keras.regularizers.L2(0.5)
    ),
}


@pytest.mark.parametrize(
    ("make", "change"),
    [
        *((make, change) for make in classes.ALL for change in list(CHANGES)[:4]),
        *((classes.Net, change) for change in list(CHANGES)[4:]),
    ],
)
@pytest.mark.filterwarnings(f"ignore:.*{REMEDY}")
def test_options_come_back_with_load_model(make, change, tmp_path):
    model = converted(make)
    CHANGES[change](model)
    path = tmp_path / "model.keras"
    model.save(path)
    loaded = keras_bn.load_model(path)
    assert type(loaded) is type(model)
    assert all(map(is_ours, norms(loaded)))
    assert [*map(options, norms(loaded))] == [*map(options, norms(model))]
    flags = [[v.trainable for v in m.variables] for m in (loaded, model)]
    assert flags[0] == flags[1]
    assert_same(loaded, model)
    # Keras's own reader makes what the class makes, with the same weights.
    theirs = keras.saving.load_model(path)
    assert not all(map(is_ours, norms(theirs)))
    if change != "epsilon":
        assert_same(theirs, model)
    # A copy is a copy of the objects.
    copy = keras_bn.from_keras(model)
    assert [*map(options, norms(copy))] == [*map(options, norms(model))]


@classes.register
class Grouped(keras.Model):
    """A class that makes layers of keras_bn, with options beyond Keras's."""

    def __init__(self, **kwargs):
        inputs = keras.Input((6, 3))
        options = {"virtual_batch_size": 4, "unbiased": True}
        norm = keras_bn.BatchNormalization(freeze_statistics=True, **options)
        super().__init__(inputs, norm(inputs), **kwargs)

    def get_config(self):
        return {}


def test_what_the_class_itself_sets_is_undone_in_the_file(tmp_path):
    """In the order that the options were set: two of them exclude each other."""
    model = Grouped()
    norm = norms(model)[0]
    norm.unbiased = False
    norm.virtual_batch_size = None
    norm.synchronized = True
    keras_bn.unfreeze(model)
    model.save(tmp_path / "model.keras")
    for load in keras.saving.load_model, keras_bn.load_model, pickled:
        (again,) = norms(load(tmp_path / "model.keras"))
        assert options(again) == options(norm)
        assert not again.freeze_statistics
        assert again.synchronized


def pickled(path):
    return pickle.loads(pickle.dumps(keras_bn.load_model(path)))


@keras.saving.register_keras_serializable("tests", "Own")
class Own(keras.regularizers.L2):
    pass


class Foreign(keras.regularizers.L2):
    """Not registered."""


@pytest.mark.parametrize("kind", [Own, Foreign])
def test_classes_of_the_user_s_that_are_set_later_load(kind, tmp_path):
    custom = {"Foreign": Foreign}
    model = converted(classes.Net)
    norms(model)[0].gamma_regularizer = kind(0.25)
    model.save(tmp_path / "model.keras")
    loaded = keras_bn.load_model(tmp_path / "model.keras", custom_objects=custom)
    assert type(norms(loaded)[0].gamma_regularizer) is kind
    plain = keras.Sequential([keras.Input((3,)), keras_bn.BatchNormalization()])
    norms(plain)[0].gamma_regularizer = kind(0.25)
    plain.save(tmp_path / "plain.keras")
    for load in keras.saving.load_model, keras_bn.load_model:
        again = load(tmp_path / "plain.keras", custom_objects=custom)
        assert type(norms(again)[0].gamma_regularizer) is kind


@pytest.mark.parametrize(
    "make", mostly_slow(classes.ALL, [classes.ALL[0], classes.calling])
)
def test_training_goes_on_frozen(make, tmp_path):
    model = converted(make)
    with pytest.warns(UserWarning, match=REMEDY):
        keras_bn.freeze(model)
    named = make is classes.Dicts
    x = {"x": data()} if named else data()
    y = {"x": np.ones((8, 6, 4)), "y": np.ones((8, 6, 3))} if named else data()[..., :2]
    model.compile("adam", "mse")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras_bn.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations.numpy()) == 1
    before = [la.moving_mean.numpy() for la in norms(loaded)]
    for each in model, loaded:
        each.fit(x, y, verbose=0)
    for layer, mean in zip(norms(loaded), before, strict=True):
        np.testing.assert_array_equal(layer.moving_mean, mean)
    assert_same(loaded, model)


@pytest.mark.parametrize("make", classes.ALL)
def test_files_of_default_layers_are_those_of_keras(make, tmp_path):
    model = randomized(make())
    with pytest.warns(UserWarning, match=REMEDY):
        ours = keras_bn.from_keras(model)
    entries = []
    for name, each in ("theirs", model), ("ours", ours):
        each.save(tmp_path / f"{name}.keras")
        with zipfile.ZipFile(tmp_path / f"{name}.keras") as archive:
            entries.append(archive.namelist())
        each.save_weights(tmp_path / f"{name}.weights.h5")
    assert entries[0] == entries[1]
    # Weights go both ways, also those of a frozen layer.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keras_bn.freeze(ours)
    ours.save_weights(tmp_path / "ours.weights.h5")
    for into, name in (make(), "ours"), (converted(make), "theirs"):
        into.load_weights(tmp_path / f"{name}.weights.h5")
        assert_same(into, model)


@pytest.mark.parametrize("closed", [False, True])
def test_a_layer_that_is_built_with_tuples_loads(closed, tmp_path):
    """JSON makes lists of them, which Keras passes on."""
    inputs = {"x": keras.Input((6, 3), name="x")}
    model = randomized(keras.Model(inputs, classes.Pyramid(closed)(inputs["x"])))
    model.save(tmp_path / "model.keras")
    with pytest.raises(TypeError, match="can only concatenate list"):
        keras.saving.load_model(tmp_path / "model.keras")
    assert_same(keras_bn.load_model(tmp_path / "model.keras"), model)


def in_graph(part):
    inputs = keras.Input((6, 3))
    return keras.Model(inputs, layers.Dense(2)(part(inputs)))


@classes.register
class Around(layers.Layer):
    """A layer whose config holds what it calls."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, x):
        return layers.Activation("linear")(self.inner(x))

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner)
        return {**super().get_config(), "inner": inner}

    @classmethod
    def from_config(cls, config):
        inner = keras.saving.deserialize_keras_object(config.pop("inner"))
        return cls(inner, **config)


@pytest.mark.parametrize("around", [lambda part: part, Around])
def test_fold_warns_if_a_layer_makes_again_what_is_folded(around, tmp_path):
    part = around(classes.Pyramid(closed=True, name="pyramid"))
    model = randomized(in_graph(part))
    with pytest.warns(
        UserWarning, match=r"for '[a-z_0-9]*/?pyramid' \(P.* makes"
    ) as all_:
        folded = keras_bn.fold(model)
    assert __file__ in [warning.filename for warning in all_]
    assert_same(folded, model)
    folded.save(tmp_path / "folded.keras")
    with pytest.raises(ValueError, match="can't be loaded"):
        keras_bn.load_model(tmp_path / "folded.keras")


def test_fold_warns_of_no_layer_that_is_opened_or_keeps_its_layers(recwarn, tmp_path):
    inner = keras.Sequential(
        [keras.Input((6, 3)), layers.Dense(4), layers.BatchNormalization()]
    )
    for part in classes.Pyramid(), Around(inner):
        model = randomized(in_graph(part))
        folded = keras_bn.fold(model)
        assert len(norms(folded)) < len(norms(model))
        folded.save(tmp_path / "folded.keras")
        assert_same(keras_bn.load_model(tmp_path / "folded.keras"), model)
    assert not [w for w in recwarn if "does not load" in str(w.message)]


def test_who_is_warned(recwarn):
    """Neither who loads with us, nor whose config names its layers."""
    plain = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    keras_bn.freeze(keras_bn.from_keras(plain))

    class Training(keras.Model):
        def train_step(self, data):
            return {"loss": 0.0}

    inputs = keras.Input((3,))
    trained = Training(inputs, layers.BatchNormalization()(inputs))
    keras_bn.freeze(keras_bn.from_keras(trained))
    keras_bn.fold(classes.Net())
    keras_bn.to_keras(converted(classes.Net))
    assert not [w for w in recwarn if "makes its own" in str(w.message)]


def test_the_warning_names_the_class_and_the_caller():
    for run in keras_bn.from_keras, lambda m: keras_bn.freeze(converted(type(m))):
        with pytest.warns(UserWarning, match="^Net in 'net.*' makes its own") as caught:
            run(classes.Net())
        files = [w.filename for w in caught if "makes its own" in str(w.message)]
        assert set(files) == {__file__}


def test_a_file_of_keras_s_own_layers_loads_with_ours(tmp_path):
    """With `virtual_batch_size` and more in no asset: as ever."""
    model = randomized(classes.Dicts())
    model.save(tmp_path / "model.keras")
    loaded = keras_bn.load_model(tmp_path / "model.keras")
    assert type(loaded) is classes.Dicts
    assert all(is_normalization(la) and is_ours(la) for la in norms(loaded))
    assert loaded.norms[0] is norms(loaded)[0]
    assert_same(loaded, model)


class Half(layers.Layer):
    def __init__(self, **options):
        super().__init__(**options)
        self.bn = keras_bn.BatchNormalization()

    def build(self, shape):
        self.bn.build(shape)

    def call(self, x):
        return self.bn(x)


class OtherHalf(Half):
    pass


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (Half, "Half in 'net' makes its own layers, and its config names"),
        (
            OtherHalf,
            "Half and OtherHalf in 'net' make their own layers, and their configs name",
        ),
    ],
)
def test_the_warning_counts_the_classes(second, says):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, second()(Half()(inputs)), name="net")
    with pytest.warns(UserWarning, match=f"^{says} none of them"):
        keras_bn.freeze(model)
