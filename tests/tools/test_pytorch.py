"""from_torch and to_torch: the layer trains on as PyTorch would, and comes back."""

import inspect

import keras
import numpy as np
import pytest
from support.backend import array, training_step
from support.marks import slow

import keras_bn

torch = pytest.importorskip("torch")
nn = torch.nn
# From PyTorch 2.13 on, a normalization may be without a bias.
HAS_BIAS = "bias" in inspect.signature(nn.BatchNorm2d).parameters
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


@pytest.mark.parametrize("axis", [1, slow(-1)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"affine": False}),
        {"momentum": None},
        slow({"momentum": 0.3, "eps": 1e-2}),
    ],
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
    np.testing.assert_allclose(array(layer(moved(x, axis))), expected, atol=1e-9)


def _gradients(layer, x, weight, learned):
    others = layer.non_trainable_variables
    step = training_step(
        lambda x: layer(x, training=True), [*learned, *others], "eager"
    )
    y, gradients = step(x, keras.ops.convert_to_tensor(weight))
    return array(y), [array(gradient) for gradient in gradients]


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


@pytest.mark.skipif(not HAS_BIAS, reason="this PyTorch has no such argument")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", SHAPES)
def test_there_and_back_without_a_bias(name, momentum, frozen):
    module = getattr(nn, name)(3, bias=False, momentum=momentum)
    with torch.no_grad():
        module.weight.uniform_(0.5, 1.5)
        module.running_mean.normal_()
    module.weight.requires_grad_(not frozen)
    layer = keras_bn.from_torch(module, rank=len(SHAPES[name]))
    assert layer.beta is None
    again = keras_bn.to_torch(layer)
    before, after = module.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert again.weight.requires_grad is not frozen


class FrozenBatchNorm2d(nn.Module):
    """As torchvision defines it."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias


class OfDetr(FrozenBatchNorm2d):
    """Its epsilon stands in its `forward`; as in DETR's code."""

    def __init__(self, num_features):
        super().__init__(num_features)
        del self.eps

    def forward(self, x):
        self.eps = 1e-5
        try:
            return super().forward(x)
        finally:
            del self.eps


