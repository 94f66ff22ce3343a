"""`keras-bn fold`: a model for inference, without batch normalization."""

from keras_bn.cli.arguments import FOLD_TOLERANCE
from keras_bn.cli.errors import refused, sentence, warning_texts
from keras_bn.cli.models import open_model, save
from keras_bn.cli.output import show
from keras_bn.tools.compare import random_inputs, relative_difference
from keras_bn.tools.fold import fold, plan_fold


def run(arguments):
    model, _, native, notes, _ = open_model(arguments)
    with refused(TypeError, ValueError), warning_texts() as more:
        folds, folded = plan_fold(model), fold(model)
    difference, compared = _difference(model, folded)
    folded_into = {f.layer: f.into for f in folds if f.into is not None}
    results = {
        "folded": folded_into,
        "sums": {f.layer: f.into for f in folds.sums},
        "stays": {f.layer: f.reason for f in folds if f.into is None},
        "relative_difference": difference,
    }
    right = difference is None or difference <= FOLD_TOLERANCE
    if right:
        save(arguments, folded, native)
        total = len(folds)
        closing = (
            f"{len(folded_into)} of {total} folded, {compared}: {arguments.output}"
        )
    else:
        closing = f"{compared}: nothing written"
    rows = [[f.layer, f.into or "stays", f.reason] for f in [*folds, *folds.sums]]
    show(
        arguments,
        results,
        ["layer", "into", "why"],
        rows,
        [*notes, *more, closing],
        ["why"],
    )
    return 0 if right else 1


def _difference(model, folded):
    """The difference of their outputs on random input, or None; and in words."""
    try:
        x = random_inputs(model)
        expected = model(x, training=False)
    except Exception as error:  # the model may refuse random numbers
        return None, f"not compared: {sentence(error)}"
    difference = float(relative_difference(expected, folded(x, training=False)))
    measured = f"largest difference of the outputs {difference:.1e} of their spread"
    return difference, measured
