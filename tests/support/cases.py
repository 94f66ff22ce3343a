"""Random cases of a training step, and what must hold of each.

`tests/layer/test_properties.py` draws them with Hypothesis; `tests/fuzz.py` for as long
as it is told to.
"""

import itertools
from typing import NamedTuple

import numpy as np
import oracle

import keras_bn
from support.steps import Step, oracle_step, set_parameters


class Case(NamedTuple):
    """A shape, a layer, a mask and a mode; the values follow from the seed."""

    shape: tuple
    axis: int
    mask: float | None  # the share that counts
    offset: float
    mode: str
    options: dict
    seed: int

    @property
    def axes(self):
        return (self.axis % len(self.shape),)

    def means_the_leading_axes(self, sizes):
        """Whether a mask of these sizes, meant otherwise, is taken for theirs."""
        last = self.axes == (len(self.shape) - 1,)
        pairs = zip(sizes, self.shape[:-1], strict=True)
        return not last and all(size in (1, whole) for size, whole in pairs)

    def values(self):
        """`(x, upstream, gamma, beta, mask)`, the last None without one."""
        rng = np.random.default_rng(self.seed)
        channels = self.shape[self.axis]
        x = rng.normal(self.offset, rng.uniform(0.5, 3), self.shape)
        gamma, beta = rng.normal(1, 0.5, channels), rng.normal(size=channels)
        mask = None
        rest = [n for a, n in enumerate(self.shape) if a not in self.axes]
        if self.mask is not None and not self.means_the_leading_axes(rest):
            mask = rng.random(rest) < self.mask
        return x, rng.normal(size=self.shape), gamma, beta, mask

    def layer(self, gamma, beta):
        layer = keras_bn.BatchNormalization(
            axis=self.axis, dtype="float64", **self.options
        )
        layer.build((None, *self.shape[1:]) if self.axes != (0,) else self.shape)
        set_parameters(layer, gamma, beta)
        return layer


def groups(n, size):
    """Slices of the ghost groups, in order: the definition, written out."""
    count = max(1, n // size)
    bounds = [*(i * size for i in range(count)), n]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


def expected(case, layer):
    """The oracle's step, group by group where there are ghost batches."""
    x, upstream, gamma, beta, mask = case.values()
    size = layer.virtual_batch_size
    cuts = [slice(None)] if size is None else groups(len(x), size)
    results, mean, variance = [], 0.0, 1.0
    for cut in cuts:
        part = None if mask is None else mask[cut]
        empty = x[cut].size == 0 or (part is not None and not part.any())
        if empty:
            results.append(None)
            continue
        step = oracle_step(layer, x[cut], upstream[cut], case.axes, gamma, beta, part)
        results.append(step)
        count, batch_mean, batch_variance = oracle.moments(x[cut], case.axes, part)
        mean = oracle.moving(mean, batch_mean, layer.momentum)
        if layer.unbiased:
            if count == 1:
                continue
            batch_variance = batch_variance * count / (count - 1)
        variance = oracle.moving(variance, batch_variance, layer.momentum)
    return cuts, results, mean, variance


def check(case):
    """Assert that the layer's step is the oracle's, where that has one."""
    x, upstream, gamma, beta, mask = case.values()
    layer = case.layer(gamma, beta)
    got = Step(layer, case.mode, mask)(x, upstream)
    cuts, results, mean, variance = expected(case, layer)
    tolerance = 1e-9 * (1 + abs(case.offset))
    shape = got["moving_mean"].shape
    for name, want in (("moving_mean", mean), ("moving_variance", variance)):
        np.testing.assert_allclose(
            got[name], np.broadcast_to(want, shape), rtol=tolerance, atol=tolerance
        )
    for cut, want in zip(cuts, results, strict=True):
        if want is None:
            assert np.isfinite(got["y"][cut]).all()
            continue
        for name in ("y", "dx"):
            scale = max(1.0, np.max(np.abs(want[name])))
            np.testing.assert_allclose(
                got[name][cut], want[name], rtol=tolerance, atol=tolerance * scale
            )
    if all(want is not None for want in results):
        for name in ("d_gamma", "d_beta"):
            total = np.sum([want[name] for want in results], axis=0)
            scale = max(1.0, np.max(np.abs(total)))
            np.testing.assert_allclose(
                got[name], total, rtol=tolerance, atol=tolerance * scale
            )
