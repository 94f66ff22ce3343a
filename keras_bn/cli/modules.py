"""Modules of the user's: of `--import MODULE`, and of `--data module:function`."""

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
        names: of modules that are installed or in the current folder. The folder is
            on the path only while they are imported.
    """
    if not names:
        yield
        return
    objects = {}
    with _current_folder_on_path():
        for name in names:
            objects.update(_defined_in(_import(name)))
    with _known(objects):
        yield


@contextlib.contextmanager
def _current_folder_on_path():
    """Let Python find modules in the current folder, after all that are installed."""
    folder = os.getcwd()
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:  # the modules may have changed it
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(folder)]


def imported_function(name):
    """The function that `module:function` names, in a module as of `--import`."""
    module, _, function = name.partition(":")
    with _current_folder_on_path():
        value = _import(module, "--data")
    for part in function.split("."):
        if not hasattr(value, part):
            raise UsageError(f"--data {name}: {module} has no {function}")
        value = getattr(value, part)
    return value


@contextlib.contextmanager
def _known(classes):
    """Let Keras find objects by name. An inner custom object scope would hide ours."""
    objects = keras.saving.get_custom_objects()
    before = {name: objects[name] for name in classes if name in objects}
    objects.update(classes)
    try:
        yield
    finally:
        for name in classes:
            objects.pop(name, None)
        objects.update(before)


def _import(name, option="--import"):
    if name.endswith(".py") or os.sep in name:
        raise UsageError(
            f"{option} takes the name of a module, such as my_layers, not {name}"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name == error.name or name.startswith(f"{error.name}."):
            raise UsageError(
                f"{option} {name}: no module '{error.name}' is installed or in the "
                "current folder"
            ) from error
        raise UsageError(f"{option} {name} fails: {sentence(error)}") from error
    except Exception as error:  # the user's code may raise anything
        kind = f"{type(error).__name__}: "
        words = kind + sentence(error).removeprefix(kind)
        raise UsageError(f"{option} {name} fails: {words}") from error


def _defined_in(module):
    """The classes and functions by name that a module defines, not those it imports."""
    package = module.__name__
    return {
        name: value
        for name, value in vars(module).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and f"{value.__module__}.".startswith(f"{package}.")
    }
