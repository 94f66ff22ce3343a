"""Normalizing a batch with its own statistics, by the kernel of its plan."""

import functools
from collections.abc import Sequence

import keras
import tensorflow as tf

from keras_bn.backends import formulas, layout
from keras_bn.backends.plan import Plan
from keras_bn.backends.tensorflow import either, fused, synced
from keras_bn.backends.tensorflow.gradients import with_gradients
from keras_bn.moments import Moments, Tensor


def forward(
    x: Tensor,
    mask: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    *,
    epsilon: float,
    plan: Plan,
) -> tuple[Tensor, Moments]:
    """Normalize a batch with its own statistics; see the contract of the backends."""
    # Sums overflow or lose digits in half precision.
    wide = tf.cast(x, keras.backend.result_type(x.dtype.name, "float32"))
    lay = _layout(wide, plan)
    inner = lay.inner(wide)
    gamma = lay.parameter(gamma, 1.0, wide.dtype)
    beta = lay.parameter(beta, 0.0, wide.dtype)
    if plan.kernel == "fused":
        y, moments, saved = fused.forward(
            inner, gamma, beta, gpu=plan.gpu, epsilon=epsilon, layout=lay
        )
        backward = fused.backward
    elif plan.kernel == "either":
        y, moments, saved = either.forward(
            inner, gamma, beta, epsilon=epsilon, layout=lay
        )
        backward = either.backward
    else:
        merge = synced.merge if plan.synchronized else None
        total = synced.total if plan.synchronized else None
        mask = lay.mask(mask, inner)
        y, moments, saved = formulas.forward(
            inner, mask, gamma, beta, epsilon=epsilon, layout=lay, merge=merge
        )
        backward = functools.partial(formulas.backward, total=total)
    once = formulas.prevent_refusion if plan.once else lambda value, _: value
    y = once(y, inner)

    def vjp(upstream):
        dx, d_gamma, d_beta = backward(saved, upstream, epsilon=epsilon, layout=lay)
        return once(dx, upstream), d_gamma, d_beta

    y = with_gradients(y, [inner, gamma, beta], vjp)
    count, *others = (lay.statistic(value) for value in moments)
    moments = Moments(count, *(tf.stop_gradient(value) for value in others))
    return tf.cast(lay.outer(y, x), x.dtype), moments


def moments(x: Tensor, mask: Tensor | None, *, epsilon: float, plan: Plan) -> Moments:
    """The moments of a batch; see the contract of the backends."""
    if plan.kernel != "fused" or plan.gpu:
        return forward(x, mask, None, None, epsilon=epsilon, plan=plan)[1]
    x = tf.stop_gradient(tf.cast(x, tf.float32))
    lay = _layout(x, plan)
    found = fused.moments(lay.inner(x), epsilon=epsilon, layout=lay)
    return Moments(*map(lay.statistic, found))


def _layout(x, plan):
    last = plan.axes == (len(x.shape) - 1,)
    if plan.kernel == "fused" or (plan.kernel == "either" and not last):
        return layout.Images(x, plan.axes)
    return layout.layout_of(x, plan)


def standardize(
    x: Tensor, mean: Tensor, scale: Tensor, beta: Tensor, plan: Plan | None = None
) -> Tensor:
    """Normalize with given statistics; see the contract of the backends."""
    last = (len(x.shape) - 1,)
    if plan is None or plan.kernel != "fused" or plan.axes != last or plan.gpu:
        return x * scale + (beta - mean * scale)
    lay = layout.Images(x, plan.axes)
    return lay.outer(fused.inference_op(lay.inner(x), mean, scale, beta), x)


def assert_mask_shape(mask: Tensor, x: Tensor, along: Sequence[int]) -> Tensor:
    """The mask, checked when it runs to have the sizes of `x` along some axes.

    Raises:
        tf.errors.InvalidArgumentError: at run time, if they do not fit.
    """
    got, wanted = tf.shape(mask), tf.gather(tf.shape(x), along)
    fits = tf.reduce_all((got == wanted) | (got == 1))
    message = (
        f"The mask must have the sizes of the inputs along their axes {list(along)}. "
        "A mask that omits the channel axis needs a static shape. "
        "Received mask shape and input sizes:"
    )
    check = tf.debugging.Assert(fits, [message, got, wanted])
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(mask)
