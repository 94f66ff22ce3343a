"""The oracle against itself: its gradients are those of its forward pass."""

import numpy as np
import oracle
import pytest


@pytest.mark.parametrize(
    ("shape", "axes"), [((5, 3), (1,)), ((2, 3, 4), (1,)), ((3, 2, 3), (1, 2))]
)
@pytest.mark.parametrize("masked", [False, True])
def test_backward_is_the_derivative_of_forward(shape, axes, masked):
    rng = np.random.default_rng(0)
    along = [shape[a] for a in axes]
    x, upstream = rng.normal(2, 3, shape), rng.normal(size=shape)
    gamma, beta = rng.normal(size=along), rng.normal(size=along)
    rest = [n for a, n in enumerate(shape) if a not in axes]
    mask = rng.random(rest) < 0.7 if masked else None

    def loss(x, gamma, beta):
        return (upstream * oracle.forward(x, gamma, beta, axes, 1e-3, mask)).sum()

    grads = oracle.backward(x, gamma, axes, 1e-3, upstream, mask)
    expected = (
        oracle.gradient(lambda v: loss(v, gamma, beta), x),
        oracle.gradient(lambda v: loss(x, v, beta), gamma),
        oracle.gradient(lambda v: loss(x, gamma, v), beta),
    )
    for got, want in zip(grads, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_moments_are_numpys():
    x = np.random.default_rng(1).normal(size=(4, 3, 2))
    count, mean, variance = oracle.moments(x, (1,))
    assert count == 8
    np.testing.assert_allclose(mean, x.mean((0, 2)), rtol=1e-14)
    np.testing.assert_allclose(variance, x.var((0, 2)), rtol=1e-14)


def test_oracle_does_not_know_the_package():
    with open(oracle.__file__) as source:
        lines = [line for line in source if line.startswith(("import", "from"))]
    assert lines == ["import numpy as np\n"]
