"""The compilation of a saved model, as Keras 3 reads it.

Keras 2 wrote arguments that Keras 3 has not, registered its own optimizers as if they
were the user's, and named losses in short.
"""

import inspect

import keras

# Where a class of a compilation may be found.
_PLACES = {
    "keras.optimizers": keras.optimizers,
    "keras.optimizers.schedules": keras.optimizers.schedules,
    "keras.losses": keras.losses,
    "keras.metrics": keras.metrics,
}
_RENAMED = {"LossScaleOptimizerV3": "LossScaleOptimizer"}

# Short names that a reader of .h5 files does not know.
_SHORT = {
    "mse": "mean_squared_error",
    "mae": "mean_absolute_error",
    "mape": "mean_absolute_percentage_error",
    "msle": "mean_squared_logarithmic_error",
    "kld": "kl_divergence",
}


def modern_compilation(config, custom_objects=()):
    """The `compile_config` of a `.keras` file, in the words of Keras 3.

    Args:
        config: a dict, as JSON gave it.
        custom_objects: dict of the user's own classes by name.

    Returns:
        A new dict, without what Keras 2 had left at its default.
    """
    return {
        key: _modern(part, custom_objects)
        for key, part in config.items()
        if part is not None
    }


def modern_training(config, custom_objects=()):
    """The `training_config` of an `.h5` file, in the words of Keras 3.

    Args:
        config, custom_objects: as in `modern_compilation`.
    """
    config = {key: _modern(part, custom_objects) for key, part in config.items()}
    for key in ("loss", "metrics", "weighted_metrics"):
        config[key] = _long_names(config.get(key), custom_objects)
        # Of a single output, as one list for each output: Keras 3.10 does not take it.
        match config[key]:
            case [[*_] as only]:
                config[key] = only
    return config


def _modern(config, custom_objects):
    if isinstance(config, list):
        return [_modern(part, custom_objects) for part in config]
    if not isinstance(config, dict):
        return config
    config = {key: _modern(part, custom_objects) for key, part in config.items()}
    name, inner = config.get("class_name"), config.get("config")
    if not isinstance(name, str) or not isinstance(inner, dict):
        return config
    registered = config.get("registered_name") or name
    if keras.saving.get_registered_object(registered, dict(custom_objects)) is not None:
        return config
    # Keras 2 registered its own optimizers in the package of the user's.
    name = _RENAMED.get(plain := name.removeprefix("Custom>"), plain)
    places = [place for place in _PLACES if hasattr(_PLACES[place], name)]
    if not places or registered.removeprefix("Custom>") not in (plain, name):
        return config
    (place, *_) = places
    return {
        **config,
        "module": place,
        "class_name": name,
        "registered_name": None,
        "config": _arguments(name, getattr(_PLACES[place], name), inner),
    }


def _arguments(name, kind, inner):
    """The arguments of a class, without those that it no longer has."""
    names = inspect.signature(kind).parameters
    if issubclass(kind, keras.optimizers.Optimizer):
        inner = _of_optimizer(inner)
    if name == "MeanMetricWrapper" and isinstance(function := inner.get("fn"), str):
        config = {"class_name": "function", "module": "builtins", "config": function}
        return {**inner, "fn": {**config, "registered_name": function}}
    old = {"fn", "dynamic"} - set(names)
    defaults = [("name", None), ("reduction", "auto")]
    return {
        key: value
        for key, value in inner.items()
        if (key in names or value) and key not in old and (key, value) not in defaults
    }


def _of_optimizer(inner):
    """The arguments of an optimizer, without those that only Keras 2 had.

    Until Keras 2.2, the learning rate was called `lr`. `decay` lowered it in each step,
    as a schedule does now.
    """
    of_keras_2 = ("lr", "decay", "schedule_decay", "is_legacy_optimizer")
    rate, decay = inner.get("learning_rate", inner.get("lr")), inner.get("decay")
    inner = {key: value for key, value in inner.items() if key not in of_keras_2}
    if isinstance(rate, int | float) and decay:
        rate = {
            "module": "keras.optimizers.schedules",
            "class_name": "InverseTimeDecay",
            "config": {
                "initial_learning_rate": rate,
                "decay_steps": 1,
                "decay_rate": decay,
            },
            "registered_name": None,
        }
    return inner if rate is None else {**inner, "learning_rate": rate}


def _long_names(config, custom_objects):
    if isinstance(config, str):
        return config if config in custom_objects else _SHORT.get(config, config)
    if isinstance(config, list):
        return [_long_names(part, custom_objects) for part in config]
    if isinstance(config, dict) and "class_name" not in config:
        return {key: _long_names(part, custom_objects) for key, part in config.items()}
    return config
