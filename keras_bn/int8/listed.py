"""What `quantize_aware` cannot make integer, for where no converter can be asked."""

import keras

from keras_bn.int8.convert import refusal

# Classes of Keras's layers.
LAYERS = frozenset(
    """
    AdditiveAttention Attention Average AveragePooling3D Bidirectional Conv3D
    Conv3DTranspose ConvLSTM1D ConvLSTM2D ConvLSTM3D Discretization ELU Embedding GRU
    GroupNormalization LSTM LayerNormalization Masking MaxPooling3D MultiHeadAttention
    Normalization RMSNormalization Rescaling SimpleRNN UnitNormalization UpSampling3D
    """.split()  # noqa: SIM905 (a list would take thirty lines)
)
# Functions of `keras.activations` and `keras.ops`.
FUNCTIONS = frozenset(
    """
    all any arctan argmax ceil celu cos cosh cumsum elu erf expm1 floor hard_shrink
    hard_sigmoid log1p log_sigmoid logaddexp logsumexp mish negative round selu sign sin
    sinh softplus softsign sort sparse_plus sparse_sigmoid sparsemax square squareplus
    std tan var
    """.split()  # noqa: SIM905
)
_FUNCTIONS = {name.replace("_", "") for name in FUNCTIONS}


def check_listed(view):
    """Refuse a model of Keras's layers that the converter cannot make integer.

    What Keras does not have itself passes: only the converter knows.
    """
    refused: dict[str, None] = {}
    names = set()
    for node in view.calls:
        operation = node.operation
        activation = getattr(operation, "activation", None)
        path = f"'{view.path(operation) or operation.name}'"
        if _is_listed(operation):
            refused[path] = None
            names.add(type(operation).__name__)
        elif activation is not None and _is_listed(activation):
            alone = isinstance(operation, keras.layers.Activation)
            refused[path if alone else f"the activation of {path}"] = None
            names.add(activation.__name__)
    if refused:
        why = f"it has no integers for {', '.join(sorted(names))} in training"
        raise refusal(view.model, refused, why)


def _is_listed(function):
    """Whether an operation or an activation is Keras's own, and on a list."""
    kind = function if hasattr(function, "__name__") else type(function)
    if not kind.__module__.startswith("keras."):
        return False
    if isinstance(function, keras.layers.Layer):
        return kind.__name__ in LAYERS
    return kind.__name__.replace("_", "").lower() in _FUNCTIONS
