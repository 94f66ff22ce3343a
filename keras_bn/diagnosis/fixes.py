"""Remedies that a function of keras_bn applies."""

from typing import NamedTuple

from keras_bn.surgery.arrays import rolled_back
from keras_bn.surgery.norms import normalizations
from keras_bn.tools.freeze import unfreeze
from keras_bn.tools.recalibrate import recalibrate, replace_statistics


class Fix(NamedTuple):
    """A remedy that can be applied; its string is the code that does it.

    In the code, `x` stands for what `fit` takes as its `x`: inputs without their
    labels, or a data set, with labels or without.

    Args:
        tool: `"recalibrate"` or `"unfreeze"`.
        include_frozen: whether recalibration changes frozen layers, too.

    Example:

    >>> from keras_bn.diagnosis.fixes import Fix
    >>> print(Fix("recalibrate", include_frozen=True))
    keras_bn.recalibrate(model, x, include_frozen=True)
    """

    tool: str
    include_frozen: bool = False

    @property
    def statistics_only(self) -> bool:
        """Whether it changes moving statistics and nothing else."""
        return self.tool == "recalibrate"

    def __str__(self) -> str:
        if self.tool == "unfreeze":
            return "keras_bn.unfreeze(model)"
        frozen = ", include_frozen=True" if self.include_frozen else ""
        return f"keras_bn.recalibrate(model, x{frozen})"

    def apply(self, model, data=None, **options):
        """Apply it to a model.

        Args:
            model: the model, which changes.
            data: for recalibration: the inputs, as `keras_bn.recalibrate` takes them.
            **options: further arguments of the tool.

        Returns:
            What the tool returns.

        Raises:
            ValueError: for recalibration without data.
        """
        if self.tool == "unfreeze":
            return unfreeze(model, **options)
        if data is None:
            raise ValueError("`data` must be given to recalibrate. Received: data=None")
        options.setdefault("include_frozen", self.include_frozen)
        return recalibrate(model, data, **options)


def recalibrated(model, paths, data, options, diagnosed):
    """Recalibrate some layers, and diagnose the model then.

    If either fails or is interrupted, the statistics are as before.

    Args:
        model: the model.
        paths: of the layers.
        data: as in `keras_bn.diagnose`, possibly with labels.
        options: its `steps` and `batch_size`.
        diagnosed: a function that diagnoses the model.

    Returns:
        The `Moments` found by path, and what `diagnosed` returns.
    """
    layers = normalizations(model)
    layers = {path: layers[path] for path in paths}
    variables = [
        variable
        for layer in layers.values()
        for variable in layer.non_trainable_variables
    ]
    x = data[0] if isinstance(data, tuple) else data
    with rolled_back(variables):
        return replace_statistics(model, layers, x, **options), diagnosed()
