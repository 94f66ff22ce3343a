"""Every private name of Keras that the tools use, each once.

Keras promises nothing about these names, so each is a debt. Only `surgery` uses them.
The layer, its saving and its loading use none. `require` is what each tool calls first:
where a name is missing, it raises before anything has changed.
`tests/surgery/test_private.py` shows of each name that it does what is relied on.
"""

import functools
import importlib
import sys
from typing import Any, NamedTuple

import keras

# The versions of Keras in which every name below was seen, and CI runs the tests.
KNOWN = ("3.10", "3.12", "3.15", "3.16")


def _imported(*paths) -> Any:
    """What stands at the first of some dotted paths that exists; None if none does."""
    for path in paths:
        module, _, name = path.rpartition(".")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    return None


# Up to Keras 3.15 a call in a graph gets the `training` of the whole graph; later only
# where its own arguments have none, and None is one.
NONE_HIDES_TRAINING = tuple(map(int, keras.__version__.split(".")[:2])) > (3, 15)

# Draws a graph anew: the calls between inputs and outputs, by depth.
map_graph = _imported("keras.src.ops.function.map_graph")
# The key of a call in `Functional._nodes`.
make_node_key = _imported("keras.src.ops.function.make_node_key")
# A call in a graph; its arguments; what finds sublayers and variables in attributes.
Node = _imported("keras.src.ops.node.Node")
SymbolicArguments = _imported("keras.src.ops.symbolic_arguments.SymbolicArguments")
Tracker = _imported("keras.src.utils.tracking.Tracker")
# `AutocastScope(None)`: variables are read in their own dtype.
AutocastScope = _imported(
    "keras.src.backend.AutocastScope",  # up to Keras 3.15
    "keras.src.backend.common.AutocastScope",
)
# The mask of a tensor, symbolic or not.
get_keras_mask = _imported("keras.src.backend.common.masking.get_keras_mask")
# Any data that `fit` takes, as batches, and the adapters that tell their kind.
_TRAINERS = "keras.src.trainers"
EpochIterator = _imported(f"{_TRAINERS}.epoch_iterator.EpochIterator")
_ADAPTERS = f"{_TRAINERS}.data_adapters"
TFDatasetAdapter = _imported(f"{_ADAPTERS}.tf_dataset_adapter.TFDatasetAdapter")
PyDatasetAdapter = _imported(f"{_ADAPTERS}.py_dataset_adapter.PyDatasetAdapter")


class Private(NamedTuple):
    """A private name.

    Args:
        name: a name of this module, or `Owner._attribute`.
        group: the kind of work that needs it, as `require` takes it.
        use: what it is, and what it is needed for.
        public: what is public instead, and why that is not enough; empty for nothing.
    """

    name: str
    group: str
    use: str
    public: str = ""


# The group of names that some versions have and others lack, and nothing depends on.
IF_THERE = "if there"
_COMPUTES = "computes the result: a subclass with one of its own is another layer"
_COMPILED = "what `compile` sets; a copy without a compilation leaves it out"
_STATE = "the state of a layer that a layer of another class takes over"

