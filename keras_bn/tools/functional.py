"""A Functional model of the layers of a subclassed one."""

from typing import Any

import keras

from keras_bn.surgery import functional as surgery
from keras_bn.surgery.graph import graph_of
from keras_bn.surgery.private import require
from keras_bn.surgery.view import ModelView


def functional(model: keras.Model, inputs: Any = None) -> keras.Model:
    """A Functional model of the same layers and variables, with the same outputs.

    Its graph shows every call of a layer, so all tools work on it that need one. This
    calls the model on symbolic tensors. A layer of your own that holds layers is opened
    by its `call`: the layers in it become layers of the graph. It stays one layer,
    which computes the same, where it has variables of its own, a `compute_mask`, an
    activity regularizer or inputs with a mask, calls `add_loss`, branches on values or
    on `training`, computes outside of layers and `keras.ops`, or with the batch size
    other than in a reshape that could infer it. Layers of Keras stay as they are.

    The model and the result train each other's variables. What else its class has, such
    as a training step or a compilation, does not come along. `fit` passes `training` to
    the layers of the result also where the `call` of the class has no such argument.

    Args:
        model: a built model.
        inputs: what its `call` takes first: a `keras.Input`, or a list or dict of such.
            By default they have the shapes that the model was built with, of any batch
            size, and the default float dtype. Give them for integers, or for other
            shapes.

    Returns:
        A Functional model. It takes the first argument of `call`; a list of all, where
        the model was built with several. A model that is a graph to any depth is
        returned itself.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: if it is not built, or no graph can compute what it does: the
            sentence names the line, or the reason.

    Example:

    >>> import keras, keras_bn, numpy as np
    >>> class Net(keras.Model):
    ...     def __init__(self):
    ...         super().__init__(name="net")
    ...         self.dense = keras.layers.Dense(3, name="dense")
    ...         self.norm = keras_bn.BatchNormalization(name="norm")
    ...     def call(self, inputs):
    ...         return self.norm(self.dense(inputs))
    >>> model = Net()
    >>> y = model(np.ones((2, 4), "float32"))
    >>> [layer.name for layer in keras_bn.functional(model).layers[1:]]
    ['dense', 'norm']
    """
    require("keras_bn.functional", "layers", "graph")
    view = ModelView(model)
    view.check_built()
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"`model` must be a Keras model. Received: a {type(model).__name__}"
        )
    if inputs is None and graph_of(model) is not None and surgery.is_open(view):
        return model
    return surgery.functional(model, inputs)
