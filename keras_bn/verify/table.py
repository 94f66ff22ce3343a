"""Printing the records of the proof."""

from collections import Counter
from itertools import groupby

from rich.table import Table

from keras_bn.pages.plain import box
from keras_bn.verify.cases import MEAN
from keras_bn.verify.judge import DRAWS, FLOAT64_LIMIT, LARGEST_ERROR, LEAST_ERROR

RULE = """\
Each row shows the quantity nearest to its limit. The quantities are the output,
the gradients with respect to input, gamma and beta, the new moving mean and
variance, and the output in inference. Errors are ours and Keras's against the
same arithmetic in float64 NumPy on the same rounded inputs: max |difference| /
max |value|, the mean over {draws} random draws. Inputs have standard deviation 1,
and mean {mean:g} if the row names no other.

PASS: in float64, our result differs from NumPy's by at most {float64:.0e}, and
from Keras's where that is as exact. In other dtypes, our error is at most three
times Keras's, and in training at most {largest:.0e}. Keras's counts as at least
{float32:.1e} (float32), {float16:.1e} (float16), {bfloat16:.1e} (bfloat16); for
sums over the n elements of a channel, as at least {float32:.1e} √n if the inputs
have half precision or the backend's op adds up one row after another (PyTorch).
""".format(
    draws=DRAWS, mean=MEAN, float64=FLOAT64_LIMIT, largest=LARGEST_ERROR, **LEAST_ERROR
)

_STYLES = {"PASS": "green", "FAIL": "bold red", "skip": "yellow"}


def title(environment) -> str:
    """What is compared, with which versions, on which device."""
    names = [name for name in environment if name not in ("keras_bn", "device")]
    others = ", ".join(f"{name} {environment[name]}" for name in names)
    ours, device = environment["keras_bn"], environment["device"]
    return f"keras_bn {ours} against {others}, on {device}"


def table(records) -> Table:
    """One row for each record."""
    table = Table(box=box(), padding=0, show_edge=False)
    for name in ("shape", "axis", "dtype", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("ours", "Keras's"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("worst in", ""):
        table.add_column(name, no_wrap=True)
    for _, of_one_shape in groupby(records, key=lambda record: record.case.shape):
        for record in of_one_shape:
            table.add_row(*_row(record))
        table.add_section()
    return table


def verdict(records, passed) -> str:
    """The result in a line, then a line for each comparison that didn't pass."""
    counts = Counter(record.verdict for record in records)
    if passed:
        lines = [f"PASS: {counts['PASS']} of {len(records)} comparisons"]
    elif counts["FAIL"]:
        lines = [f"FAIL: {counts['FAIL']} of {len(records)} comparisons"]
    else:
        lines = ["FAIL: nothing could be compared"]
    for record in records:
        if record.verdict != "PASS":
            shape, axis, dtype, mode = _names(record.case)
            setting = f"{shape} axis {axis} {dtype} {mode}"
            lines.append(f"  {record.verdict} {setting}: {_reason(record)}")
    return "\n".join(lines)


def _names(case):
    dtype = case.dtype
    if case.mean != MEAN:
        dtype += f" at {case.mean:.0e}".replace("e+0", "e")
    return "×".join(map(str, case.shape)), str(case.axis), dtype, case.mode


def _row(record):
    worst = record.worst
    errors = (
        (f"{worst.ours:.1e}", f"{worst.keras:.1e}", worst.quantity)
        if worst
        else ("", "", "")
    )
    style = _STYLES[record.verdict]
    return (*_names(record.case), *errors, f"[{style}]{record.verdict}[/]")


def _reason(record):
    if record.skipped is not None:
        return f"Keras's layer raised {record.skipped}"
    if record.failure is not None:
        return f"our layer raised {record.failure}"
    return ", ".join(
        f"{check.quantity} {check.ours:.1e} (Keras's {check.keras:.1e}, limit "
        f"{check.limit:.1e}, apart {check.difference:.1e})"
        for check in record.checks
        if check.strain > 1
    )