NAMES: tuple[Private, ...] = (
    # Walking a model.
    Private(
        "Layer._layers",
        "layers",
        "the sublayers of a layer, in the order of its weights",
        "`Model.layers` is that of models alone: wrappers and cells have none",
    ),
    Private("Sequential._functional", "layers", "the graph of a built Sequential"),
    # Changing its graphs.
    Private("map_graph", "graph", "draws a graph anew after a call came or went"),
    Private("make_node_key", "graph", "the key of a call in `Functional._nodes`"),
    Private("Functional._nodes", "graph", "the keys of the calls that are in a graph"),
    Private("Functional._nodes_by_depth", "graph", "the calls of a graph, in order"),
    Private("Functional._operations", "graph", "the layers and operations of a graph"),
    Private("Functional._operations_by_depth", "graph", "the same by depth"),
    Private("Operation._inbound_nodes", "graph", "the calls of a layer or operation"),
    Private("Operation._outbound_nodes", "graph", "the calls that take its outputs"),
    Private("KerasTensor._keras_history", "graph", "the call that makes a tensor"),
    Private(
        "Functional._run_through_graph",
        "graph",
        "runs a graph with a function around each call",
        "`Model.call`, which runs it without",
    ),
    Private(
        "Functional._standardize_inputs",
        "graph",
        "any structure of inputs as a flat list, as a call of the model takes it",
    ),
    Private("get_keras_mask", "graph", "the mask that a tensor carries"),
    # Copying and replacing layers.
    Private("Node", "copy", "calls are copied with the layers that they call"),
    Private("SymbolicArguments", "copy", "and so are their arguments"),
    Private("Tracker", "copy", "and what tracks the layers and variables of a layer"),
    Private("Layer._tracker", "copy", "the tracker of a layer: its lists are changed"),
    Private("Layer._untrack_variable", "copy", "takes a variable out of a layer"),
    Private(
        "Variable._value",
        "copy",
        "whether a variable has a value yet, and its tensor on PyTorch",
        "`Variable.value`, which gives a deferred variable a value of its own",
    ),
    Private("Variable._shape", "copy", "set by the constructor of the copy"),
    Private("Variable._ndim", "copy", "set by the constructor of the copy"),
    Private("Model._compile_config", "copy", _COMPILED),
    Private("Model._compiled_trainable_state", IF_THERE, _COMPILED),
    Private("Model._compile_loss", "copy", _COMPILED),
    Private("Model._compile_metrics", "copy", _COMPILED),
    Private("Model._loss_tracker", "copy", _COMPILED),
    Private("Layer._trainable", "copy", _STATE, "`trainable`, a sum of several flags"),
    Private("Layer._path", "copy", _STATE, "`path`, which cannot be set"),
    Private("Layer._parent_path", "copy", _STATE),
    Private("Layer._remat_mode", "copy", _STATE),
    Private("Layer._called", "copy", _STATE),
    # Optimizers.
    Private(
        "Optimizer._var_key",
        "copy",
        "the key of a variable in an optimizer, which is the `id` of the variable",
    ),
    Private(
        "Optimizer._trainable_variables",
        "copy",
        "the variables that an optimizer has state for",
    ),
    # Data.
    Private("EpochIterator", "data", "any data that `fit` takes, as batches"),
    Private("TFDatasetAdapter", "data", "tells a tf.data.Dataset in it"),
    Private("PyDatasetAdapter", "data", "tells a PyDataset or a generator in it"),
    # Whether a subclass of Keras's normalization computes what its base class does.
    Private("BatchNormalization._moments", IF_THERE, _COMPUTES),
    Private("BatchNormalization._renorm_correction_and_moments", IF_THERE, _COMPUTES),
    Private("BatchNormalization._compose_transforms", IF_THERE, _COMPUTES),
    Private("BatchNormalization._update_renorm_statistics", IF_THERE, _COMPUTES),
    # Computing a layer on other weights.
    Private(
        "AutocastScope",
        "fuse",
        "reads the weights in their own dtype, not rounded to half precision first",
    ),
)

# PyTorch's modules list their parameters themselves.
ON_PYTORCH = (
    Private(
        "Layer._torch_params",
        "copy",
        "the parameters that a module of PyTorch has, once it has been asked",
        "`torch_params`, which gives it some by asking",
    ),
    Private("Layer._track_variables", "copy", "makes them those of the layer"),
)
if keras.backend.backend() == "torch":
    NAMES += ON_PYTORCH


def require(tool: str, *groups: str) -> None:
    """Refuse to run a tool on a Keras that has not what it needs.

    Args:
        tool: the public name of the tool, for the message.
        *groups: "layers", "graph", "copy", "data" or "fuse", as in `NAMES`.

    Raises:
        RuntimeError: if a name of these groups is missing.
    """
    names = [each.name for each in missing() if each.group in groups]
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise RuntimeError(
            f"{tool} needs {names[0]}{more} from inside Keras, which Keras "
            f"{keras.__version__} does not have. It is known to work from Keras "
            f"{KNOWN[0]} to {KNOWN[-1]}: install one of these, or a newer keras_bn."
        )


def attributes(owner: str) -> tuple[str, ...]:
    """The private attributes of a class of Keras in `NAMES`."""
    names = [private.name.split(".") for private in NAMES]
    return tuple(name[1] for name in names if name[0] == owner and len(name) == 2)


@functools.cache
def missing() -> tuple[Private, ...]:
    """The names that the installed Keras does not have."""
    examples = _examples()
    return tuple(each for each in NAMES if not _is_there(each, examples))


def _is_there(private, examples):
    owner, _, attribute = private.name.rpartition(".")
    if not owner:
        return getattr(sys.modules[__name__], attribute) is not None
    example = examples[owner]
    if attribute == "_torch_params":
        return hasattr(type(example), "torch_params")
    return hasattr(example, attribute)


def _examples():
    """An object of each class whose attributes are used."""
    inputs = keras.Input((1,), name="inputs")
    layer = keras.layers.Identity(name="layer")
    functional = keras.Model(inputs, layer(inputs), name="functional")
    optimizer = keras.optimizers.SGD(name="optimizer")
    functional.compile(optimizer, "mse")
    sequential = keras.Sequential([inputs, layer], name="sequential")
    return {
        "Layer": layer,
        "Operation": layer,
        "KerasTensor": inputs,
        "Functional": functional,
        "Model": functional,
        "Sequential": sequential,
        "Variable": optimizer.iterations,
        "BatchNormalization": keras.layers.BatchNormalization,
        "Optimizer": optimizer,
    }