class OfDetectron(FrozenBatchNorm2d):
    """It counts, and computes by `F.batch_norm`; as in detectron2."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.register_buffer("num_batches_tracked", torch.tensor(7))

    def forward(self, x):
        return nn.functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=False,
            eps=self.eps,
        )


class OfVideo(FrozenBatchNorm2d):
    """For inputs of five axes."""

    def forward(self, x):
        return super().forward(x.flatten(2, 3)).reshape(x.shape)


def frozen_module(kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    module = kind(3, **options)
    module.weight.uniform_(0.5, 1.5)
    module.bias.normal_()
    module.running_mean.normal_(3.0)
    module.running_var.uniform_(0.5, 2.0)
    return module.to(dtype)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    ("kind", "options", "rank"),
    [
        (FrozenBatchNorm2d, {}, None),
        (FrozenBatchNorm2d, {"eps": 0.1}, None),
        (OfDetr, {}, None),
        (OfDetectron, {}, None),
        (OfVideo, {}, 5),
    ],
)
def test_a_frozen_module_gives_a_frozen_layer(kind, options, rank, axis):
    module = frozen_module(kind, **options)
    layer = keras_bn.from_torch(module, axis, rank=rank)
    assert layer.freeze_statistics
    assert layer.freeze_affine is True
    assert layer.trainable_variables == []
    shape = SHAPES["BatchNorm2d" if rank is None else "BatchNorm3d"]
    x = batches(shape, 1)[0].astype("float32")
    expected = moved(module(torch.tensor(x)).numpy(), axis)
    for training in True, False:
        y = layer(array(moved(x, axis)), training=training)
        y = keras.ops.convert_to_numpy(y)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(layer.moving_mean, module.running_mean)


def test_frozen_modules_of_other_precisions():
    for dtype in torch.float64, torch.float16, torch.bfloat16:
        layer = keras_bn.from_torch(frozen_module(FrozenBatchNorm2d, dtype))
        assert layer.freeze_statistics


def test_the_state_dict_of_a_frozen_module():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), frozen_module(FrozenBatchNorm2d))
    layer = keras_bn.from_torch(net.state_dict(), rank=4, prefix="1.")
    assert layer.freeze_statistics
    assert layer.freeze_affine is True
    trained = keras_bn.from_torch(net.state_dict(), rank=4, prefix="1.", momentum=0.1)
    assert not trained.freeze_statistics
    assert not trained.freeze_affine
    assert keras_bn.unfreeze(layer, affine=True)
    assert len(layer.trainable_variables) == 2


def test_a_frozen_module_that_computes_something_else_is_refused():
    class Rectified(FrozenBatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    class WithoutEpsilon(OfDetr):
        def forward(self, x):
            self.eps = 0.3
            try:
                return FrozenBatchNorm2d.forward(self, x)
            finally:
                del self.eps

    with pytest.raises(ValueError, match="Rectified does not compute"):
        keras_bn.from_torch(frozen_module(Rectified))
    with pytest.raises(ValueError, match="pass `eps`"):
        keras_bn.from_torch(frozen_module(WithoutEpsilon))
    assert keras_bn.from_torch(frozen_module(WithoutEpsilon), eps=0.3).epsilon == 0.3


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
    if missing == "center" and HAS_BIAS:
        assert module.bias is None
    else:
        fixed = module.bias if missing == "center" else module.weight
        assert not fixed.requires_grad
    x = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    np.testing.assert_allclose(
        array(layer(x)), module(torch.tensor(x)).detach().numpy(), atol=1e-5
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
    with pytest.raises(ValueError, match="`rank` must be given for a state dict"):
        keras_bn.from_torch(net.block[1].state_dict())


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("block.0.", r"under the prefix 'block\.0\.'.*under \['block\.1\.'"),
        ("block.1", r"under the prefix 'block\.1'.*\['block\.1\.'"),
        ("module.block.1.", r"under the prefix 'module\.block\.1\.'.*\['block\.1\.'"),
        ("blok.1.", r"\['block\.1\.'"),
        ("", r"without a prefix.*\['block\.1\.', 'last\.'\]"),
        ("elsewhere", r"'elsewhere'.*\['block\.1\.', 'last\.'\]"),
    ],
)
def test_a_wrong_prefix_is_told_the_near_ones(prefix, said):
    net = nn.Sequential()
    net.block = nn.Sequential(nn.Conv2d(3, 3, 1), module_of("BatchNorm2d"))
    net.last = module_of("BatchNorm1d")
    with pytest.raises(ValueError, match=said) as error:
        keras_bn.from_torch(net.state_dict(), rank=4, prefix=prefix)
    assert "evaluation" not in str(error.value)


def test_of_many_prefixes_the_nearest_are_named():
    names = [f"stage{i}.norm{j}." for i in range(9) for j in range(9)]
    state = {f"{name}running_mean": torch.zeros(3) for name in names}
    with pytest.raises(ValueError, match=r"'stage7\.norm3\.'.*the nearest of 81"):
        keras_bn.from_torch(state, rank=2, prefix="stage7.norms3.")


@pytest.mark.parametrize(
    "state",
    [
        {"state_dict": module_of("BatchNorm2d").state_dict(), "epoch": 3},
        nn.BatchNorm2d(3, track_running_stats=False).state_dict(),
        nn.Linear(3, 3).state_dict(),
        {},
    ],
    ids=["checkpoint", "without statistics", "linear", "empty"],
)
def test_a_state_dict_without_any_statistics(state):
    with pytest.raises(ValueError, match="no running statistics without a prefix, nor"):
        keras_bn.from_torch(state, rank=4)


@pytest.mark.parametrize(
    ("rank", "axis", "said"),
    [
        (2, 3, r"`axis` must be between -2 and 1.*axis=3"),
        (2, -3, r"`axis` must be between -2 and 1.*axis=-3"),
        (4, 4, r"`axis` must be between -4 and 3.*axis=4"),
        (1, 0, "rank 2 or more"),
        (4, [1], "one axis"),
        (4, 1.5, "`axis` must be an int"),
        ("2", 1, "`rank` must be an int"),
    ],
)
def test_axes_that_there_are_not(rank, axis, said):
    with pytest.raises(ValueError, match=said):
        keras_bn.from_torch(module_of("BatchNorm2d"), axis, rank=rank)


class Activated(nn.BatchNorm2d):
    """What timm and others do: the activation in the normalization."""

    def forward(self, x):
        return torch.relu(super().forward(x))


class Called(nn.BatchNorm1d):
    def __call__(self, x):
        return 2 * super().__call__(x)


class ActivatedSync(nn.SyncBatchNorm):
    def forward(self, x):
        return torch.relu(super().forward(x))


def hooked():
    module = module_of("BatchNorm2d")
    module.register_forward_hook(lambda module, x, y: torch.relu(y))
    return module


def patched():
    module = module_of("BatchNorm2d")
    module.forward = lambda x: torch.relu(nn.BatchNorm2d.forward(module, x))
    return module


def parametrized():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = module_of("BatchNorm2d")
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    return module


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Activated(3), "Activated has a `forward` of its own"),
        (lambda: Called(3), "Called has a `__call__` of its own"),
        (lambda: ActivatedSync(3), "ActivatedSync has a `forward` of its own"),
        (hooked, "BatchNorm2d has forward hooks"),
        (patched, "BatchNorm2d has a `forward` of its own"),
        (parametrized, "has parametrizations"),
    ],
)
def test_a_module_that_computes_something_else_is_refused_by_name(make, said):
    with pytest.raises(ValueError, match=said):
        keras_bn.from_torch(make(), rank=4)


def test_the_state_dict_of_a_parametrized_module_is_refused():
    with pytest.raises(ValueError, match="remove_parametrizations"):
        keras_bn.from_torch(parametrized().state_dict(), rank=4)


class Plain(nn.BatchNorm2d):
    """A subclass with defaults of its own."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-2, momentum=0.3)


