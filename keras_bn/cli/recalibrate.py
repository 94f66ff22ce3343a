"""`keras-bn recalibrate`: replace the moving statistics by those of the data."""

import numpy as np

from keras_bn.cli.data import read_data
from keras_bn.cli.errors import UsageError, noted, refused
from keras_bn.cli.models import open_model, save
from keras_bn.cli.output import show
from keras_bn.surgery.arrays import moving
from keras_bn.surgery.norms import is_frozen
from keras_bn.tools.recalibrate import recalibrate

_HEADER = ["layer", "elements", "largest |Δmean|/std", "median std ratio"]


def run(arguments):
    model, layers, native, notes = open_model(arguments)
    data, _ = read_data(arguments.data, model)
    if not arguments.include_frozen and all(map(is_frozen, layers.values())):
        raise UsageError(
            f"every batch normalization of '{model.name}' is frozen; --include-frozen "
            "changes them anyway"
        )
    before = {path: moving(layer) for path, layer in layers.items()}
    what = f"the model can't be run on {arguments.data}: "
    with refused(Exception, saying=what), noted() as more:
        found = recalibrate(
            model,
            data,
            exact=arguments.exact,
            prior=arguments.prior,
            batch_size=arguments.batch_size,
            include_frozen=arguments.include_frozen,
            verbose=0 if arguments.json == "-" else "auto",
        )
    save(arguments, model, native)
    changes = [
        {
            "layer": path,
            "elements": int(moments.count.min()),
            **_change(before[path], moving(layers[path]), layers[path].epsilon),
        }
        for path, moments in found.items()
    ]
    rows = [
        [
            each["layer"],
            f"{each['elements']:,}",
            f"{each['mean_moved']:.3g}",
            f"{each['stddev_ratio']:.3g}",
        ]
        for each in changes
    ]
    closing = f"{len(rows)} of {len(layers)} recalibrated: {arguments.output}"
    results = {"layers": changes, "warnings": [*notes, *more]}
    show(arguments, results, _HEADER, rows, [*notes, *more, closing])
    return 0


def _change(before, after, epsilon):
    """The change of the mean, in new deviations; the ratio of the deviations."""
    with np.errstate(invalid="ignore"):  # the old values may be anything
        old_stddev, stddev = (np.sqrt(v + epsilon) for _, v in (before, after))
        moved = np.abs(after[0] - before[0]) / stddev
    return {
        "mean_moved": float(moved.max()),
        "stddev_ratio": float(np.median(stddev / old_stddev)),
    }
