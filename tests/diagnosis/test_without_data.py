"""diagnose without data, rules that are ignored, and the new rule large-mean."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_bn
from keras_bn.diagnosis.findings import LARGE_MEAN
from keras_bn.diagnosis.rules import RULES

OURS, KERAS = keras_bn.BatchNormalization, layers.BatchNormalization


def made(bn=OURS, use_bias=False, **options):
    """A model whose statistics an update has changed."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, use_bias=use_bias, name="dense"),
            bn(name="bn", **options),
        ],
        name="model",
    )
    put(model, "moving_mean", 0.1)
    return model


def put(model, name, value, channel=slice(None)):
    variable = getattr(model.get_layer("bn"), name)
    array = keras.ops.convert_to_numpy(variable).copy()
    array[channel] = value
    variable.assign(array)


def kinds(model, **options):
    return [finding.kind for finding in keras_bn.diagnose(model, **options).findings]


FOUND = {
    "non-finite-statistics": {"moving_mean": np.nan},
    "negative-variance": {"moving_variance": -1.0},
    "dead-channel": {"moving_variance": 1e-9},
    "small-gamma": {"gamma": 1e-6},
    "large-mean": {"moving_mean": 101.0},
}


@pytest.mark.parametrize("bn", [OURS, KERAS])
@pytest.mark.parametrize("kind", FOUND)
def test_what_the_statistics_and_gamma_show(bn, kind):
    model = made(bn)
    assert kinds(model) == []
    for name, value in FOUND[kind].items():
        put(model, name, value, channel=2)
    assert kinds(model) == [kind]
    assert not RULES[kind].needs_data


def test_what_the_model_shows():
    assert kinds(keras.Sequential([keras.Input((4,)), OURS()])) == ["never-updated"]
    assert kinds(made(use_bias=True)) == ["redundant-bias"]
    assert kinds(made(trainable=False)) == ["frozen"]
    assert kinds(made(use_bias=True, freeze_statistics=True)) == ["frozen"]


def test_it_says_what_it_has_not_looked_for():
    report = keras_bn.diagnose(made())
    missing = [kind for kind, rule in RULES.items() if rule.needs_data]
    assert report.not_looked_for == missing
    assert len(missing) == 5
    assert f"needs data: {', '.join(missing)}" in str(report)
    assert ", ".join(missing) in report.to_html()
    assert report.to_dict()["not_looked_for"] == missing
    assert report.to_dict()["layers"][0]["mean_drift"] is None
    with pytest.raises(ValueError, match="this report is without"):
        report.plot()
    with pytest.raises(ValueError, match="needs data"):
        report.fix()


@pytest.mark.parametrize("options", [{"steps": 3}, {"batch_size": 8}])
def test_options_of_data_without_data_are_refused(options):
    with pytest.raises(ValueError, match="about `data`"):
        keras_bn.diagnose(made(), **options)


@pytest.mark.parametrize(("factor", "found"), [(0.98, False), (1.02, True)])
def test_large_mean_is_measured_on_the_data_where_there_is_some(factor, found):
    model = keras.Sequential([keras.Input((3,)), OURS(name="bn")])
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 3))
    x = (x - x.mean(0)) / x.std(0)
    x[:, 1] += factor * LARGE_MEAN * np.sqrt(1.001)
    keras_bn.recalibrate(model, x, verbose=0)
    assert ("large-mean" in kinds(model, data=x)) is found
    assert ("large-mean" in kinds(model)) is found


@pytest.mark.parametrize("name", ["BN007", "small-gamma"])
def test_rules_are_ignored_by_id_or_kind(name):
    model = made(use_bias=True)
    put(model, "gamma", 0.0)
    assert kinds(model, ignore=name) == ["redundant-bias"]
    assert kinds(model, ignore=[name, "BN010"]) == []
    report = keras_bn.diagnose(model, ignore=[name])
    assert [finding.kind for finding in report.ignored] == ["small-gamma"]
    assert "Ignored: 1 small-gamma (BN007)" in str(report)
    assert report.to_dict()["ignored"][0]["rule"] == "BN007"


@pytest.mark.parametrize("options", [{"prior": 2}, {"memory": 0.9}])
def test_a_model_that_follows_its_inputs(options):
    model = made()
    assert kinds(model) == []
    keras_bn.adapt(model, **options)
    assert kinds(model) == ["follows-inputs"]
    keras_bn.unadapt(model)
    assert kinds(model) == []


@pytest.mark.parametrize("wrong", ["BN7", ["gamma"], ["BN007", "BN099"]])
def test_an_unknown_rule_is_refused(wrong):
    with pytest.raises(ValueError, match="`ignore` takes rules: BN001 to BN015"):
        keras_bn.diagnose(made(), ignore=wrong)


def test_ids_are_what_they_were():
    """An id is in the settings of users: none is changed or used again."""
    assert {rule.id: kind for kind, rule in RULES.items()} == {
        "BN001": "never-updated",
        "BN002": "non-finite-statistics",
        "BN003": "negative-variance",
        "BN004": "momentum-too-slow",
        "BN005": "stale-statistics",
        "BN006": "dead-channel",
        "BN007": "small-gamma",
        "BN008": "frozen",
        "BN009": "small-batch",
        "BN010": "redundant-bias",
        "BN011": "train-inference-gap",
        "BN012": "large-mean",
        "BN013": "non-finite-data",
        "BN014": "non-finite-parameters",
        "BN015": "follows-inputs",
    }