class FourDimensional(nn.modules.batchnorm._BatchNorm):
    def _check_input_dim(self, x):
        assert x.dim() == 4


@pytest.mark.parametrize("kind", [Plain, FourDimensional, nn.SyncBatchNorm])
def test_a_module_without_a_forward_of_its_own_is_converted(kind):
    module = kind(3).eval()
    with torch.no_grad():
        module.running_mean.normal_()
        module.running_var.uniform_(0.5, 2.0)
    rank = None if kind is Plain else 4
    layer = keras_bn.from_torch(module, rank=rank)
    x = batches((2, 3, 4, 4))[0].astype("float32")
    want = module(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(array(layer(x)), want, atol=1e-5)


class ActivatedLayer(keras_bn.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return keras.ops.relu(super().call(inputs, training=training, mask=mask))


class PlainLayer(keras_bn.BatchNormalization):
    def __init__(self, epsilon=1e-2, **kwargs):
        super().__init__(epsilon=epsilon, **kwargs)


def test_subclasses_of_the_layer():
    own, plain = ActivatedLayer(name="norm"), PlainLayer()
    for layer in (own, plain):
        layer.build((None, 3))
    with pytest.raises(ValueError, match=r"ActivatedLayer has a `call`.*'norm'"):
        keras_bn.to_torch(own)
    assert keras_bn.to_torch(plain).eps == 1e-2


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_what_does_not_learn_there_goes_on_not_to(frozen, tmp_path):
    module = module_of("BatchNorm2d", torch.float32)
    for name in frozen:
        getattr(module, name).requires_grad_(False)
    layer = keras_bn.from_torch(module)
    model = keras.Sequential([keras.Input((3, 5, 5)), layer])
    model.trainable = True
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras").layers[0]
    for each in (layer, again):
        back = keras_bn.to_torch(each)
        fixed = {n for n, p in back.named_parameters() if not p.requires_grad}
        assert fixed == set(frozen)


def test_half_precision_modules():
    layer = keras_bn.from_torch(module_of("BatchNorm2d", dtype=torch.bfloat16))
    assert layer.moving_mean.dtype == "float32"


@pytest.mark.parametrize("affine", [True, False])
def test_a_module_without_running_statistics(affine):
    module = nn.BatchNorm2d(3, affine=affine, track_running_stats=False).eval()
    if affine:
        nn.init.normal_(module.weight)
        nn.init.normal_(module.bias)
    layer = keras_bn.from_torch(module)
    assert layer.adapt_prior == 0
    x = np.random.default_rng(0).normal(2.0, 3.0, (6, 3, 4, 4)).astype("float32")
    expected = module(torch.as_tensor(x)).detach().numpy()
    np.testing.assert_allclose(array(layer(x)), expected, rtol=1e-4, atol=1e-5)
    again = keras_bn.to_torch(layer)
    assert not again.track_running_stats
    assert again.state_dict().keys() == module.state_dict().keys()


def test_refusals():
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
