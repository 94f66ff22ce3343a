"""Batch normalization in plain float64 NumPy, from the paper's formulas.

Knows nothing of the package. Slow, short and literal on purpose: each function says
one formula. `axes` are the channel axes, ascending; statistics have the sizes of `x`
along them. All of it is analytic (squares, never absolute values), so that it can be
differentiated by complex steps.
"""

import numpy as np


def _rows(x, axes):
    """`x` as a matrix (rows, channels), channels in the order of the input."""
    x = np.asarray(x)
    x = x if np.iscomplexobj(x) else x.astype(np.float64)
    last = range(x.ndim - len(axes), x.ndim)
    return np.moveaxis(x, axes, last).reshape(
        -1, int(np.prod([x.shape[a] for a in axes]))
    )


def _unrows(rows, shape, axes):
    rest = [n for a, n in enumerate(shape) if a not in axes]
    along = [shape[a] for a in axes]
    last = range(len(shape) - len(axes), len(shape))
    return np.moveaxis(rows.reshape(rest + along), last, axes)


def _counted(mask, x, axes):
    """Which rows count, as a bool vector."""
    rest = [n for a, n in enumerate(np.shape(x)) if a not in axes]
    if mask is None:
        return np.ones(int(np.prod(rest)), bool)
    return np.broadcast_to(np.asarray(mask).astype(bool), rest).reshape(-1)


def moments(x, axes, mask=None):
    """`(count, mean, population variance)` of the elements that the mask counts."""
    along = [np.shape(x)[a] for a in axes]
    rows = _rows(x, axes)[_counted(mask, x, axes)]
    mean = rows.mean(0)
    variance = ((rows - mean) ** 2).mean(0)
    return len(rows), mean.reshape(along), variance.reshape(along)


def normalize(x, mean, variance, gamma, beta, axes, epsilon):
    """gamma (x − mean) / sqrt(variance + epsilon) + beta."""
    mean, variance, gamma, beta = (
        np.reshape(v, -1) for v in (mean, variance, gamma, beta)
    )
    rows = gamma * (_rows(x, axes) - mean) / np.sqrt(variance + epsilon) + beta
    return _unrows(rows, np.shape(x), axes)


def forward(x, gamma, beta, axes, epsilon, mask=None):
    """The output of a training step."""
    _, mean, variance = moments(x, axes, mask)
    return normalize(x, mean, variance, gamma, beta, axes, epsilon)


def backward(x, gamma, axes, epsilon, upstream, mask=None):
    """Gradients of sum(upstream * forward) with respect to x, gamma and beta."""
    along = [np.shape(x)[a] for a in axes]
    counted = _counted(mask, x, axes)[:, None]
    n, mean, variance = moments(x, axes, mask)
    g, gamma = _rows(upstream, axes), np.reshape(gamma, -1)
    std = np.sqrt(variance.reshape(-1) + epsilon)
    normalized = (_rows(x, axes) - mean.reshape(-1)) / std
    d_beta, d_gamma = g.sum(0), (g * normalized).sum(0)
    through_statistics = (d_beta + normalized * d_gamma) / n
    dx = gamma / std * (g - np.where(counted, through_statistics, 0))
    return _unrows(dx, np.shape(x), axes), d_gamma.reshape(along), d_beta.reshape(along)


def gradient(function, x, step=1e-30):
    """The gradient of an analytic scalar function, exact to rounding.

    Source: Squire and Trapp, "Using Complex Variables to Estimate Derivatives of Real
    Functions", 1998: f(x + ih) has imaginary part h f'(x), with nothing to cancel.
    """
    x = np.asarray(x, np.complex128)
    result = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        nudged = x.copy()
        nudged[index] += 1j * step
        result[index] = np.imag(function(nudged)) / step
    return result


def moving(old, new, momentum):
    """The exponential moving statistic."""
    return np.asarray(old, np.float64) * momentum + np.asarray(new) * (1 - momentum)
