"""Graphs of models that are gone, which TensorFlow and the package keep in memory.

They are little in a program, but thousands of tests make gigabytes of them, and what
goes through all objects in memory, as the garbage collector does, takes twice as long.
"""

import gc
import inspect

from keras_bn.layer import step
from support import backend


def forget():
    """Let them go."""
    if backend.NAME == "tensorflow":
        from tensorflow.python.framework.ops import gradient_registry

        for name in list(gradient_registry.list()):
            if name.startswith("CustomGradient-"):
                del gradient_registry._registry[name]
        for function in (step.train, step.normalize, step.infer):
            inspect.getclosurevars(function).nonlocals["trace"].cache_clear()
    gc.collect()
