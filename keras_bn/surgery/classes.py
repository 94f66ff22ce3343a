"""Models and layers of a class that makes its own layers, and says so in its config.

Keras saves such a model as its class and the arguments of its constructor. What loads
the file makes the layers of the class again: the graph is that of the class, and the
normalizations are those that the class makes.
"""

import warnings

import keras

from keras_bn.layer import BatchNormalization
from keras_bn.surgery.graph import children, functional_class, graph_of


def as_graphs(view):
    """Let the graphs in a model stand for themselves, where a class makes others.

    Such a model becomes a plain Functional or Sequential one, whose config holds its
    layers and calls. It loses what else its class had, such as a training step.

    Args:
        view: the `ModelView` of a model whose graphs were changed.
    """
    for _, layer in view.layers:
        for plain in (keras.Sequential, functional_class()):
            if isinstance(layer, plain) and type(layer).call is plain.call:
                if type(layer) is not plain and not _is_like(layer, plain):
                    layer.__class__ = plain
                break


def _is_like(model, plain):
    """Whether the config of a model holds its graph, as that of its base class."""
    kind = type(model)
    if kind.get_config is not plain.get_config:
        return False
    if plain is keras.Sequential:
        return kind.__init__ is plain.__init__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return "output_layers" in model.get_config()
        except Exception:  # the arguments of its constructor are no config
            return False


def made_by_classes(view):
    """The normalizations of ours in a model that its file will not name.

    Args:
        view: the `ModelView` of a model.

    Returns:
        A dict of the names of the classes that make them, by path. It is empty for a
        model that cannot be saved with its config.
    """
    makers = _makers(view, view.of_type(BatchNormalization))
    return {path: type(layer).__name__ for path, layer in makers.items()}


def _makers(view, layers):
    """The innermost layer of an own class around each layer that no config names.

    Args:
        view: the `ModelView` of a model.
        layers: some of its normalizations, by path.
    """
    own = {
        path: layer
        for path, layer in view.layers
        if not type(layer).__module__.startswith(("keras.", "keras_bn."))
        and children(layer)
    }
    if not own or not layers:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            names = set(_names(keras.saving.serialize_keras_object(view.model)))
        except Exception:  # a class without a config, or with one that fails
            return {}
    root = view.model.name
    makers = {
        path: [own[p] for p in own if p == root or path.startswith(f"{p}/")]
        for path, layer in layers.items()
        if layer.name not in names
    }
    return {path: around[-1] for path, around in makers.items() if around}


def warn_of_classes(view, stacklevel):
    """Warn of classes that make the normalizations of a model anew when it is loaded.

    Args:
        view: the `ModelView` of a model.
        stacklevel: as of `warnings.warn`, for the caller of this function.
    """
    if kinds := sorted(set(made_by_classes(view).values())):
        makes = "makes its own layers, and its config names"
        if len(kinds) > 1:
            makes = "make their own layers, and their configs name"
        warnings.warn(
            f"{' and '.join(kinds)} in '{view.model.name}' {makes} none of them. "
            "`keras_bn.load_model(path)` loads a .keras file of this model with the "
            "layers of keras_bn and the options set in them; `keras.saving.load_model` "
            "and pickle make what the class makes, and so does `clone_model` where it "
            "makes such a class from its config.",
            stacklevel=stacklevel + 1,
        )


def warn_of_folded(view, folded, stacklevel):
    """Warn of layers that make again what is folded in them, when they are loaded.

    Args:
        view: the `ModelView` of a model before folding.
        folded: the normalizations that are folded.
        stacklevel: as of `warnings.warn`, for the caller of this function.
    """
    makers = _makers(view, {view.path(norm): norm for norm in folded}).values()
    if names := {view.path(la): type(la) for la in makers if graph_of(la) is None}:
        listed = ", ".join(f"'{p}' ({kind.__name__})" for p, kind in names.items())
        makes, them = "makes its own", "it"
        if len(names) > 1:
            makes, them = "make their own", "them"
        warnings.warn(
            f"A file of the folded model does not load, for {listed} {makes} layers "
            f"and would make again what is folded in {them}. Save the model as it was, "
            "and fold what is loaded.",
            stacklevel=stacklevel + 1,
        )


def _names(config):
    """The names of the normalizations in a config."""
    if isinstance(config, list | tuple):
        for part in config:
            yield from _names(part)
    elif isinstance(config, dict):
        if "BatchNormalization" in str(config.get("class_name")):
            inner = config.get("config")
            yield inner.get("name") if isinstance(inner, dict) else None
        for part in config.values():
            yield from _names(part)
