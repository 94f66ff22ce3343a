"""compare, fix, and what a notebook shows."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
from keras_bn.diagnosis.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:The statistics of")
OURS = keras_bn.BatchNormalization


def data(n=256):
    return np.random.default_rng(0).normal(3.0, 2.0, (n, 4)).astype("float32")


def made(**second):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, use_bias=False, name="dense"),
            OURS(name="bn_1"),
            layers.Dense(5, name="head"),
            OURS(name="bn_2", **second),
        ],
        name="model",
    )


def state(model):
    return [keras.ops.convert_to_numpy(v) for v in model.variables]


def test_fix_replaces_the_statistics_and_nothing_else():
    model, x = made(), data()
    before = {v.path: keras.ops.convert_to_numpy(v) for v in model.variables}
    fixed = keras_bn.diagnose(model, (x, x[:, :1])).fix()
    assert list(fixed.recalibrated) == ["bn_1", "bn_2"]
    assert fixed.before.at_least("error")
    assert fixed.after.healthy
    assert "Recalibrated 2 layers: bn_1, bn_2." in str(fixed)
    for variable in model.variables:
        same = np.array_equal(before[variable.path], variable)
        assert same is ("moving" not in variable.path)
    assert [f.kind for f in fixed.remaining] == ["redundant-bias"]
    assert fixed.new == []


def test_fix_leaves_frozen_layers_unless_their_statistics_are_an_error():
    model, x = made(freeze_statistics=True), data()
    keras_bn.recalibrate(model, x, include_frozen=True, verbose=0)
    old = [np.asarray(v) + 9.0 for v in model.get_layer("bn_2").variables]
    model.get_layer("bn_2").set_weights(old)  # stale, a note as it is frozen
    model.get_layer("bn_1").moving_mean.assign(np.full(6, 9.0))
    fixed = keras_bn.diagnose(model, x).fix()
    assert list(fixed.recalibrated) == ["bn_1"]
    model.get_layer("bn_2").moving_mean.assign(np.full(5, np.nan))
    assert "bn_2" in keras_bn.diagnose(model, x).fix().recalibrated


def test_fix_changes_nothing_where_nothing_is_to_fix():
    model, x = made(), data()
    keras_bn.recalibrate(model, x, verbose=0)
    before = state(model)
    fixed = keras_bn.diagnose(model, x).fix()
    assert fixed.recalibrated == {}
    assert "Nothing was changed" in str(fixed)
    for first, second in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(first, second)


def test_fix_leaves_statistics_of_which_only_a_note_says_something():
    model, x = made(freeze_statistics=True), data()
    keras_bn.recalibrate(model, x, include_frozen=True, verbose=0)
    layer = model.get_layer("bn_2")
    layer.moving_mean.assign(np.full(5, 9.0))
    report = keras_bn.diagnose(model, x, ignore=["train-inference-gap"])
    assert ("stale-statistics", "note") in [
        (f.kind, f.severity) for f in report.findings
    ]
    before = state(model)
    assert report.fix().recalibrated == {}
    for first, second in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.filterwarnings("error:The structure of")
def test_fix_takes_the_inputs_without_the_labels():
    image = keras.Input((4,))
    model = keras.Model(image, OURS(name="bn")(image))
    x = data()
    fixed = keras_bn.diagnose(model, (x, x[:, :1])).fix()
    assert fixed.after.healthy
    np.testing.assert_allclose(fixed.recalibrated["bn"].mean, x.mean(0), rtol=1e-5)


def test_what_was_ignored_stays_ignored_after_a_fix():
    model, x = made(), data()
    fixed = keras_bn.diagnose(model, x, ignore=["BN010"]).fix()
    assert [f.kind for f in fixed.after.ignored] == ["redundant-bias"]
    assert fixed.after.findings == []


def test_fix_takes_other_data():
    model, x = made(), data()
    fixed = keras_bn.diagnose(model).fix(x, batch_size=64)
    assert fixed.before.record.batches == 4
    assert fixed.after.healthy
    with pytest.raises(ValueError, match="`steps` must say"):
        keras_bn.diagnose(model).fix(iter([x]))


def test_a_fix_that_fails_changes_nothing():
    model, x = made(), data()
    batches = iter([x[:64]] * 3)
    report = keras_bn.diagnose(model, batches, steps=1)
    before = state(model)
    next(batches)  # one is left: for the recalibration, not for the diagnosis
    with pytest.raises(ValueError, match="no data"):
        report.fix()
    for first, second in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(first, second)


def test_fix_is_a_function_of_a_model_a_report_and_data():
    model, x = made(), data()
    report = keras_bn.diagnose(model, x)
    finding = report.findings[0]
    assert finding.remedy == str(finding.fix) == "keras_bn.recalibrate(model, x)"
    assert finding.fix.statistics_only
    alone = Report(report.record, report.findings)
    with pytest.raises(ValueError, match="this report is without"):
        keras_bn.fix(model, alone)
    fixed = keras_bn.fix(model, alone, x)
    assert list(fixed.recalibrated) == ["bn_1", "bn_2"]
    assert keras_bn.diagnose(model, x).healthy
    with pytest.raises(ValueError, match="does not hold its model"):
        alone.fix(x)
    keras_bn.freeze(model)
    assert keras_bn.diagnose(model).findings[0].fix.statistics_only is False


def test_compare_says_what_went_and_what_came():
    model, x = made(), data()
    before = keras_bn.diagnose(model, x)
    keras_bn.recalibrate(model, x, verbose=0)
    model.get_layer("bn_1").gamma.assign(np.zeros(6))
    compared = keras_bn.compare(before, keras_bn.diagnose(model, x))
    assert "never-updated" in [f.kind for f in compared.gone]
    assert ("small-gamma", "bn_1") in [(f.kind, f.layer) for f in compared.new]
    assert [f.kind for f in compared.remaining] == ["redundant-bias"]
    text = str(compared)
    drift = before.layer("bn_1").drift
    assert f"{drift.worst_mean:.2f}" in text
    assert text.index("Gone:") < text.index("New:") < text.index("Remaining:")
    page = compared.to_html()
    assert page.count('class="zero"') == 2 * 2 * 2
    assert "BN007" in [each["rule"] for each in compared.to_dict()["new"]]


def test_a_finding_in_another_layer_is_another_one():
    model, x = made(), data()
    keras_bn.recalibrate(model, x, verbose=0)
    first, second = model.get_layer("bn_1").gamma, model.get_layer("bn_2").gamma
    first.assign(np.zeros(6))
    before = keras_bn.diagnose(model)
    first.assign(np.ones(6))
    second.assign(np.zeros(5))
    compared = keras_bn.compare(before, keras_bn.diagnose(model))
    assert [(f.kind, f.layer) for f in compared.gone] == [("small-gamma", "bn_1")]
    assert [(f.kind, f.layer) for f in compared.new] == [("small-gamma", "bn_2")]


def test_a_finding_of_the_model_stays_the_same_under_another_name():
    model, x = made(), data()
    first = keras_bn.diagnose(model, x)
    model.name = "other"
    compared = keras_bn.compare(first, keras_bn.diagnose(model, x))
    assert (compared.gone, compared.new) == ([], [])
    assert "The findings are the same." in str(compared)


@pytest.mark.parametrize(
    ("name", "before", "after", "words"),
    [
        ("loss", 0.5, 0.7, "loss in inference worse: 0.5 to 0.7"),
        ("loss", 0.5, float("nan"), "loss in inference worse: 0.5 to nan"),
        ("loss", float("nan"), 0.7, None),
        ("loss", 0.7, 0.5, None),
        ("loss", 0.5, 0.50001, None),  # the same as shown
        ("accuracy", 0.9, 0.8, "accuracy in inference worse: 90.0% to 80.0%"),
        ("accuracy", 0.8, 0.9, None),
    ],
)
def test_what_is_worse_after_a_fix_is_said_and_not_green(name, before, after, words):
    record = keras_bn.diagnose(made(), data()).record
    reports = [
        Report(dataclasses.replace(record, **{name: (value, value)}), [])
        for value in (before, after)
    ]
    fixed = keras_bn.Fixed(*reports)
    assert fixed.worse == ([words] if words else [])
    color = "warning" if words else "healthy"
    assert f'<header class="{color}">' in fixed.to_html()
    if words:
        assert words in str(fixed)
        assert words in fixed.to_html()


def test_compare_with_and_without_data():
    model = made()
    compared = keras_bn.compare(
        keras_bn.diagnose(model), keras_bn.diagnose(model, data())
    )
    assert "-" in str(compared)
    assert "no data" in compared.to_html()


def test_what_cannot_be_compared_is_refused():
    report = keras_bn.diagnose(made())
    with pytest.raises(TypeError, match="`after` must be a report"):
        keras_bn.compare(report, made())
    other = keras.Sequential([keras.Input((2,)), OURS(name="elsewhere")])
    with pytest.raises(ValueError, match="no layer in common"):
        keras_bn.compare(report, keras_bn.diagnose(other))


def displayed():
    model = made()
    report = keras_bn.diagnose(model, data())
    return report, keras_bn.compare(report, report), keras_bn.plan_fold(model)


def test_a_notebook_shows_reports_comparisons_and_plans():
    for each in displayed():
        shown = each._repr_html_()
        assert shown.startswith('<div class="keras-bn cell">')
        assert "<style>" in shown
        assert "bn_1" in shown
        assert "http" not in shown
        assert "<script" not in shown
        assert "<body" not in shown


def test_the_style_holds_within_the_output_only():
    """Every rule begins with the class: nothing else in a notebook is changed."""
    style = keras_bn.plan_fold(made())._repr_html_()
    style = style.partition("<style>")[2].partition("</style>")[0]
    for line in style.splitlines():
        selectors, brace, _ = line.partition("{")
        if brace and not line.startswith("@"):
            for selector in selectors.split(","):
                assert ".keras-bn" in selector, line


@pytest.mark.parametrize("started", [True, False])
def test_open(monkeypatch, started):
    shown = []
    monkeypatch.setattr(
        "webbrowser.open", lambda address: shown.append(address) or started
    )
    report = keras_bn.diagnose(made())
    if started:
        path = report.open()
    else:
        with pytest.warns(UserWarning, match="No browser"):
            path = report.open()
    assert shown == [path.as_uri()]
    assert path.read_text(encoding="utf-8") == report.to_html()


def test_the_plan_prints_a_line_for_each():
    assert str(keras_bn.plan_fold(made())) == "bn_1 -> dense\nbn_2 -> head"
