"""`import keras_bn`: cheap, silent, and Keras finds the layer whatever the order."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_bn
from keras_bn.importing import REGISTERED

ROOT = Path(keras_bn.__file__).parents[1]


def process(code, *paths, **variables):
    """What Python prints that runs `code` with these folders first on its path."""
    path = os.pathsep.join(map(str, [*paths, ROOT]))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of a model, and its output."""
    folder = tmp_path_factory.mktemp("importing")
    norm = keras_bn.BatchNormalization(
        renorm=True, renorm_clipping=keras_bn.renorm_ramp()
    )
    model = keras.Sequential([keras.Input((3,)), norm])
    norm.moving_mean.assign([1.0, 2.0, 3.0])
    model.save(folder / "model.keras")
    model.save(folder / "model.h5")
    (folder / "config.json").write_text(model.to_json())
    np.save(folder / "output.npy", model(np.ones((2, 3), "float32")))
    return folder


LOADED = """
import numpy as np
for name in "model.keras", "model.h5":
    model = keras.saving.load_model(f"FOLDER/{name}")
    output = np.asarray(keras.ops.convert_to_numpy(model(np.ones((2, 3), "float32"))))
    np.testing.assert_allclose(output, np.load("FOLDER/output.npy"), rtol=1e-6)
    (layer,) = model.layers
    assert type(layer) is keras_bn.BatchNormalization
    assert type(layer.renorm_clipping["rmax"]).__name__ == "LinearRamp"
keras.models.model_from_json(open("FOLDER/config.json").read())
print("right")
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import keras_bn, keras",
        pytest.param("import keras, keras_bn", marks=pytest.mark.slow),
        pytest.param(
            "import keras_bn.moments, keras, keras_bn", marks=pytest.mark.slow
        ),
        pytest.param(
            "import keras_bn.backends, keras, keras_bn", marks=pytest.mark.slow
        ),
        pytest.param(
            "import keras_bn; from keras.saving import load_model; import keras",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import keras_bn\ntry:\n    import tensorflow as tf\n    tf.keras.Model\n"
            "except ImportError:\n    pass\nimport keras",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_keras_loads_our_files_without_custom_objects(folder, imports):
    code = f"{imports}\n{LOADED}".replace("FOLDER", str(folder))
    assert process(code) == ["right"]


def test_all_that_is_registered_has_a_stand_in():
    for module in REGISTERED.values():
        __import__(module)
    ours = {
        name: value
        for name, value in keras.saving.get_custom_objects().items()
        if name.startswith("keras_bn>")
        # What `load_model` puts into the configs that it reads is in no file.
        and not value.__module__.startswith("keras_bn.loading.")
    }
    assert {name.partition(">")[2] for name in ours} == set(REGISTERED)
    for name, value in ours.items():
        assert value.__module__ == REGISTERED[name.partition(">")[2]]
        assert hasattr(value, "get_config"), "it is a stand-in still"


# A package like Keras, as far as registering goes, which is imported at once.
KERAS = """
import time
time.sleep({seconds})
from keras import saving
"""
SAVING = """
objects = {}
def get_custom_objects():
    return objects
