"""`--import MODULE`: the user's own classes and functions for a model."""

import contextlib
import importlib
import inspect
import os
import sys

import keras

from keras_bn.cli.errors import UsageError, sentence


@contextlib.contextmanager
def imported(names):
    """Import modules, and let Keras find the classes and functions they define.

    In this context, Keras finds them by their names, registered or not.

    Args:
        names: of modules that are installed or in the current folder.
    """
    if not names:
        yield
        return
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        found = {}
        for name in names:
            found.update(_defined_in(_import(name)))
        with _known(found):
            yield
    finally:
        sys.path.remove(folder)


@contextlib.contextmanager
def _known(found):
    """Let Keras find objects by name. An inner custom object scope would hide ours."""
    objects = keras.saving.get_custom_objects()
    before = {name: objects[name] for name in found if name in objects}
    objects.update(found)
    try:
        yield
    finally:
        for name in found:
            objects.pop(name, None)
        objects.update(before)


def _import(name):
    if name.endswith(".py") or os.sep in name:
        raise UsageError(
            f"--import takes the name of a module, such as my_layers, not {name}"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name == error.name or name.startswith(f"{error.name}."):
            raise UsageError(
                f"--import {name}: no module '{error.name}' is installed or in the "
                "current folder"
            ) from error
        raise UsageError(f"--import {name} fails: {sentence(error)}") from error
    except Exception as error:  # the user's code may raise anything
        kind = type(error).__name__
        raise UsageError(f"--import {name} fails: {kind}: {sentence(error)}") from error


def _defined_in(module):
    """The classes and functions by name that a module defines, not those it imports."""
    package = module.__name__
    return {
        name: value
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and f"{value.__module__}.".startswith(f"{package}.")
    }
