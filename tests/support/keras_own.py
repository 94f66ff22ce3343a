"""A plugin for pytest that has Keras's own tests run on our layer.

`test_keras_own.py` loads it in a process of its own: what it changes in Keras stays
changed. It is loaded before any module of tests, so these find our layer wherever they
take Keras's from.
"""

import json
import sys
from pathlib import Path

import keras

import keras_bn

THEIRS, OURS = keras.layers.BatchNormalization, keras_bn.BatchNormalization
NAMES = {THEIRS: "theirs", OURS: "ours"}

made = set()
found = []
ran = {}


def substitute():
    """Put our layer in every module of Keras that holds Keras's."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "keras":
            for key, value in list(vars(module).items()):
                if value is THEIRS:
                    setattr(module, key, OURS)


def watch():
    """Note which of the two layers a test makes, directly, as a subclass or by loading.

    That is done in their base class, so that a test sees our layer as it is.
    """
    new = keras.layers.Layer.__new__

    def noting(cls, *args, **kwargs):
        made.update(name for each, name in NAMES.items() if issubclass(cls, each))
        return new(cls, *args, **kwargs)

    keras.layers.Layer.__new__ = staticmethod(noting)


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, help="where to write what ran, as JSON")
    parser.addoption("--without", action="append", default=[], help="a test to leave")


def pytest_configure(config):
    # Keras's mark for backends that don't train; all of ours do.
    config.addinivalue_line("markers", "requires_trainable_backend: runs here")


def pytest_collection_modifyitems(config, items):
    found.extend(item.nodeid for item in items)
    left = [item for item in items if item.nodeid in config.option.without]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_runtest_setup(item):
    made.clear()


def pytest_runtest_logreport(report):
    """Keep the worst that was said of a test: parts of one may report before it."""
    one = ran.setdefault(report.nodeid, {"outcome": "passed", "made": []})
    if report.failed or (report.skipped and one["outcome"] == "passed"):
        one["outcome"] = report.outcome
    one["made"] = sorted(made)


def pytest_sessionfinish(session):
    record = {"package": keras_bn.__file__, "found": found, "ran": ran}
    session.config.option.record.write_text(json.dumps(record))


substitute()
watch()
