"""Rewriting the config of a saved model for Keras 3, with our layers in it.

`modern` takes the `config.json` of a `.keras` file and the `model_config` of an `.h5`
file, from Keras 3, Keras 2 and TensorFlow 1. The first names classes by module and
name, the second by name alone.
"""

import inspect

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.loading.compilation import modern_compilation
from keras_bn.surgery.graph import functional_class

OURS = "keras_bn>BatchNormalization"

# All names that Keras has saved its layer under.
_NORMALIZATIONS = {
    "BatchNormalization",
    "BatchNormalizationV1",
    "BatchNormalizationV2",
    "SyncBatchNormalization",
}

# The packages that have contained Keras, longer names first.
_PACKAGES = (
    "tensorflow.python.keras",
    "tensorflow.keras",
    "tf_keras",
    "keras_core",
    "keras",
)

# Where these packages keep their layers.
_LAYERS = ("keras.layers.", "keras.src.layers.", "keras.engine.", "keras.src.engine.")

# Arguments that Keras 3 has removed, with the value that has no effect.
_GONE = {"time_major": False, "groups": 1}

# What Keras 2 wrote besides for attention.
_SHAPES = ("query_shape", "key_shape", "value_shape")
_ROBUST = "softmax_robust_masking"

_OUTPUTS = "output_layers"

# Layers that take their initial state beside their input.
_RECURRENT = ("RNN", "SimpleRNN", "GRU", "LSTM", "ConvLSTM2D", "Bidirectional")

# The keys under which a layer's config holds other layers, which need a module.
_HELD = ("layer", "backward_layer", "cell", "cells")


@keras.saving.register_keras_serializable(package="keras_bn")
class SyncBatchNormalization(BatchNormalization):
    """Our layer under the name that its weights have in a `.keras` file.

    After loading, it becomes an ordinary `BatchNormalization`.
    """


