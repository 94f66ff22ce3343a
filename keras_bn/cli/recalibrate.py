"""`keras-bn recalibrate`: replace the moving statistics by those of the data."""

import numpy as np

from keras_bn.cli.data import passing, read_data
from keras_bn.cli.errors import UsageError, warning_texts
from keras_bn.cli.models import open_model, save
from keras_bn.cli.output import show
from keras_bn.surgery.arrays import moving
from keras_bn.surgery.norms import is_frozen
from keras_bn.tools.recalibrate import recalibrate

_HEADER = ["layer", "elements", "largest |Δmean|/std", "median std ratio"]


def run(arguments):
    model, layers, native, notes, _ = open_model(arguments)
    data = read_data(arguments, model)
    if not arguments.include_frozen and all(map(is_frozen, layers.values())):
        raise UsageError(
            f"every batch normalization of '{model.name}' is frozen; --include-frozen "
            "changes them anyway"
        )
    before = {path: moving(layer) for path, layer in layers.items()}
    with passing(arguments, data) as options, warning_texts() as more:
        recalibrated = recalibrate(
            model,
            data.without_labels(),
            exact=arguments.exact,
            prior=arguments.prior,
            include_frozen=arguments.include_frozen,
            **options,
        )
    save(arguments, model, native)
    changes = [
        {
            "layer": path,
            "elements": int(moments.count.min()),
            **_change(before[path], moving(layers[path]), layers[path].epsilon),
        }
        for path, moments in recalibrated.items()
    ]
    rows = [
        [
            change["layer"],
            f"{change['elements']:,}",
            f"{change['mean_moved']:.3g}",
            f"{change['stddev_ratio']:.3g}",
        ]
        for change in changes
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
