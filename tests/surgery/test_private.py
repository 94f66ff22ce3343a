"""Every private name of Keras: it is there, and does what is relied on."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from support import renamed_keras

import keras_bn
from keras_bn.surgery import private
from keras_bn.surgery.copying import copy_model
from keras_bn.surgery.data import Source
from keras_bn.surgery.norms import is_keras

CHECKS = {}


def shows(*names):
    """Register a check of what is relied on."""

    def register(check):
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return register


def functional():
    """A model with two inputs that calls a layer twice: `add(dense(a), dense(b))`."""
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    dense, add = keras.layers.Dense(4, name="dense"), keras.layers.Add(name="add")
    return keras.Model({"b": b, "a": a}, add([dense(a), dense(b)]))


@shows("Layer._layers")
def sublayers_come_in_the_order_of_the_weights():
    class Block(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.parts = [keras.layers.Dense(2, name="one")]
            self.last = keras.layers.TimeDistributed(keras.layers.Dense(2, name="two"))

    block = Block()
    assert [layer.name for layer in block._layers] == ["one", block.last.name]
    assert [layer.name for layer in block.last._layers] == ["two"]


@shows("get_keras_mask")
def a_tensor_carries_a_mask():
    tokens = keras.Input((3,))
    assert private.get_keras_mask(tokens) is None
    embedded = keras.layers.Embedding(4, 2, mask_zero=True)(tokens)
    assert private.get_keras_mask(embedded).shape == (None, 3)


@shows("Sequential._functional")
def a_built_sequential_has_a_graph():
    model = keras.Sequential([keras.layers.Dense(2)])
    assert model._functional is None
    model.build((None, 3))
    assert model._functional.outputs[0] is model.outputs[0]


@shows(
    "map_graph",
    "Functional._nodes",
    "Functional._nodes_by_depth",
    "Functional._operations",
    "Functional._operations_by_depth",
    "make_node_key",
)
def a_graph_is_drawn_anew():
    model = functional()
    nodes, by_depth, operations, operations_by_depth = private.map_graph(
        model.inputs, model.outputs
    )
    assert (nodes, by_depth) == (model._nodes, model._nodes_by_depth)
    assert operations == model._operations
    assert operations_by_depth == model._operations_by_depth
    made = set()
    for depth in sorted(by_depth, reverse=True):
        for node in by_depth[depth]:
            assert {id(tensor) for tensor in node.input_tensors} <= made
            index = node.operation._inbound_nodes.index(node)
            assert private.make_node_key(node.operation, index) in nodes
        made |= {id(t) for node in by_depth[depth] for t in node.outputs}
    assert [op.name for op in operations if op.name in ("dense", "add")] == [
        "dense",
        "add",
    ]


@shows(
    "Operation._inbound_nodes",
    "Operation._outbound_nodes",
    "KerasTensor._keras_history",
    "Node",
    "SymbolicArguments",
)
def a_call_knows_its_tensors_and_its_users():
    model = functional()
    dense, add = model.get_layer("dense"), model.get_layer("add")
    first, second = dense._inbound_nodes
    by_name = {tensor.name: tensor for tensor in model.inputs}
    assert isinstance(first, private.Node)
    assert isinstance(first.arguments, private.SymbolicArguments)
    assert (first.arguments.args, first.arguments.kwargs) == ((by_name["a"],), {})
    assert (first.operation, first.is_input) == (dense, False)
    (call,) = add._inbound_nodes
    assert dense._outbound_nodes == [call, call]
    assert [id(t) for t in call.input_tensors] == [
        id(t) for node in (first, second) for t in node.outputs
    ]
    assert tuple(second.outputs[0]._keras_history) == (dense, 1, 0)
    moved = second.outputs[0]._keras_history._replace(operation=add)
    assert moved.operation is add


@shows("Functional._run_through_graph")
def a_graph_runs_with_other_operations():
    model, names = functional(), []

    def other(operation):
        names.append(operation.name)
        return operation

    inputs = [keras.ops.ones((2, 3)), keras.ops.zeros((2, 3))]
    result = model._run_through_graph(inputs, other)
    want = model({"b": inputs[0], "a": inputs[1]})
    np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (result, want)))
    assert sorted(names) == ["add", "dense", "dense"]


@shows("Functional._standardize_inputs")
def inputs_become_a_list_in_the_order_of_the_model():
    model = functional()
    got = model._standardize_inputs({"a": np.zeros((2, 3)), "b": np.ones((2, 3))})
    means = [float(keras.ops.convert_to_numpy(tensor).mean()) for tensor in got]
    names = [tensor.name for tensor in model.inputs]
    assert means == [float(name == "b") for name in names]


@shows("Tracker", "Layer._tracker", "Layer._untrack_variable")
def a_tracker_lists_what_a_layer_holds():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    tracker = layer._tracker
    assert isinstance(tracker, private.Tracker)
    _, weights = tracker.config["trainable_variables"]
    assert [v.name for v in weights] == ["kernel", "bias"]
    assert tracker.stored_ids["trainable_variables"] == {id(v) for v in weights}
    assert tracker.config["layers"][1] is layer._layers
    tracker.unlock()
    layer._untrack_variable(layer.bias)
    assert [v.name for v in layer.trainable_variables] == ["kernel"]
    tracker.add_to_store("trainable_variables", layer.bias)
    tracker.lock()
    assert [v.name for v in layer.trainable_variables] == ["kernel", "bias"]
    with pytest.raises(ValueError, match="variable"):
        layer.other = keras.Variable(0.0)


@shows("Variable._value", "Variable._shape", "Variable._ndim")
def a_variable_holds_its_tensor():
    variable = keras.Variable(np.ones((2, 3)), name="v")
    assert keras.ops.is_tensor(variable.value)
    assert tuple(variable._value.shape) == tuple(variable._shape) == (2, 3)
    assert variable._ndim == 2
    with keras.StatelessScope():
        deferred = keras.Variable(keras.initializers.Zeros(), shape=(2,))
        assert deferred._value is None


@shows(
    "Model._compile_config",
    "Model._compiled_trainable_state",
    "Model._compile_loss",
    "Model._compile_metrics",
    "Model._loss_tracker",
)
def compiling_sets_just_these_and_public_names():
    model = functional()
    before = dict(vars(model))
    model.compile("sgd", "mse", metrics=["mae"])
    new = {k for k, v in vars(model).items() if k not in before or v is not before[k]}
    private_ones = {name for name in new if name.startswith("_")}
    known = {"_compile_config", "_compiled_trainable_state", "_compile_loss"}
    known |= {"_compile_metrics", "_loss_tracker"}
    assert private_ones <= known | {"_jit_compile"}  # which is `jit_compile`
    copy, _ = copy_model(model, compiled=False)
    assert not copy.compiled
    copy.compile("sgd", "mse")


@shows(
    "Layer._trainable",
    "Layer._path",
    "Layer._parent_path",
    "Layer._remat_mode",
    "Layer._called",
)
def the_state_of_a_layer_is_in_its_attributes():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
    layer = model.layers[0]
    layer.trainable = False
    state = vars(layer)
    assert (state["_trainable"], state["_called"]) == (False, True)
    assert state["_path"] == layer.path
    assert layer.path.endswith("dense")
    assert {"_parent_path", "_remat_mode"} <= set(state)


@shows("Optimizer._var_key", "Optimizer._trainable_variables")
def an_optimizer_finds_its_state_by_the_key_of_a_variable():
    weights = [keras.Variable(np.ones(2), name=name) for name in ("a", "b")]
    optimizer = keras.optimizers.SGD(momentum=0.9)
    optimizer.build(weights)
    keys = [optimizer._var_key(variable) for variable in weights]
    assert len(set(keys)) == 2
    assert [id(v) for v in optimizer._trainable_variables] == [id(v) for v in weights]
    known = [v for v in vars(optimizer).values() if isinstance(v, dict)]
    assert any(set(keys) <= set(mapping) for mapping in known)


@shows("EpochIterator", "PyDatasetAdapter")
def data_of_each_kind_comes_in_batches():
    class Data(keras.utils.PyDataset):
        def __getitem__(self, index):
            return (np.full((2, 1), index),)

        @property
        def num_batches(self):
            return None

    arrays = Source(np.arange(5.0)[:, None], batch_size=2)
    assert arrays.total == 3
    with arrays:
        unpacked = map(keras.utils.unpack_x_y_sample_weight, arrays)
        assert [len(x) for x, _, _ in unpacked] == [2, 2, 1]
    with pytest.raises(ValueError, match="has no end"):
        Source(Data())
    with Source(Data(), steps=2) as source:
        batches = iter(source)
        assert [float(np.max(next(batches)[0])) for _ in range(2)] == [0.0, 1.0]


@shows("TFDatasetAdapter")
def a_data_set_of_tensorflow_gives_tensors():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.range(4).batch(2)
    source = Source(data)
    assert (source.total, source.data_set) == (2, data)
    with pytest.raises(ValueError, match="has no end"):
        Source(data.repeat())


@shows("AutocastScope")
def variables_are_read_in_their_own_dtype():
    seen = []

    class Reads(keras.layers.Dense):
        def call(self, inputs):
            seen.append(keras.ops.cast(self.kernel, "float32"))
            with private.AutocastScope(None):
                seen.append(keras.ops.cast(self.kernel, "float32"))
            return super().call(inputs)

    layer = Reads(1, dtype="mixed_float16")
    layer.build((None, 1))
    layer.kernel.assign([[1.0001]])
    layer(np.ones((1, 1)))
    rounded, exact = (keras.ops.convert_to_numpy(tensor).item() for tensor in seen)
    assert (rounded, exact) == (1.0, np.float32(1.0001))


@shows(*(p.name for p in private.NAMES if p.name.startswith("BatchNormalization")))
def a_subclass_with_a_computing_method_is_another_layer():
    base = keras.layers.BatchNormalization
    for name in private.attributes("BatchNormalization"):
        if hasattr(base, name):
            kind = type("Other", (base,), {name: lambda self, *args: None})
            assert not is_keras(kind())


@shows("Layer._torch_params", "Layer._track_variables")
def a_module_is_told_its_parameters():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    assert len(list(layer.parameters())) == 2
    assert hasattr(layer, "_torch_params")
    layer._tracker.unlock()
    layer.kernel = keras.Variable(np.zeros((3, 2)))
    layer._track_variables()
    assert any(p is layer.kernel.value for p in layer.parameters())


@pytest.mark.parametrize("name", [p.name for p in private.NAMES])
def test_a_name_does_what_is_relied_on(name):
    CHECKS[name]()


def test_this_keras_has_them_all():
    names = [each.name for each in private.missing()]
    assert not [n.name for n in private.missing() if n.group != private.IF_THERE], names


def test_a_missing_name_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(private, "missing", lambda: private.NAMES[:1])
    private.require("keras_bn.fold", "fuse")
    with pytest.raises(RuntimeError) as error:
        keras_bn.fold(keras.Sequential())
    assert str(error.value) == (
        "keras_bn.fold needs Layer._layers from inside Keras, which Keras "
        f"{keras.__version__} does not have. It is known to work from Keras 3.10 to "
        "3.16: install one of these, or a newer keras_bn."
    )


@pytest.fixture(scope="module")
def on_renamed_keras(tmp_path_factory):
    """The lines of `support/on_renamed_keras.py`: what each tool says."""
    folder = tmp_path_factory.mktemp("keras")
    renamed_keras.make(folder)
    root = Path(keras_bn.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, root / "tests/support/on_renamed_keras.py", folder],
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(line.split("\t") for line in result.stdout.splitlines())


def test_without_any_of_them_the_layer_works_and_each_tool_says_a_sentence(
    on_renamed_keras,
):
    for name, message in on_renamed_keras.items():
        assert message.startswith(f"keras_bn.{name} needs "), message
        assert message.endswith("install one of these, or a newer keras_bn.")
    public = {name: getattr(keras_bn, name) for name in keras_bn.__all__}
    tools = {
        name
        for name, value in public.items()
        if inspect.isfunction(value)
        or (isinstance(value, type) and issubclass(value, keras.callbacks.Callback))
    }
    others = {"compare", "from_torch", "pooled", "renorm_ramp", "to_torch"}
    assert set(on_renamed_keras) == tools - others


def test_the_oldest_known_version_is_that_of_the_tests():
    oldest = (Path(keras_bn.__file__).parents[1] / ".ci/oldest.txt").read_text()
    assert f"keras=={private.KNOWN[0]}." in oldest
