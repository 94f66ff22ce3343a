"""Every application of Keras that contains batch normalization, through every tool."""

import subprocess
import sys
from pathlib import Path

import applications
import backbones
import pytest
import splice_sites
from support.backend import only

import keras_bn
from keras_bn.tools.compare import random_inputs, relative_difference


@pytest.mark.slow
@pytest.mark.parametrize("name", applications.names())
def test_every_tool_works_on(name):
    script = Path(applications.__file__)
    done = subprocess.run(
        [sys.executable, script, name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_one_is_converted_and_folded():
    model = applications.build("MobileNetV2")
    x = random_inputs(model, 2)
    expected = model(x, training=False)
    ours = keras_bn.from_keras(model)
    folded = keras_bn.fold(ours)
    assert relative_difference(expected, ours(x)) < 1e-5
    assert relative_difference(expected, folded(x)) < 1e-4
    assert len(folded.layers) == len(model.layers) - 52


def test_a_wrong_figure_is_seen():
    good = dict.fromkeys(applications.COLUMNS, 0.0)
    assert applications.holds(good)
    for key in "convert", "fold", "recalibrate", "export", "train":
        assert not applications.holds({**good, key: 0.1})
        assert not applications.holds({**good, key: float("nan")})


def test_there_is_a_list_of_them():
    names = applications.names()
    assert len(names) >= 30
    assert set(applications.SUBSET) <= set(names)


@pytest.mark.parametrize("name", backbones.SUBSET)
def test_backbones_of_keras_hub(name):
    pytest.importorskip("keras_hub", reason="KerasHub is not installed")
    assert backbones.holds(backbones.check(name))


def test_a_wrong_figure_of_a_backbone_is_seen():
    good = {**dict.fromkeys(backbones.COLUMNS, 0.0), "norms": 3, "frozen": 3}
    assert backbones.holds(good)
    for key in "convert", "fold", "loaded_fold", "loaded":
        assert not backbones.holds({**good, key: 0.1})
        assert not backbones.holds({**good, key: float("nan")})
    assert not backbones.holds({**good, "frozen": 2})
    assert set(backbones.SUBSET) <= set(backbones.BACKBONES)


@only("tensorflow", "SavedModels are its own")
def test_a_network_that_was_trained_elsewhere():
    if not (files := splice_sites.files_of()):
        pytest.skip("spliceai is not installed")
    assert splice_sites.holds(splice_sites.check(files[0]))


def test_a_wrong_figure_of_such_a_network_is_seen():
    good = {**dict.fromkeys(splice_sites.COLUMNS, 0.0), "folded": 16}
    assert splice_sites.holds(good)
    for key in "loaded", "fold", "export":
        assert not splice_sites.holds({**good, key: float("nan")})
    assert not splice_sites.holds({**good, "findings": 1})
    assert not splice_sites.holds({**good, "folded": 0})
    assert splice_sites.files_of("no/such/folder") == []
