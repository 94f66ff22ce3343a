"""Layers that are made anew or changed, with the variables of the first."""

import inspect

from keras_bn.surgery.exchange import refresh_parameters

# The attributes to copy besides the arguments.
_ATTRIBUTES = (
    "_trainable",
    "_path",
    "_parent_path",
    "_remat_mode",
    "_called",
    "set_later",
)


def rebuild(layer, kind, without=(), **changes):
    """A normalization with the config and the variables of another.

    Args:
        layer: a normalization, ours or Keras's, built or not.
        kind: the class of the new one.
        without: the names of variables that the new one does not take over.
        **changes: arguments that differ.

    Returns:
        The new layer, built if the old one is. It takes over the old variables by name;
        a variable that is missing or has another dtype is new.

    Raises:
        ValueError: if the old layer has weights that the new one does not.
    """
    new = kind(**{**_arguments(layer, kind), **changes})
    for name in _ATTRIBUTES:
        if name in vars(layer):
            vars(new)[name] = vars(layer)[name]
    if not layer.built:
        return new
    present = {v.name: v for v in layer.variables if v.name not in without}
    add = new.add_weight

    def add_weight(*args, name, **options):
        weight = add(*args, name=name, **options)
        old = present.pop(name, None)
        if old is None:
            return weight
        if old.dtype != weight.dtype:
            weight.assign(old)
            if weight.trainable != old.trainable:
                weight.trainable = old.trainable
            return weight
        # A frozen weight stays in the list that the tracker first put it in.
        kind = "trainable" if weight.trainable else "non_trainable"
        new._tracker.untrack(weight)
        new._tracker.add_to_store(f"{kind}_variables", old)
        return old

    vars(new)["add_weight"] = add_weight
    new.build_from_config(layer.get_build_config())
    del vars(new)["add_weight"]
    refresh_parameters(new)
    if present:
        raise ValueError(
            f"Cannot convert '{layer.name}': {type(layer).__name__} has the weights "
            f"{', '.join(present)}, and a batch normalization has no place for them."
        )
    return new


def give_bias(layer, shape):
    """Give a built layer a bias of this shape, instead of any that it has."""
    layer._tracker.unlock()
    if layer.bias is not None:
        layer._untrack_variable(layer.bias)
    layer.bias = layer.add_weight(shape=shape, name="bias", initializer="zeros")
    layer._tracker.lock()
    if hasattr(layer, "use_bias"):
        layer.use_bias = True


def _arguments(layer, kind):
    """The arguments for a layer of another class that does what this one does.

    Read from attributes: a config would lose functions and classes of the user's.
    """
    names = [*inspect.signature(kind).parameters, "activity_regularizer", "autocast"]
    known = {name: getattr(layer, name) for name in names if hasattr(layer, name)}
    return {**known, "name": layer.name, "dtype": layer.dtype_policy}
