"""The benchmarks run, and measure what they say."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from support.distributed import strategy_of

import keras_bn
from keras_bn import verify

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks import __main__ as everything
from benchmarks import (
    applications,
    backends,
    crossover,
    first,
    frozen,
    int8,
    layer,
    markdown,
    memory,
    models,
    peers,
    process,
    steps,
    sync,
)

ROOT = Path(__file__).parents[2]
SHAPE = (8, 4)


def test_interleave_tells_slow_from_fast():
    def slow():
        return sum(range(20_000))

    timings = verify.interleave({"slow": slow, "fast": lambda: None}, seconds=0.05)
    assert timings["slow"].median > 3 * timings["fast"].median
    for timing in timings.values():
        assert timing.low <= timing.median <= timing.high
        assert timing.rounds >= 7


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_every_peer_takes_its_step(training):
    functions = peers.functions(SHAPE, training=training)
    assert {verify.PEER, verify.OURS} <= set(functions)
    for function in functions.values():
        function()


@pytest.mark.parametrize("known", [True, False])
def test_the_batch_size_is_known_to_tracing_or_not(known):
    sizes = []

    class Spy(keras_bn.BatchNormalization):
        def call(self, x, training=None):
            sizes.append(x.shape[0])
            return super().call(x, training=training)

    verify.chain(Spy, SHAPE, known=known)()
    assert set(sizes) == {SHAPE[0] if known else None}


def test_with_known_sizes_there_are_no_other_peers():
    assert set(peers.functions(SHAPE, known=True)) == {verify.PEER, verify.OURS}


@pytest.mark.slow
def test_a_row_of_the_layer_table():
    row = layer.measure(SHAPE, seconds=0.01, others=False)
    ms = row["ms"]
    assert row["ratio"] == ms["Keras"]["median"] / ms["keras_bn"]["median"]
    assert row["known_ratio"] > 0
    table = layer.table([row])
    assert "(8, 4)" in table
    assert f" {row['known_ratio']:.2f} |" in table


def test_what_no_row_has_is_no_column():
    row = layer.measure(SHAPE, seconds=0.01, training=False, others=False)
    assert "known_ratio" not in row
    head = layer.table([row]).splitlines()[0]
    assert "known" not in head
    assert "fused op" not in head


@pytest.mark.slow
def test_a_row_of_the_synchronization_table():
    row = sync.measure(strategy_of("mirrored 2"), SHAPE, seconds=0.01)
    ms = row["ms"]
    for name in ("Keras", "keras_bn"):
        cost = ms[f"{name}, together"]["median"] - ms[f"{name}, apart"]["median"]
        assert row[f"{name}, cost"] == cost
    assert "(8, 4)" in sync.table([row])


@pytest.mark.slow
def test_synchronized_replicas_are_measured_synchronized():
    strategy = strategy_of("mirrored 2")
    layers = []

    def make():
        layers.append(keras_bn.BatchNormalization(synchronized=True, momentum=0.0))
        return layers[-1]

    sync.chain(strategy, make, SHAPE)()
    assert len(layers) == verify.depth(SHAPE)
    rows = np.random.default_rng(0).normal(size=(2 * SHAPE[0], *SHAPE[1:]))
    np.testing.assert_allclose(layers[0].moving_variance.numpy(), rows.var(0), 1e-5)


@pytest.mark.slow
def test_models_differ_in_nothing_but_their_normalization():
    built = {k: applications.build("MobileNetV2", 32, k) for k in applications.KINDS}
    instead = {
        "Keras": keras.layers.BatchNormalization,
        "keras_bn": keras_bn.BatchNormalization,
        "without": applications.Nothing,
    }
    norms = 0
    for layers in zip(*(model.layers for model in built.values()), strict=True):
        assert len({str(each.output.shape) for each in layers}) == 1
        theirs = type(layers[0])
        is_norm = theirs is keras.layers.BatchNormalization
        norms += is_norm
        for kind, each in zip(built, layers, strict=True):
            assert type(each) is (instead[kind] if is_norm else theirs)
    assert norms == 52


def test_files_of_integers_and_floats_are_of_one_model():
    stack = [keras.Input((8, 8, 3)), keras.layers.Conv2D(64, 3)]
    stack += [keras_bn.BatchNormalization(), keras.layers.Flatten()]
    model = keras.Sequential([*stack, keras.layers.Dense(10)])
    image = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype("float32")
    run = int8.runner(int8.float_file(model), image)
    run()
    interpreter = run.__self__
    (made,) = interpreter.get_output_details()
    value = interpreter.get_tensor(made["index"])
    np.testing.assert_allclose(value, model.predict(image, verbose=0), 1e-4, 1e-5)
    row = int8.measure(lambda **_: model, 8, seconds=0.01)
    assert 0.2 < row["smaller"] < 0.4
    assert row["ratio"] == row["ms"]["int8"]["median"] / row["ms"]["float"]["median"]
    cells = int8.table([row | {"model": "Small"}]).splitlines()[-1]
    assert f"| Small, 8×8 | {row['bytes']['float'] / 1e6:.1f} |" in cells
    assert cells.endswith(f"| {row['ratio']:.2f} |")


@pytest.mark.slow
def test_files_for_onnxruntime_are_of_one_model():
    for package in "tf2onnx", "onnxruntime":
        pytest.importorskip(package)
    stack = [keras.Input((8, 8, 3)), keras.layers.Conv2D(64, 3)]
    stack += [keras_bn.BatchNormalization(), keras.layers.Flatten()]
    model = keras.Sequential([*stack, keras.layers.Dense(10)])
    image = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 3)).astype("float32")
    (value,) = int8.onnx_runner(int8.float_file(model, onnx=True), image)()
    np.testing.assert_allclose(value, model.predict(image, verbose=0), 1e-4, 1e-5)
    row = int8.measure(lambda **_: model, 8, seconds=0.01, onnx=True)
    assert 0.2 < row["smaller"] < 0.4


def test_jit_reaches_the_model():
    for jit in (False, True):
        model = applications.build("MobileNetV2", 32, "Keras", jit)
        assert model.jit_compile is jit


def test_the_batch_size_of_the_data_is_not_static():
    images, labels = applications.data(size=4, batch=3).element_spec
    assert images.shape.as_list() == [None, 4, 4, 3]
    assert labels.shape.as_list() == [None]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that `python -m` finds."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(code):
        (tmp_path / "figures.py").write_text(code)
        return "figures"

    return write


def test_a_process_gives_its_last_line(module):
    name = module("import sys; print('Downloading 3 files'); print(sys.argv[2])")
    assert process.number(name, "--size", 96) == 96


def test_a_process_that_fails_is_heard(module):
    with pytest.raises(RuntimeError, match="no such model"):
        process.number(module("print(1); raise SystemExit('no such model')"))


def processes(*answers):
    """A stand-in for processes that answer these numbers; and what they were asked."""
    asked, answers = [], iter(answers)

    def number(module, *arguments):
        assert module in ("benchmarks.models", "benchmarks.memory")
        asked.append([str(a) for a in arguments])
        return next(answers)

    return number, asked


def small(weights, input_shape, classes):
    """A model in place of one of `keras.applications`."""
    inputs = keras.Input(input_shape)
    x = keras.layers.Conv2D(4, 2, use_bias=False)(inputs)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, keras.layers.Dense(classes, "softmax")(x))


def test_first_steps_are_taken_in_turn():
    number, seen = processes(4.0, 2.0, 6.0, 9.0, 5.0, 3.0)
    how = {"of": "predict", "jit": True, "rounds": 3}
    row = first.measure("MobileNetV2", 64, 8, **how, number=number)
    assert [arguments[:2] for arguments in seen] == [
        ["--first", "Keras"],
        ["--first", "keras_bn"],
    ] * 3
    for arguments in seen:
        model = ["--application", "MobileNetV2", "--size", "64", "--batch", "8"]
        assert arguments[2:] == [*model, "--of", "predict", "--jit"]
    assert row["rounds"] == {"Keras": [4.0, 6.0, 5.0], "keras_bn": [2.0, 9.0, 3.0]}
    assert row["seconds"] == {"Keras": 5.0, "keras_bn": 3.0}
    assert row["ratio"] == 0.6
    title = "MobileNetV2, 64×64, batch 8"
    expected = f"| {title} | `predict` under XLA | 5.0 | 3.0 | 0.60 |"
    assert first.table([row]).splitlines()[-1] == expected


def test_the_other_first_steps():
    rows = models.other_first_steps(rounds=1, number=lambda *_: 1.0)
    usual = len(applications.USUAL)
    assert [r["of"] for r in rows if not r["jit"]] == (
        ["evaluate"] * usual + ["predict"] * usual
    )
    assert [(r["of"], r["model"]) for r in rows if r["jit"]] == [("fit", "MobileNetV2")]


def test_the_command_understands_what_first_steps_are_asked_with():
    number, asked = processes(1.0, 1.0)
    how = {"of": "evaluate", "jit": True, "rounds": 1}
    first.measure("DenseNet121", 64, 8, **how, number=number)
    for kind, arguments in zip(("Keras", "keras_bn"), asked, strict=True):
        a = models.parsed(arguments)
        where = a.first, a.application, a.size, a.batch, a.of, a.jit
        assert where == (kind, "DenseNet121", 64, 8, "evaluate", True)


def test_the_first_step_of_no_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        models.main(["--first", "Keras"])
    assert "--first needs --application" in capsys.readouterr().err


@pytest.mark.parametrize("of", first.CALLS)
def test_one_step_is_taken_alone(of):
    built = []

    def application(**options):
        built.append(small(**options))
        return built[-1]

    assert first.seconds("Keras", application, 4, 3, of) > 0
    if of == "fit":
        assert built[0].optimizer.iterations.numpy() == 1


def test_the_share_of_the_cost_is_that_of_each_round():
    times = {
        "Keras": [[0.3, 0.3, 9.0], [0.2, 0.2, 0.2], [0.5, 0.5, 0.5]],
        "keras_bn": [[0.2, 0.2, 0.2], [0.175, 0.175, 0.0], [0.2, 0.2, 0.2]],
        "without": [[0.1, 0.1, 0.1]] * 3,
    }
    row = steps.summary(times)
    np.testing.assert_allclose(row["shares"], [0.5, 0.75, 0.25])
    assert row["share"] == pytest.approx(0.5)
    assert row["range"] == pytest.approx([0.25, 0.75])
    assert row["ms"] == pytest.approx({"Keras": 300, "keras_bn": 200, "without": 100})
    assert steps.cells(row) == ["300", "200", "100", "0.50 (0.25 to 0.75)"]


def test_the_round_that_traces_is_not_counted():
    row = steps.measure(small, 4, 2, rounds=2, steps=3)
    assert len(row["shares"]) == 2
    # A step that traces takes a tenth of a second at least.
    assert all(ms < 100 for ms in row["ms"].values())


@pytest.mark.slow
def test_frozen_models_differ_in_fusion_alone():
    built = {
        kind: applications.build("MobileNetV2", 32, kind)
        for kind in applications.FROZEN_KINDS
    }
    for kind in ("frozen", "fused"):
        norms = [
            each
            for each in built[kind].layers
            if isinstance(each, keras_bn.BatchNormalization)
        ]
        assert len(norms) == 52
        assert all(each.freeze_statistics for each in norms)
        noting = ["call" in vars(each) for each in built[kind].layers]
        assert sum(noting) == (52 if kind == "fused" else 0)


def test_a_row_of_the_frozen_table():
    number, asked = processes(2.0**30, 2.0**29, 4.0, 3.0)
    row = frozen.measure(small, 8, 16, rounds=1, fits=1, number=number)
    assert [arguments[:2] for arguments in asked] == [
        [option, kind]
        for option in ("--memory", "--first")
        for kind in ("frozen", "fused")
    ]
    assert list(row["ms"]) == ["frozen", "fused", "without"]
    times = {"frozen": [[0.3]], "fused": [[0.12]], "without": [[0.1]]}
    row |= {"model": "ResNet50", "size": 96, **steps.summary(times)}
    assert frozen.table([row]).splitlines()[-1] == (
        "| ResNet50, 96×96, batch 16 | 4.0 | 3.0 | 0.75 | 300 | 120 | 100 "
        "| 0.10 (0.10 to 0.10) | 1024 | 512 | 0.50 |"
    )
    a = models.parsed(["--memory", "fused", "--application", "ResNet50"])
    assert (a.memory, a.application) == ("fused", "ResNet50")


def test_the_peak_of_memory_is_that_of_a_step():
    def application(weights, input_shape, classes):
        inputs = keras.Input(input_shape)
        wide = keras.layers.Dense(2**15, "relu")(keras.layers.Flatten()(inputs))
        norm = keras.layers.BatchNormalization()(inputs)
        head = keras.layers.Flatten()(norm)
        outputs = keras.layers.Concatenate()([wide, head])
        return keras.Model(inputs, keras.layers.Dense(classes, "softmax")(outputs))

    assert frozen.peak("frozen", application, 4, 512) > 512 * 2**15 * 4


def a_model():
    """A row of the table of models, of numbers that nobody measured."""
    rounds = {"Keras": [[0.3]], "keras_bn": [[0.2]], "without": [[0.1]]}
    number, _ = processes(4.0, 3.0)
    where = {"model": "ResNet50", "size": 96, "batch": 16}
    seconds = first.measure("ResNet50", 96, 16, rounds=1, number=number)
    return {**where, "first": seconds, **steps.summary(rounds)}


def test_a_row_of_the_models_table():
    head, _, row = models.table([a_model()]).splitlines()
    assert row == (
        "| ResNet50, 96×96, batch 16 | 4.0 | 3.0 | 0.75 | 300 | 200 | 100 "
        "| 0.50 (0.50 to 0.50) |"
    )
    assert head.count("|") == row.count("|")


def test_what_users_run_is_the_first_table_of_the_report():
    whole = a_model()
    ms = {name: {"median": 1.0} for name in ("Keras", "keras_bn")}
    chain = {"shape": SHAPE, "axis": -1, "ms": ms, "ratio": 1.0, "known_ratio": 1.25}
    bytes_ = {"Keras": 2**21, "keras_bn": 2**20, "ratio": 0.5}
    page = everything.report(
        {
            "machine": "here",
            "models": [whole],
            "first steps": [whole["first"]],
            "frozen": [],
            "layers": {everything.GRAPH: [chain]},
            "synchronization": [],
            "memory": {"graph mode": bytes_},
        }
    )
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles[0] == "## Whole models, `fit`"
    assert models.table([whole]) in page
    assert first.table([whole["first"]]) in page
    assert layer.table([chain]) in page
    assert "- graph mode: 1 MiB, 0.50 of Keras's 2 MiB" in page


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "axis"), [(SHAPE, -1), ((2, 4, 3, 3), 1)])
def test_a_layer_beside_the_backends_own(shape, axis):
    ms = backends.layer(shape, axis, seconds=0.01)
    assert set(ms) == {verify.PEER, verify.OURS} | (
        {backends.OWN} if axis == -1 else set()
    )


def test_the_tables_of_all_backends():
    """The ratios stand in one table; what a backend has not is empty."""
    ms = {verify.PEER: 6.0, verify.OURS: 2.0}
    errors = {"ours": 1e-15, "Keras": 2e-7}
    results = [
        {
            "backend": "tensorflow",
            "rows": {"8×4": ms},
            "errors": {"float64": errors},
        },
        {
            "backend": "jax",
            "rows": {"8×4": {**ms, backends.OWN: 1.0}},
            "errors": {"float64": None},
        },
    ]
    assert backends.table(results).splitlines()[-1] == "| 8×4 | 3.00 |  | 3.00 | 2.00 |"
    last = backends.error_table(results).splitlines()[-1]
    assert last == "| float64 | 1e-15 | 2e-07 |  |  |"


def test_a_backend_has_a_process_of_its_own(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho a notice\necho "[\\"$KERAS_BACKEND $*\\"]"\n')
    python.chmod(0o755)
    assert backends.measure(dict.fromkeys(backends.NAMES, str(python)), 2.0) == [
        [f"{name} -m benchmarks.backends --here --seconds 2.0"]
        for name in backends.NAMES
    ]


@pytest.mark.parametrize("jit", [False, True])
def test_memory_is_ours_by_keras(jit):
    number, seen = processes(200.0, 150.0)
    assert memory.measure(jit, number) == {
        "Keras": 200.0,
        "keras_bn": 150.0,
        "ratio": 0.75,
    }
    how = ["--jit"] if jit else []
    assert seen == [["--kind", "Keras", *how], ["--kind", "keras_bn", *how]]


def test_a_table_in_markdown():
    assert markdown.table(["a"], [["1"], ["2"]]) == "| a |\n| --- |\n| 1 |\n| 2 |"


def test_triton_comes_before_tensorflow(tmp_path):
    stand_in = "import sys\nprint('tensorflow' in sys.modules)\n"
    (tmp_path / "triton.py").write_text(stand_in)
    result = subprocess.run(
        [sys.executable, "-c", "import benchmarks.process"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "False\n"


def test_where_the_fused_op_begins_to_pay():
    rows = [(1, 2.0, 3.0), (2, 2.0, 1.0), (4, 2.0, 3.0), (8, 2.0, 1.0), (16, 2.0, 1.0)]
    assert crossover.crossover(rows) == 8
    assert crossover.crossover(rows[:3]) is None


def test_each_kernel_of_the_crossover_takes_its_step():
    for kernel in ("plain", "fused"):
        crossover.step(kernel, SHAPE)()
