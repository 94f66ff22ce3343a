"""On PyTorch, `torch.compile` takes a training step in one graph."""

import numpy as np
import pytest
from support import backend
from support.backend import array
from support.steps import Step, set_parameters

import keras_bn

pytestmark = backend.only("torch", "its compiler")

SHAPE = (16, 5, 3)
OPTIONS = [
    {},
    {"axis": 1},
    {"virtual_batch_size": 4},
    {"renorm": True, "renorm_clipping": {"rmax": 1.1, "rmin": 0.5, "dmax": 0.2}},
    {"unbiased": True, "debias": True},
    {"freeze_statistics": True},
]


def made(**options):
    """A layer with gamma and beta that do something."""
    layer = keras_bn.BatchNormalization(momentum=0.9, **options)
    layer.build(SHAPE)
    rng = np.random.default_rng(1)
    shape = layer.gamma.shape
    set_parameters(layer, rng.uniform(0.5, 1.5, shape), rng.normal(size=shape))
    return layer


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_step_is_one_graph(options, masked):
    import torch

    rng = np.random.default_rng(0)
    x, upstream = rng.normal(3, 2, SHAPE), rng.normal(size=SHAPE)
    mask = backend.tensor(rng.random(SHAPE[:2]) < 0.7) if masked else None
    want = Step(made(**options), mask=mask)(x, upstream)
    layer = made(**options)
    torch._dynamo.reset()
    # It traces the backward pass too, and needs no compiler for C++.
    compiled = torch.compile(
        lambda x: layer(x, training=True, mask=mask),
        fullgraph=True,
        backend="aot_eager",
    )
    step = Step(layer)
    step.run = backend.training_step(compiled, step.variables(), "eager")
    got = step(x, upstream)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-5)
    if not options.get("freeze_statistics"):
        assert np.abs(got["moving_mean"]).min() > 0


def test_inference_is_one_graph():
    import torch

    layer = made()
    x = backend.tensor(np.random.default_rng(0).normal(size=SHAPE).astype("float32"))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    np.testing.assert_allclose(array(compiled(x)), array(layer(x)), rtol=1e-6)