"""
COUNT = """
objects, loaders = keras.saving.objects, (keras.__loader__, keras.__spec__.loader)
print(len(objects), *(type(loader).__name__ for loader in loaders))
"""
KNOWN = [str(len(REGISTERED)), "SourceFileLoader", "SourceFileLoader"]


@pytest.fixture
def like_keras(tmp_path):
    (tmp_path / "keras").mkdir()
    (tmp_path / "keras" / "__init__.py").write_text(KERAS.format(seconds=0))
    (tmp_path / "keras" / "saving.py").write_text(SAVING)
    return tmp_path


@pytest.mark.parametrize(
    "imports",
    [
        "import keras_bn, keras",
        "import keras, keras_bn",
        "import keras_bn, keras.saving",
        "from importlib.util import find_spec\n"
        "import keras_bn\nfind_spec('keras').loader.get_filename()\nimport keras",
        "import keras_bn, importlib\nimportlib.reload(keras_bn)\nimport keras",
        "import keras_bn, importlib, keras\nimportlib.reload(keras_bn)\n"
        "importlib.reload(keras)",
        "import keras_bn, pickle, keras\npickle.loads(pickle.dumps(keras.__spec__))",
    ],
)
def test_the_order_of_imports_does_not_matter(like_keras, imports):
    assert process(f"import sys\n{imports}\n{COUNT}", like_keras) == KNOWN


def test_threads_that_import_both(like_keras):
    (like_keras / "keras" / "__init__.py").write_text(KERAS.format(seconds=0.1))
    code = (
        "import sys, threading\n"
        "def run(name):\n    __import__(name)\n    import keras, keras_bn\n"
        "    counts.append(len(keras.saving.objects))\n"
        "counts = []\n"
        "names = ['keras', 'keras_bn'] * 4\n"
        "threads = [threading.Thread(target=run, args=[name]) for name in names]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        f"assert counts == [{len(REGISTERED)}] * 8, counts\n"
        "import keras\n"
    )
    assert process(f"{code}{COUNT}", like_keras) == KNOWN


def test_another_package_that_waits_for_keras_too(like_keras):
    """As experiment trackers do: each hook asks the finders of the other."""
    code = (
        "import sys, importlib.util\n"
        "class Other:\n"
        "    busy = False\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'keras' or self.busy:\n            return None\n"
        "        self.busy = True\n"
        "        try:\n            return importlib.util.find_spec(name)\n"
        "        finally:\n            self.busy = False\n"
        "BEFORE sys.meta_path.insert(0, Other())\n"
        "import keras_bn\n"
        "AFTER sys.meta_path.insert(0, Other())\n"
        "import keras\n"
    )
    for used, unused in ("BEFORE", "AFTER"), ("AFTER", "BEFORE"):
        there = code.replace(f"{used} ", "").replace(f"{unused} ", "# ")
        assert process(f"{there}{COUNT}", like_keras) == KNOWN


def test_keras_that_fails_and_is_imported_again(like_keras):
    init = like_keras / "keras" / "__init__.py"
    right = init.read_text()
    init.write_text("raise ImportError('broken')")
    code = (
        "import sys, pathlib, keras_bn\n"
        "try:\n    import keras\nexcept ImportError as error:\n    print(error)\n"
        f"pathlib.Path({str(init)!r}).write_text({right + '# longer than before'!r})\n"
        "import keras\n"
        "print(any('keras_bn' in type(f).__module__ for f in sys.meta_path))\n"
    )
    assert process(f"{code}{COUNT}", like_keras) == ["broken", "False", *KNOWN]


def test_the_import_is_cheap_and_silent():
    """Neither Keras nor NumPy, no look at the arguments, no change of descriptors."""
    code = (
        "import os, sys\n"
        "class Arguments(list):\n"
        "    def __getitem__(self, *_): raise AssertionError('read')\n"
        "    __iter__ = __len__ = __contains__ = __getitem__\n"
        "sys.argv, sys.orig_argv = Arguments(), Arguments()\n"
        "os.dup2 = os.dup = sys.argv.__getitem__\n"
        "before = dict(os.environ)\n"
        "import keras_bn\n"
        "assert dict(os.environ) == before\n"
        "print(sorted({'keras', 'numpy', 'rich', 'tensorflow'} & sys.modules.keys()))\n"
        "print(*dir(keras_bn))\n"
    )
    nothing, *names = process(code)
    assert nothing == "[]"
    assert names == sorted([*keras_bn.__all__, "testing"])


def test_names_that_there_are_not():
    with pytest.raises(AttributeError, match="'keras_bn' has no attribute 'folds'"):
        keras_bn.folds  # noqa: B018
    assert not hasattr(keras_bn, "quiet")


def test_type_checkers_and_python_find_the_same_names():
    tree = ast.parse(Path(keras_bn.__file__).read_text())
    (block,) = (
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    )
    static = {
        alias.name: node.module.removeprefix("keras_bn.")
        for node in block
        for alias in node.names
    }
    static["testing"] = "testing"
    assert static == keras_bn._MODULES
    assert {*static, "__version__"} == {*keras_bn.__all__, "testing"}
    assert all(getattr(keras_bn, name) is not None for name in static)