def modern(config, custom_objects=()):
    """A config for Keras 3, in which batch normalizations are ours.

    Args:
        config: parsed JSON: dicts, lists and plain values.
        custom_objects: dict of the user's own classes by name. Configs of these and of
            classes registered with Keras do not change.

    Returns:
        A new config; the given one does not change.
    """
    if isinstance(config, list):
        return [modern(part, custom_objects) for part in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "Sequential":
        config = _with_input(config)
    elif "input_layers" in config and _has_old_nodes(config):
        ends = {key: _single(config.get(key)) for key in ("input_layers", _OUTPUTS)}
        config = {**config, **ends}
    elif isinstance(config.get("inbound_nodes"), list):
        recurrent = config.get("class_name") in _RECURRENT and _is_keras(config)
        nodes = [_node(node, recurrent) for node in config["inbound_nodes"]]
        config = {**config, "inbound_nodes": nodes}
    compiled = config.get("compile_config")
    config = {key: modern(part, custom_objects) for key, part in config.items()}
    if isinstance(compiled, dict):
        config["compile_config"] = modern_compilation(compiled, custom_objects)
    name, inner = config.get("class_name"), config.get("config")
    if not isinstance(name, str) or not isinstance(inner, dict):
        return config
    own = _registered(config, custom_objects)
    inner = config["config"] = _without_input_shape(name, inner, own)
    if own is not None or not _is_keras(config):
        return config
    config["config"] = inner = _arguments(config, inner)
    if name == "MultiHeadAttention":
        config = _attention(config, inner)
    elif name in _RECURRENT:
        config = _of_first_input(config)
    if name in _NORMALIZATIONS:
        ours = BatchNormalization
        if name == "SyncBatchNormalization":
            inner["synchronized"] = True
            ours = SyncBatchNormalization
        return {
            **config,
            "module": ours.__module__,
            "class_name": ours.__name__,
            "registered_name": f"keras_bn>{ours.__name__}",
        }
    return {**config, **_home(name, config.get("module"))}


def of_keras(config):
    """Yield the names of Keras's own batch normalizations in a config.

    Args:
        config: as in `modern`.
    """
    if isinstance(config, list):
        for part in config:
            yield from of_keras(part)
    elif isinstance(config, dict):
        name, inner = config.get("class_name"), config.get("config")
        if name in _NORMALIZATIONS and isinstance(inner, dict) and _is_keras(config):
            yield inner.get("name")
        yield from of_keras(list(config.values()))


def is_code(config):
    """Whether a config holds the code of a Python function, which loading would run."""
    if isinstance(config, list):
        return any(map(is_code, config))
    if not isinstance(config, dict):
        return False
    marked = config.get("class_name") == "__lambda__"
    of_keras_2 = config.get("function_type") == "lambda"
    return marked or of_keras_2 or any(map(is_code, config.values()))


def _registered(config, custom_objects):
    """The user's own class that a config names, or None."""
    name = config.get("registered_name") or config["class_name"]
    return keras.saving.get_registered_object(name, dict(custom_objects))


def _is_keras(config):
    """Whether a config is of a Keras class: its module is Keras's or not given."""
    name, registered = config["class_name"], config.get("registered_name")
    if ">" in name or registered not in (None, name):
        return False
    module = config.get("module")
    return module is None or _package(module) is not None


def _package(module):
    return next((p for p in _PACKAGES if f"{module}.".startswith(f"{p}.")), None)


def _home(name, module):
    """Where Keras 3 has a class that an older Keras had in this module."""
    if module is None:
        return {}
    if name == "Functional":
        return {"module": functional_class().__module__, "registered_name": None}
    module = "keras" + module[len(_package(module)) :]
    if module.startswith(_LAYERS) and hasattr(keras.layers, name):
        module = "keras.layers"
    return {"module": module}


def _without_input_shape(name, inner, own):
    """The arguments of a layer without the shape of its input.

    Keras 2 wrote it into the first layer of a model; Keras 3 has an input layer.
    """
    if name == "InputLayer" or "batch_input_shape" not in inner:
        return inner
    if own is not None and "batch_input_shape" in inspect.signature(own).parameters:
        return inner
    return {key: part for key, part in inner.items() if key != "batch_input_shape"}


def _arguments(config, inner):
    """The arguments of a Keras class, without those that Keras 3 does not know."""
    name, module = config["class_name"], config.get("module") or ""
    layer = getattr(keras.layers, name, None)
    if hasattr(keras.initializers, name) and ("initializers" in module or not layer):
        # TensorFlow 1 gave initializers a dtype.
        return {key: part for key, part in inner.items() if key != "dtype"}
    inner = dict(inner)
    policy = inner.get("dtype")
    if isinstance(policy, dict) and str(policy.get("class_name")).startswith("Policy"):
        inner["dtype"] = policy["config"]["name"]
    parameters = inspect.signature(layer).parameters if layer else _GONE
    for key, neutral in _GONE.items():
        if key not in parameters and inner.get(key) == neutral:
            del inner[key]
    if inner.get("score_mode") == "dot":
        del inner["score_mode"]  # the default, and a reader of .h5 takes it for a loss
    if name.startswith("SeparableConv"):
        # It inherited these from Conv and never used them.
        inner = {
            key: inner[key]
            for key in inner
            if not key.startswith("kernel_") or key == "kernel_size"
        }
    for key in _HELD:
        if isinstance(value := inner.get(key), dict):
            inner[key] = _placed(value)
        elif isinstance(value, list):
            inner[key] = [_placed(part) for part in value]
    return inner


def _attention(config, inner):
    """The config of an attention layer, which Keras 2 wrote with its input shapes."""
    shapes = {key: inner.get(key) for key in _SHAPES}
    inner = {key: v for key, v in inner.items() if key not in (*_SHAPES, _ROBUST)}
    config = {**config, "config": inner}
    if config.get("build_config") and None not in shapes.values():
        config["build_config"] = {"shapes_dict": shapes}
    return config


def _has_old_nodes(config):
    """Whether the config of a graph has the calls of its layers in lists."""
    layers = [layer for layer in config.get("layers", []) if isinstance(layer, dict)]
    nodes = [node for layer in layers for node in layer.get("inbound_nodes") or []]
    return bool(nodes) and all(isinstance(node, list) for node in nodes)


def _single(places):
    """The only input or output of a graph without the list that Keras 2 put it in.

    In Keras 3, a model with a list of one input is another than one with an input.
    """
    return places[0] if isinstance(places, list) and len(places) == 1 else places


def _of_first_input(config):
    """The config of a recurrent layer, built for its input without initial states."""
    match config.get("build_config"):
        case {"input_shape": [[*first], *_]}:
            return {**config, "build_config": {"input_shape": first}}
    return config


def _node(node, recurrent):
    """A call of a layer, with its arguments as Keras 3 writes them.

    Keras 2 wrote a list of inputs, `[layer, call, output, keyword arguments]`, and
    tensors among the keyword arguments as `[layer, call, output]`. Keras 3 reads that,
    but not the tensors among the keyword arguments, nor the initial state of a
    recurrent layer among the inputs.
    """
    if not isinstance(node, list) or not node or not all(map(_is_input, node)):
        return node
    keywords = node[0][3] if len(node[0]) == 4 else {}
    keywords = {key: value for key, value in keywords.items() if value is not None}
    tensors = [_tensor(tensor[:3]) for tensor in node]
    if recurrent and len(tensors) > 1:
        tensors, keywords = tensors[:1], {**keywords, "initial_state": tensors[1:]}
    elif not any(_is_tensor(value) for value in keywords.values()):
        return node
    return {
        "args": tensors if len(tensors) == 1 else [tensors],
        "kwargs": {
            key: _tensor(value) if _is_tensor(value) else value
            for key, value in keywords.items()
        },
    }


def _is_input(value):
    return isinstance(value, list) and len(value) in (3, 4) and _is_tensor(value[:3])


def _is_tensor(value):
    match value:
        case [str(), int(), int()]:
            return True
    return False


def _tensor(place):
    """A symbolic tensor by its place in a graph, as Keras 3 writes it."""
    inner = {"shape": [], "dtype": "float32", "keras_history": place}
    return {"class_name": "__keras_tensor__", "config": inner}


def _placed(config):
    """The config of a layer within a layer, with the module that Keras 3 needs."""
    name = str(config.get("class_name"))
    if "module" in config:
        return config
    if name == "Functional":
        module = functional_class().__module__
    elif name in ("Model", "Sequential"):
        module = "keras"
    elif hasattr(keras.layers, name):
        module = "keras.layers"
    else:
        return config
    return {**config, "module": module, "registered_name": None}


def _with_input(config):
    """The config of a Sequential model with an input layer.

    Keras 2 kept the input shape in the first layer, as `batch_input_shape`.
    """
    inner = config.get("config")
    if isinstance(inner, list):
        # Until Keras 2.2, this was a list without the model's name.
        inner = {"name": "sequential", "layers": inner}
    if not isinstance(inner, dict) or not inner.get("layers"):
        return config
    first = inner["layers"][0]
    shape = first.get("config", {}).get("batch_input_shape")
    if first.get("class_name") == "InputLayer" or shape is None:
        return {**config, "config": inner}
    dtype = first["config"].get("dtype")
    arguments = {
        "batch_shape": shape,
        "dtype": dtype if isinstance(dtype, str) else None,
        "name": f"{first['config'].get('name')}_input",
    }
    layer: dict = {"class_name": "InputLayer", "config": arguments}
    if "module" in first:
        layer = {**layer, "module": "keras.layers", "registered_name": None}
    return {**config, "config": {**inner, "layers": [layer, *inner["layers"]]}}
