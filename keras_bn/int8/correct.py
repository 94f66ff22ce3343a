r"""Kernels and biases whose rounding errors make up for each other on samples.

Rounding moves the weights of an output channel by $e$, and its output by $x^\top e$: on
samples by $e^\top H e$, where $H = LL^\top$ is the covariance of the inputs. Of
$L^\top e$, part $i$ is $L_{ii} e_i + \sum_{j>i} L_{ji} e_j$. So the last weight is
rounded first, and each before it makes up for what the later ones lost. The mean is
taken from the bias. Layers are rounded in order, each on the inputs $\hat x$ that the
rounded ones before it give, after a fit of $\hat x^\top \hat w$ to $x^\top w$.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
Pre-trained Transformers", 2023. Biases: Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", 2019, section 4.2.
"""

import math

import numpy as np
from keras import layers, ops

from keras_bn.int8.samples import joined
from keras_bn.surgery.calls import run
from keras_bn.surgery.norms import is_normalization
from keras_bn.tools.linear import call_with, is_linear, linear

# What is added to the covariance, in mean variances of the inputs, as a few samples say
# little of some directions: for the rounding, and for the fit, which follows them more.
_RIDGE, _FIT_RIDGE = 0.1, 1.0
# Rows that a covariance rests on.
_ROWS = 2048
# Values that are kept at once: of all layers, and of the inputs of one.
_KEPT, _SEEN = 2**27, 2**24


def correct(view, of, samples, exact=frozenset()):
    """Round the kernels of a copy of a model, and correct its biases, in place.

    `view` is that of the model, `of` gives the copy of a layer, and layers with a path
    in `exact` stay as they are.

    Returns:
        The paths of the layers whose bias, a value for each channel, was corrected.
    """
    done: dict[str, bool] = {}

    def around(call, compute):
        layer, path = call.operation, view.path(call.operation)
        both = compute.args[0] if compute.args else compute.keywords.get("inputs")
        kept = path in exact or not is_linear(layer) or is_normalization(layer)
        if kept or both.shape[0] % len(twice[0]):  # of constants
            return compute()
        x, x_rounded = ops.split(both, 2)  # in floats, and after what is rounded
        if path not in done:
            done[path] = _correct(layer, of(layer), x, x_rounded)
        return ops.concatenate([layer(x), of(layer)(x_rounded)])

    shapes = [tensor.shape[1:] for node in view.calls for tensor in node.outputs]
    size = sum(math.prod(filter(None, shape)) for shape in shapes) * len(samples[0][0])
    twice = joined(2 * samples[: max(16, _KEPT // (2 * size))])
    run(view.model, twice, around)
    return [path for path, _ in view.layers if done.get(path)]


def _correct(layer, copy, x, x_rounded):
    """Round the kernels of a copy of a layer; whether its bias was corrected."""
    edit = linear(layer, len(x.shape))
    before, rounded = dict(edit.arrays), edit.arrays
    for place, name in enumerate(edit.names):
        matrix, back = edit.as_matrix(name, before[name].astype("float32"))
        seen = [np.zeros((1, 1, len(matrix)), "float32")] * 2  # each weight by itself
        if not isinstance(layer, layers.EinsumDense):
            seen = [
                _seen(edit, name, {n: arrays[n] for n in edit.names[:place]}, values)
                for arrays, values in ((before, x), (rounded, x_rounded))
            ]
        grouped = matrix.reshape(len(matrix), len(seen[0]), -1).swapaxes(0, 1)
        fitted = _fitted(grouped, *seen).swapaxes(0, 1)
        rounded[name] = back(fitted.reshape(matrix.shape))
    edit.write(copy)
    if corrects := before["bias"].ndim == 1:
        y = call_with(layer, {"activation": None}, x)
        y_rounded = call_with(copy, {"activation": None}, x_rounded)
        axis = edit.channel_axis(len(y.shape))
        axes = [i for i in range(len(y.shape)) if i != axis]
        copy.bias.assign_add(ops.mean(y, axes) - ops.mean(y_rounded, axes))
    return corrects


def _seen(edit, name, before, x):
    """Some rows of what weights are multiplied by, `(groups, rows, weights)`."""
    kernels, groups = edit.unit_kernels(name)
    size = len(edit.as_matrix(name, edit.arrays[name])[0])
    plain = {"activation": None, "use_bias": False, "bias": None}
    kernels = {n: ops.cast(k, "float32") for n, k in (before | kernels).items()}
    rows = -(-_ROWS // len(x))
    step = max(1, _SEEN // (math.prod(x.shape[1:-1]) * size * groups))
    parts, rng = [], np.random.default_rng(0)
    for at in range(0, len(x), step):
        part = call_with(edit.layer, kernels | plain, x[at : at + step])
        part = ops.moveaxis(part, edit.channel_axis(len(part.shape)), -1)
        part = ops.convert_to_numpy(part).reshape(len(part), -1, groups, size)
        chosen = rng.permutation(part.shape[1])[:rows]
        parts.append(part[:, chosen].reshape(-1, groups, size))
    return np.ascontiguousarray(np.concatenate(parts).swapaxes(0, 1))


def _fitted(weights, x, x_rounded):
    """Rounded weights of shape `(groups, weights, channels)`, from what is `_seen`."""
    x, x_rounded = (rows - rows.mean(1, keepdims=True) for rows in (x, x_rounded))
    transposed = x_rounded.swapaxes(1, 2) / x.shape[1]
    covariance, both = (
        ops.convert_to_numpy(ops.matmul(transposed, rows)) for rows in (x_rounded, x)
    )
    variance = np.trace(covariance, axis1=1, axis2=2)[:, None, None] / x.shape[2]
    ridge = np.where(variance > 0, variance, 1) * np.eye(x.shape[2], dtype="float32")
    change = (both - covariance) @ weights
    weights = weights + np.linalg.solve(covariance + _FIT_RIDGE * ridge, change)
    scale = np.abs(weights).max(1, keepdims=True) / 127
    scale = np.where(scale > 0, scale, 1.0)
    return round_together(weights / scale, covariance + _RIDGE * ridge) * scale


def round_together(weights, covariance):
    """Round weights to whole numbers, so that errors make up for each other.

    Args:
        weights: of shape `(groups, weights, channels)`, of at most 127. Those that are
            nearest to 127 stay so, as the scale of the channel rests on them.
        covariance: of their inputs, of shape `(groups, weights, weights)`.
    """
    order = np.argsort(np.diagonal(covariance, axis1=1, axis2=2), 1)
    pairs = np.take_along_axis(covariance, order[:, :, None], 1)
    factor = np.linalg.cholesky(np.take_along_axis(pairs, order[:, None], 2))
    factor = factor.swapaxes(1, 2).copy()  # rows are read below, at once in memory
    weights = np.take_along_axis(weights, order[:, :, None], 1)
    errors = np.zeros_like(weights)
    for i in reversed(range(weights.shape[1])):
        weight, part = weights[:, i], factor[:, i, None, i + 1 :]
        others = (part @ errors[:, i + 1 :])[:, 0] / factor[:, i, i, None]
        whole = np.rint(weight - others).clip(-127, 127)
        whole = np.where(np.abs(weight) > 126.5, np.rint(weight), whole)
        errors[:, i] = whole - weight
    back = np.argsort(order, 1)[:, :, None]
    return np.take_along_axis(weights + errors, back, 1)
