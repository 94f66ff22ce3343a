"""Forms of the layer that a file must hold, and models of them with weights set."""

import keras
import numpy as np

import keras_bn


@keras.saving.register_keras_serializable("keras_bn_tests")
class Ramp(keras.initializers.Initializer):
    """Evenly spaced values from `start` to `stop`."""

    def __init__(self, start, stop):
        self.start, self.stop = start, stop

    def __call__(self, shape, dtype=None):
        values = np.linspace(self.start, self.stop, int(np.prod(shape)))
        return keras.ops.convert_to_tensor(values.reshape(shape), dtype)

    def get_config(self):
        return {"start": self.start, "stop": self.stop}


@keras.saving.register_keras_serializable("keras_bn_tests")
class PullTo(keras.regularizers.Regularizer):
    """A penalty on the distance from `target`."""

    def __init__(self, target, factor):
        self.target, self.factor = target, factor

    def __call__(self, x):
        return self.factor * keras.ops.sum(keras.ops.square(x - self.target))

    def get_config(self):
        return {"target": self.target, "factor": self.factor}


@keras.saving.register_keras_serializable("keras_bn_tests")
class Between(keras.constraints.Constraint):
    """Values cut off at `low` and `high`."""

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __call__(self, w):
        return keras.ops.clip(w, self.low, self.high)

    def get_config(self):
        return {"low": self.low, "high": self.high}


OWN_CLASSES = {
    "beta_initializer": Ramp(-0.5, 0.5),
    "gamma_initializer": Ramp(0.5, 1.5),
    "moving_mean_initializer": Ramp(-1.0, 2.0),
    "moving_variance_initializer": Ramp(0.5, 3.0),
    "beta_regularizer": PullTo(0.1, 0.01),
    "gamma_regularizer": PullTo(1.0, 0.02),
    "beta_constraint": Between(-0.4, 0.4),
    "gamma_constraint": Between(0.6, 1.4),
}

# Name of the form: the arguments of the layer, and the shape of one example.
FORMS = {
    "2-D": ({}, (6,)),
    "channels first": ({"axis": 1, "momentum": 0.9}, (3, 4, 5)),
    "channels last": ({"epsilon": 1e-5}, (4, 5, 3)),
    "large": ({}, (16, 16, 16)),
    "two axes": ({"axis": [1, 2]}, (3, 4, 5)),
    "no scale": ({"scale": False}, (6,)),
    "no center": ({"center": False}, (6,)),
    "neither": ({"scale": False, "center": False}, (6,)),
    "frozen": ({"trainable": False}, (6,)),
    "synchronized": ({"synchronized": True}, (6,)),
    "own classes": (OWN_CLASSES, (6,)),
    "renorm": ({"renorm": True, "renorm_clipping": {"rmax": 2.0}}, (6,)),
    "renorm ramp": (
        {"renorm": True, "renorm_clipping": keras_bn.renorm_ramp(scale=2e-4)},
        (6,),
    ),
    "ghost batches": (
        {"virtual_batch_size": 3, "debias": True, "unbiased": True},
        (3, 4, 5),
    ),
    "plain mean": ({"momentum": None}, (6,)),
    "frozen statistics": ({"freeze_statistics": True}, (6,)),
    "frozen gamma": ({"freeze_affine": "gamma"}, (6,)),
    **{
        dtype: ({"dtype": dtype}, (6,))
        for dtype in ("float64", "float16", "bfloat16", "mixed_float16")
    },
}


def examples(shape, batch=8, seed=1):
    """A float32 batch of random examples."""
    return np.random.default_rng(seed).normal(1, 2, (batch, *shape)).astype("float32")


def randomize(layer, seed=0):
    """Set weights that no initializer gives, to values that every dtype holds."""
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        if not weight.dtype.startswith("int"):
            weight.assign(rng.integers(2, 32, weight.shape) / 16)


def model_of(form, batch_normalization=keras_bn.BatchNormalization):
    """A model of nothing but the layer, after two batches, from random weights."""
    arguments, shape = FORMS[form]
    model = keras.Sequential([keras.Input(shape), batch_normalization(**arguments)])
    randomize(model.layers[0])
    for seed in (1, 2):
        model(examples(shape, seed=seed), training=True)
    return model


def conv_model(
    dtype="float32", seed=3, batch_normalization=keras_bn.BatchNormalization
):
    """Conv → BN → ReLU → Pooling → Dense → BN, with initial weights of that seed."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False, dtype=dtype),
            batch_normalization(dtype=dtype),
            layers.ReLU(dtype=dtype),
            layers.GlobalAveragePooling2D(dtype=dtype),
            layers.Dense(5, dtype=dtype),
            batch_normalization(dtype=dtype),
        ]
    )


def assert_same_bits(got, want):
    """Equal to the last bit, in values, shapes and dtypes, NaN equal to NaN."""
    got, want = map(keras.ops.convert_to_numpy, (got, want))
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes(), np.max(np.abs(got - want))
