"""Importing Keras: a sentence if its backend is missing, and our classes made known.

Keras makes an object of a file from a class that is registered with it; it has no other
public way to find a class of another package. A class can be registered once its module
is imported, which imports Keras and takes seconds, and `keras-bn --help` would have to
wait. So `import keras_bn` does neither. Stand-ins are registered as soon as anything
has imported Keras. Each imports its class when Keras reads an object of it.
"""

import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
import threading

BACKENDS = ("tensorflow", "torch", "jax")

# The classes that files may hold, each with its module.
REGISTERED = {
    "BatchNormalization": "keras_bn.layer.batch_normalization",
    "FakeQuantizedLinear": "keras_bn.int8.layers",
    "FakeQuantizedNormalization": "keras_bn.int8.layers",
    "FakeQuantizer": "keras_bn.int8.layers",
    "LinearRamp": "keras_bn.layer.renorm",
}


def import_keras() -> None:
    """Import Keras.

    Raises:
        ImportError: if its backend is not installed, with what to do.
    """
    try:
        import keras  # noqa: F401
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in BACKENDS:
            raise
        raise ImportError(
            f"Keras's backend is {missing!r}, which is not installed: `pip install "
            f"{missing}`, or set KERAS_BACKEND to another of {', '.join(BACKENDS)} "
            "before Keras is imported. Received: "
            f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND')!r}"
        ) from error


def register_with_keras() -> None:
    """Register the stand-ins: now if Keras is imported, else when it is."""
    # First the finder: another thread may be about to import Keras.
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if sys.modules.get("keras") is not None:
        _register()


def _register():
    with contextlib.suppress(ValueError):  # another thread has removed it
        sys.meta_path.remove(_FINDER)
    # If another thread is importing Keras, this waits for it.
    objects = importlib.import_module("keras.saving").get_custom_objects()
    for name, module in REGISTERED.items():
        objects.setdefault(f"keras_bn>{name}", _stand_in(name, module))


def _stand_in(name, module):
    """A class that makes objects of another one, and imports it only then.

    The module registers its class itself when it is imported, in the place of this one.
    """

    def from_config(cls, config):
        return getattr(importlib.import_module(module), name).from_config(config)

    return type(
        name, (), {"from_config": classmethod(from_config), "__module__": module}
    )


class _Finder:
    """Finds Keras as the other finders do, with a loader that registers afterwards."""

    def __init__(self):
        self._searching = threading.local()

    def find_spec(self, name, path=None, target=None):
        if name != "keras" or getattr(self._searching, "now", False):
            return None
        self._searching.now = True  # for this thread the others answer
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._searching.now = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and `_register` once it has loaded."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


_FINDER = _Finder()
