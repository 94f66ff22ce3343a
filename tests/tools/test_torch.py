"""from_torch and to_torch: the layer trains on as PyTorch would, and comes back."""

import keras
import numpy as np
import pytest

import keras_bn

torch = pytest.importorskip("torch")
nn = torch.nn
SHAPES = {
    "BatchNorm1d": (8, 3),
    "BatchNorm2d": (4, 3, 5, 6),
    "BatchNorm3d": (2, 3, 4, 5, 2),
    "SyncBatchNorm": (4, 3, 5, 6),
}


def module_of(name, dtype=torch.float64, **options):
    """A module that has been trained for some steps."""
    torch.manual_seed(0)
    module = getattr(nn, name)(3, dtype=dtype, **options)
    if module.affine:
        with torch.no_grad():
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_()
    with torch.no_grad():
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
        module.num_batches_tracked.fill_(5)
    return module


def batches(shape, n=4):
    rng = np.random.default_rng(0)
    return [rng.normal(rng.normal(), rng.uniform(1, 3), shape) for _ in range(n)]


def moved(x, axis):
    return np.moveaxis(x, 1, axis)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2}],
)
@pytest.mark.parametrize(
    "name", ["BatchNorm1d", "sequence", "BatchNorm2d", "BatchNorm3d"]
)
def test_training_goes_on_as_in_pytorch(name, options, axis):
    shape = (4, 3, 7) if name == "sequence" else SHAPES[name]
    module = module_of("BatchNorm1d" if name == "sequence" else name, **options)
    layer = keras_bn.from_torch(module, axis, rank=len(shape))
    assert layer.built
    assert layer.compute_dtype == "float64"
    rng = np.random.default_rng(1)
    learned = [w for w in (layer.gamma, layer.beta) if w is not None]
    for x in batches(shape):
        weight = rng.normal(size=shape)
        theirs = torch.tensor(x, requires_grad=True)
        expected = module(theirs)
        (expected * torch.tensor(weight)).sum().backward()
        ours = keras.ops.convert_to_tensor(moved(x, axis), "float64")
        y, gradients = _gradients(layer, ours, moved(weight, axis), learned)
        np.testing.assert_allclose(y, moved(expected.detach().numpy(), axis), atol=1e-9)
        wanted = [moved(theirs.grad.numpy(), axis)]
        wanted += [p.grad.numpy() for p in module.parameters()]
        for mine, other in zip(gradients, wanted, strict=True):
            np.testing.assert_allclose(mine, other, atol=1e-9)
        for variable, parameter in zip(learned, module.parameters(), strict=True):
            with torch.no_grad():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
            variable.assign(parameter.detach().numpy())
        np.testing.assert_allclose(layer.moving_mean.numpy(), module.running_mean)
        np.testing.assert_allclose(layer.moving_variance.numpy(), module.running_var)
    module.eval()
    x = batches(shape, 1)[0]
    expected = moved(module(torch.tensor(x)).detach().numpy(), axis)
    np.testing.assert_allclose(layer(moved(x, axis)), expected, atol=1e-9)


def _gradients(layer, x, weight, learned):
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
        loss = tf.reduce_sum(y * weight)
    gradients = tape.gradient(loss, [x, *[w.value for w in learned]])
    return y.numpy(), [gradient.numpy() for gradient in gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"momentum": None}])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_the_state_dict_is_equal(name, options, dtype):
    module = module_of(name, dtype=dtype, **options)
    layer = keras_bn.from_torch(module, axis=-1, rank=len(SHAPES[name]))
    assert layer.synchronized == (name == "SyncBatchNorm")
    again = keras_bn.to_torch(layer)
    assert type(again) is type(module)
    assert (again.eps, again.momentum) == (module.eps, module.momentum)
    before, after = module.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype
        assert torch.equal(value, after[key]), key


def test_batches_are_counted_on_with_a_plain_mean():
    layer = keras_bn.from_torch(module_of("BatchNorm1d", momentum=None))
    layer(batches((8, 3))[0], training=True)
    assert int(keras_bn.to_torch(layer).num_batches_tracked) == 6


def test_what_does_not_learn_there_does_not_here():
    module = module_of("BatchNorm2d")
    module.weight.requires_grad_(False)
    layer = keras_bn.from_torch(module)
    assert [w.name for w in layer.trainable_weights] == ["beta"]
    again = keras_bn.to_torch(layer)
    assert not again.weight.requires_grad
    assert again.bias.requires_grad


@pytest.mark.parametrize("missing", ["center", "scale"])
def test_pytorch_has_both_parameters_or_none(missing):
    layer = keras_bn.BatchNormalization(**{missing: False})
    layer.build((None, 3))
    layer.moving_mean.assign([1.0, 2.0, 3.0])
    module = keras_bn.to_torch(layer).eval()
    fixed = module.bias if missing == "center" else module.weight
    assert not fixed.requires_grad
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_allclose(
        layer(x), module(torch.tensor(x)).detach().numpy(), atol=1e-5
    )


def test_state_dicts():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), module_of("BatchNorm2d"))

    net = Net()
    layer = keras_bn.from_torch(net.state_dict(), -1, rank=4, prefix="block.1.")
    np.testing.assert_array_equal(layer.moving_mean.numpy(), net.block[1].running_mean)
    np.testing.assert_array_equal(layer.gamma.numpy(), net.block[1].weight.detach())
    assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)
    own = keras_bn.from_torch(net.block[1].state_dict(), rank=4, eps=0.1, momentum=0.2)
    assert (own.momentum, own.epsilon) == (0.8, 0.1)
    with pytest.raises(ValueError, match=r"no running statistics under 'block\.0\.'"):
        keras_bn.from_torch(net.state_dict(), rank=4, prefix="block.0.")
    with pytest.raises(ValueError, match="`rank` must be given for a state dict"):
        keras_bn.from_torch(net.block[1].state_dict())


def test_half_precision_modules():
    layer = keras_bn.from_torch(module_of("BatchNorm2d", dtype=torch.bfloat16))
    assert layer.moving_mean.dtype == "float32"


def test_refusals():
    with pytest.raises(ValueError, match="normalizes by the batch in evaluation"):
        keras_bn.from_torch(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(TypeError, match=r"batch normalization of torch\.nn"):
        keras_bn.from_torch(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="lazy"):
        keras_bn.from_torch(nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="`rank` must be given for SyncBatchNorm"):
        keras_bn.from_torch(nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="a module has them"):
        keras_bn.from_torch(nn.BatchNorm2d(3), eps=1e-3)
    with pytest.raises(TypeError, match=r"keras_bn\.BatchNormalization"):
        keras_bn.to_torch(keras.layers.BatchNormalization())
    with pytest.raises(ValueError, match="'norm' is not built"):
        keras_bn.to_torch(keras_bn.BatchNormalization(name="norm"))
    for options, shape in (
        ({"axis": [1, 2]}, (None, 3, 4)),
        ({"renorm": True}, (None, 3)),
        ({"virtual_batch_size": 4}, (None, 3)),
        ({"debias": True}, (None, 3)),
        ({"freeze_statistics": True}, (None, 3)),
    ):
        layer = keras_bn.BatchNormalization(**options, name="norm")
        layer.build(shape)
        (name,) = options
        with pytest.raises(ValueError, match=f"no equivalent of {name}=.*'norm'"):
            keras_bn.to_torch(layer)
