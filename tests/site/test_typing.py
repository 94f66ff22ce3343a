"""What users call is annotated in full, in types that can be read at run time."""

import inspect
import typing

import pytest

import keras_bn
from keras_bn.diagnosis.collect import LayerRecord
from keras_bn.diagnosis.findings import Finding
from keras_bn.diagnosis.report import Report
from keras_bn.layer.renorm import LinearRamp
from keras_bn.tools.fold import Fold

PUBLIC = [getattr(keras_bn, name) for name in keras_bn.__all__ if name != "__version__"]
RETURNED = [Report, LayerRecord, Finding, Fold, LinearRamp]


def functions(public):
    """The functions of a public object that are ours, without private methods."""
    if not inspect.isclass(public):
        return [public]
    bases = [base for base in public.__mro__ if base.__module__.startswith("keras_bn.")]
    found = []
    for name, member in (pair for base in bases for pair in vars(base).items()):
        if name.startswith("_") and name not in ("__init__", "__call__", "__str__"):
            continue
        accessors = isinstance(member, property)
        parts = (member.fget, member.fset) if accessors else [member]
        parts = [getattr(part, "__func__", part) for part in parts]
        found += [part for part in parts if inspect.isfunction(part)]
    return found


def untyped(function):
    """The parameters without a type, and "return"."""
    hints = typing.get_type_hints(function)
    signature = inspect.signature(function)
    names = [*signature.parameters, "return"]
    return [name for name in names if name not in hints and name not in ("self", "cls")]


@pytest.mark.parametrize("public", [*PUBLIC, *RETURNED], ids=lambda p: p.__name__)
def test_public_functions_are_annotated(public):
    found = functions(public)
    missing = {each.__qualname__: untyped(each) for each in found}
    assert not {name: names for name, names in missing.items() if names}


def test_methods_are_found():
    names = {function.__name__ for function in functions(keras_bn.BatchNormalization)}
    assert {"__init__", "call", "from_config", "freeze_affine", "set_weights"} <= names


def half(a: int, b, *, c: float = 0.0) -> int:
    """A function with one parameter that has no type."""


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (lambda x: x, ["x", "return"]),
        (lambda *args, **kwargs: 0, ["args", "kwargs", "return"]),
        (half, ["b"]),
        (keras_bn.fold, []),
    ],
)
def test_what_has_no_type_is_found(function, missing):
    assert untyped(function) == missing
