"""What the equivalence examples share: the digits, two trainings compared, the report.

A reference and ours start from the same weights and train on the same batches. How far
apart may they end?

float64: outputs, weights and moving statistics must agree to 1e-9.

float32: rounding alone drives two right implementations apart, a little at every step
and now and then by a leap, when it takes a ReLU across its kink. So the reference is
also trained with the rows of every batch in other orders. That is the same training in
exact arithmetic, so the distance between such trainings is what rounding does here.
Ours may be twice as far from the reference, no more.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import platform
import socket
import time
import typing
import zipfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits

import keras_bn

# TensorFlow warns of retracing where each of several models has its own function.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

OURS = "keras_bn"
QUANTITIES = ("outputs", "weights", "moving statistics")
FLOAT64_TOLERANCE = 1e-9
REORDERED = 4  # trainings of the reference with the rows of each batch in other orders


# The digits


@dataclasses.dataclass
class Data:
    """Images as float64 rows of 784 in [0, 1], and their classes."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray


class DataError(Exception):
    """The data can't be had; the message says what to do."""


def small_digits():
    """scikit-learn's digits, enlarged from 8x8 to 28x28."""
    images, classes = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8) / 16, np.ones((1, 3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)
    order = np.random.default_rng(0).permutation(len(images))
    train, val = np.split(order, [1440])
    return Data(images[train], classes[train], images[val], classes[val])


def mnist(path=None):
    """The real MNIST, from a local mnist.npz or as Keras downloads it."""
    if path is not None:
        arrays = _mnist_file(path)
    else:
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)
        try:
            arrays = itertools.chain(*keras.datasets.mnist.load_data())
        except Exception as error:  # Keras raises nothing narrower.
            raise DataError(
                f"MNIST could not be downloaded ({error}). Go online and try again, or "
                "pass a copy you have with --mnist-file PATH, or leave --data mnist "
                "out: the digits that come with scikit-learn need no network."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    x_train, y_train, x_val, y_val = arrays
    x_train, x_val = (x.reshape(-1, 784) / 255 for x in (x_train, x_val))
    return Data(x_train, y_train.astype(int), x_val, y_val.astype(int))


# What np.load and looking into its result raise for files that are something else.
UNREADABLE = (OSError, EOFError, LookupError, TypeError, ValueError, zipfile.BadZipFile)


def _mnist_file(path):
    try:
        with np.load(path) as file:
            arrays = [file[n] for n in ("x_train", "y_train", "x_test", "y_test")]
        for x, y in (arrays[:2], arrays[2:]):
            if x.dtype != np.uint8 or x.shape[1:] != (28, 28) or not len(x):
                raise ValueError(f"images are {x.dtype} of shape {x.shape}")
            if y.shape != x.shape[:1] or not np.isin(y, range(10)).all():
                raise ValueError("the classes are not one digit for each image")
    except UNREADABLE as error:
        raise DataError(
            f"{path} can't be read as MNIST ({error}). --mnist-file needs the "
            "mnist.npz that Keras downloads: x_train and x_test, bytes of shape "
            "(images, 28, 28), with their digits in y_train and y_test."
        ) from error
    return arrays


# The command line


def parse(description, out, argv=None, more=None):
    """The arguments, and the data they name; exits with a message if it can't be had.

    Args:
        description: of the example, for --help.
        out: default of --out.
        argv: list of arguments; None for those of the command line.
        more: function that is given `add_argument`, for the example's own arguments.

    Returns:
        `(arguments, data)`: a namespace with `data`, `mnist_file`, `epochs`,
        `batch_size`, `seed` and `out`, and a `Data`. The folder `out` exists.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        choices=["digits", "mnist"],
        default="digits",
        help="digits: scikit-learn's, enlarged to 28x28, which need no network; "
        "mnist: the real one, which Keras downloads",
    )
    add(
        "--mnist-file",
        type=pathlib.Path,
        metavar="PATH",
        help="with --data mnist, a local mnist.npz instead of the download",
    )
    for name, minimum, default, text in (
        ("--epochs", 1, 5, "how often to go through the training images"),
        (
            "--batch-size",
            2,
            32,
            "images in a batch; what does not fill one sits the epoch out",
        ),
        ("--seed", 0, 0, "of the initial weights and the order of the images"),
    ):
        add(name, type=_at_least(minimum), default=default, metavar="N", help=text)
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(out),
        metavar="DIR",
        help="folder for the results",
    )
    if more:
        more(add)
    given = parser.parse_args(argv)
    if given.mnist_file and given.data != "mnist":
        parser.error("--mnist-file goes with --data mnist")
    try:
        data = small_digits() if given.data == "digits" else mnist(given.mnist_file)
    except DataError as error:
        parser.exit(2, f"{error}\n")
    if given.batch_size > len(data.x_train):
        parser.error(f"--batch-size: there are only {len(data.x_train)} images")
    given.out.mkdir(parents=True, exist_ok=True)
    return given, data


def _at_least(minimum):
    def number(text):
        if (value := int(text)) < minimum:
            raise argparse.ArgumentTypeError(f"{value} is less than {minimum}")
        return value

    return number


# Two trainings side by side


@contextlib.contextmanager
def precision(dtype):
    """Everything Keras makes and takes in here has this dtype, the optimizer's too."""
    floatx, policy = keras.config.floatx(), keras.config.dtype_policy()
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    try:
        yield
    finally:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(policy)


class KerasSide:
    """A compiled Keras model as one side; each example adds how it trains:

    `train(x, y, batch_size, tick)` goes through the rows once, in their order, calls
    `tick()` after each batch, and returns the mean loss and accuracy.
    """

    def __init__(self, name, model):
        self.name, self.model = name, model

    def outputs(self, x):
        return self.model.predict_on_batch(x)

    def weights(self):
        """`{name: array}`, in the order of the layers; as `moving_statistics`."""
        return _arrays(self.model.trainable_weights)

    def moving_statistics(self):
        return _arrays(self.model.non_trainable_weights)


def _arrays(variables):
    return {v.path.partition("/")[2]: v.numpy() for v in variables}


@dataclasses.dataclass
class Snapshot:
    """A side after an epoch; `arrays` is `{quantity: {name: float64 array}}`."""

    loss: float
    accuracy: float
    val_accuracy: float
    seconds: float
    arrays: dict

    @classmethod
    def of(cls, side, data, loss, accuracy, seconds):
        """A side as it is now; the last three figures are those of its last epoch."""
        outputs = side.outputs(data.x_val.astype(keras.config.floatx(), copy=False))
        found = {"validation images": outputs}, side.weights(), side.moving_statistics()
        arrays = {
            quantity: {name: array.astype("float64") for name, array in named.items()}
            for quantity, named in zip(QUANTITIES, found, strict=True)
        }
        right = float(np.mean(outputs.argmax(axis=1) == data.y_val))
        return cls(loss, accuracy, right, seconds, arrays)

    def numbers(self):
        return {name: x for name, x in vars(self).items() if name != "arrays"}


class Difference(typing.NamedTuple):
    """The largest absolute difference, and the name of the array it is in."""

    value: float
    where: str


def differences(a, b):
    """`{quantity: Difference}` of two snapshots; NaN, if any, counts as largest."""
    result = {}
    for quantity in QUANTITIES:
        one, other = a.arrays[quantity].values(), b.arrays[quantity]
        pairs = zip(one, other.values(), strict=True)
        largest = [np.max(np.abs(p - q)) for p, q in pairs]
        worst = int(np.argmax(largest))
        result[quantity] = Difference(float(largest[worst]), list(other)[worst])
    return result


@dataclasses.dataclass
class Run:
    """What came of it in one dtype.

    `epochs` has a list of snapshots for each epoch: of the reference, of ours, and in
    float32 of the reference trained on reordered batches. `reloaded_identical` says
    for each side that was saved whether its outputs came back bit for bit. `ours` is
    what the tables call ours.
    """

    title: str
    dtype: str
    reference: str
    epochs: list = dataclasses.field(default_factory=list)
    reloaded_identical: dict = dataclasses.field(default_factory=dict)
    ours: str = OURS

    def differences(self):
        """How far ours is from the reference, after each epoch."""
        return [differences(reference, ours) for reference, ours, *_ in self.epochs]

    def allowed(self):
        """How far it may be, after each epoch: `{quantity: float}`."""
        if self.dtype == "float64":
            return [dict.fromkeys(QUANTITIES, FLOAT64_TOLERANCE) for _ in self.epochs]
        limits = []
        for reference, _, *reordered in self.epochs:
            pairs = itertools.combinations([reference, *reordered], 2)
            spread = [differences(a, b) for a, b in pairs]
            limits.append(
                {q: 2 * float(np.max([d[q].value for d in spread])) for q in QUANTITIES}
            )
        return limits

    def judged(self):
        """`(quantity, Difference, allowed, kept)` for each quantity, at the end."""
        difference, allowed = self.differences()[-1], self.allowed()[-1]
        return [
            (q, difference[q], allowed[q], difference[q].value <= allowed[q])
            for q in QUANTITIES
        ]

    def equivalent(self):
        kept = all(kept for *_, kept in self.judged())
        return kept and all(self.reloaded_identical.values())


def side_by_side(title, dtype, make_reference, make_ours, data, given, watch):
    """Train both on the same batches in the same order.

    Args:
        title: what the tables call the model.
        dtype: of everything; the caller is within `precision(dtype)`.
        make_reference, make_ours: functions that return a side: a `KerasSide`, or
            something else with its methods and its name.
        data: a `Data`.
        given: with `epochs`, `batch_size` and `seed`. The rows left over when all
            batches are full sit the epoch out.
        watch: a `Report`, or something else to tell what happens.

    Returns:
        `(run, reference, ours)`: a `Run`, and the two sides as they are then.
    """
    sides = [make_reference(), make_ours()]
    if dtype == "float32":
        sides += [make_reference() for _ in range(REORDERED)]
    x_train = data.x_train.astype(dtype, copy=False)
    batches = len(x_train) // given.batch_size
    run = Run(title, dtype, sides[0].name)
    shuffle, reorder = np.random.default_rng(given.seed).spawn(2)
    watch.start(run, given.epochs * len(sides) * batches)
    for epoch in range(1, given.epochs + 1):
        order = shuffle.permutation(len(x_train))[: batches * given.batch_size]
        order = order.reshape(batches, given.batch_size)
        run.epochs.append([])
        for index, side in enumerate(sides):
            again = index > 1
            watch.side(epoch, side.name + ", rows reordered" * again)
            rows = (reorder.permuted(order, axis=1) if again else order).ravel()
            x, y = x_train[rows], data.y_train[rows]
            start = time.perf_counter()
            loss, accuracy = side.train(x, y, given.batch_size, watch.step)
            seconds = time.perf_counter() - start
            run.epochs[-1].append(Snapshot.of(side, data, loss, accuracy, seconds))
        watch.epoch()
    watch.finish()
    return run, *sides[:2]


# What is shown and written


def good(text):
    return Text(text, "bold green")


def bad(text):
    return Text(text, "bold red")


class Report:
    """Prints to the terminal; `side_by_side` tells it what happens.

    A context manager, so that the terminal is as before if anything goes wrong.
    """

    def __init__(self):
        console = Console(highlight=False)
        wide = console.width >= 80
        self._console = console if wide else Console(highlight=False, width=80)
        self._live = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.finish()

    def say(self, *lines):
        self._console.print(*lines, sep="\n", markup=False)

    def start(self, run, steps):
        """Show a table and a bar of so many steps while a `Run` is under way."""
        self._run = run
        self._table = table = _table(f"{run.title}, {run.dtype}", width=80)
        table.add_column("")
        table.add_column("", min_width=len(run.ours))
        for name in ("loss", "accuracy", "val. acc.", "time"):
            table.add_column(name, justify="right")
        for name in ("outputs", "weights", "moving"):
            table.add_column(name, justify="right", style="cyan", min_width=7)
        table.caption = (
            "On the right: the largest difference in outputs (on validation images), "
            "weights, and moving statistics. The first epoch includes tracing."
        )
        self._progress = Progress(
            BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        )
        self._task = self._progress.add_task("", total=steps)
        shown = Group(table, self._progress)
        self._live = Live(shown, console=self._console, refresh_per_second=8)
        self._live.start()

    def side(self, epoch, name):
        self._progress.update(self._task, description=f"epoch {epoch}: {name}")

    def step(self):
        self._progress.advance(self._task)

    def epoch(self):
        """Add the last epoch of the run to the table."""
        apart = self._run.differences()[-1]
        found = (f"{apart[quantity].value:.1e}" for quantity in QUANTITIES)
        reference, ours = (
            (
                f"{snapshot.loss:.6f}",
                f"{snapshot.accuracy:.2%}",
                f"{snapshot.val_accuracy:.2%}",
                f"{snapshot.seconds:.2f}"[:4].rstrip(".") + " s",
            )
            for snapshot in self._run.epochs[-1][:2]
        )
        number = str(len(self._run.epochs))
        self._table.add_row(number, self._run.reference, *reference)
        self._table.add_row("", self._run.ours, *ours, *found)

    def finish(self):
        if self._live:
            self._live.update(self._table)
            self._live.stop()
            self._live = None
            # Rich ends a live display with a new line on terminals only.
            self._console.line(1 if self._console.is_terminal else 2)

    def hardest(self, run, data, shown=5):
        """Draw the validation images the reference was least sure of, with answers."""
        if not self._console.encoding.startswith("utf"):
            return
        reference, ours = (
            snapshot.arrays["outputs"]["validation images"]
            for snapshot in run.epochs[-1][:2]
        )
        drawings = []
        for index in np.argsort(reference.max(axis=1), kind="stable")[:shown]:
            truth = data.y_val[index]
            lines = [_draw(data.x_val[index]), Text()]
            for name, outputs in ((run.reference, reference), (run.ours, ours)):
                answer = outputs[index].argmax()
                color = "green" if answer == truth else "yellow"
                lines.append(Text(f"{name}: {answer}", style=color))
            drawings.append(Group(*lines, Text(f"truth: {truth}")))
        self.say(f"The {shown} digits that {run.reference} was least sure of:", "")
        self.say(Columns(drawings, width=14, padding=(0, 1)), "")

    def judgement(self, runs):
        """Tabulate how far ours ended from the reference, and how far it might.

        Args:
            runs: list of `Run`, of one model.
        """
        table = _table("How far apart they ended, and how far they might")
        for name in ("", "", "difference", "allowed", "kept", "largest in"):
            right = name in ("difference", "allowed")
            table.add_column(name, justify="right" if right else "left")
        for run in runs:
            for row, (quantity, difference, allowed, kept) in enumerate(run.judged()):
                table.add_row(
                    "" if row else run.dtype,
                    quantity,
                    f"{difference.value:.1e}",
                    f"{allowed:.1e}",
                    good("yes") if kept else bad("NO"),
                    difference.where,
                )
            table.add_section()
        if any(run.dtype == "float32" for run in runs):
            table.caption = (
                "Allowed in float32: twice what lies between any two of "
                f"{REORDERED + 1} trainings with {runs[0].reference} that only take "
                "the rows of each batch in another order, which changes nothing but "
                f"rounding. In float64: {FLOAT64_TOLERANCE:.0e}."
            )
        self.say(table, "")
        for run in runs:
            for name, same in run.reloaded_identical.items():
                outputs = f"Outputs of {name} in {run.dtype}, saved and reloaded: "
                said = good("identical") if same else bad("NOT identical")
                self.say(Text.assemble(outputs, said))

    def verdict(self, equivalent, what, folder):
        """Say where the results are, and the verdict; returns the exit status."""
        where = f"\n{what} are in {folder}"
        self._console.print(where, markup=False, soft_wrap=True)
        say = good if equivalent else bad
        self.say("", say("Verdict: " + "NOT " * (not equivalent) + "equivalent"))
        return 0 if equivalent else 1


def _table(title, width=None):
    return Table(
        width=width,
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        caption_style="dim",
        header_style="bold",
        box=box.HORIZONTALS,
        padding=(0, 1, 0, 0),
    )


def _draw(image):
    """A 28x28 image as 7 lines of 14 half blocks."""
    dark = image.reshape(14, 2, 14, 2).mean(axis=(1, 3)) > 0.4
    blocks = np.array([[" ", "▄"], ["▀", "█"]])[dark[::2] * 1, dark[1::2] * 1]
    return Text("\n".join(map("".join, blocks)))


def save_table(path, runs, given, **more):
    """Write everything the tables show, and what it was made with, as JSON.

    Args:
        path: of the file.
        runs: list of `Run`.
        given: namespace of the command line.
        **more: what else belongs into the table, beside what is there or in its place.
    """
    table = {
        "equivalent": all(run.equivalent() for run in runs),
        "settings": {
            name: getattr(given, name)
            for name in ("data", "epochs", "batch_size", "seed")
        },
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (np, tf, keras, keras_bn)},
        },
        "runs": [
            {
                "model": run.title,
                "dtype": run.dtype,
                "reference": run.reference,
                "equivalent": run.equivalent(),
                "reloaded_identical": run.reloaded_identical,
                "epochs": _epochs(run),
            }
            for run in runs
        ],
        **more,
    }
    path.write_text(json.dumps(table, indent=2) + "\n")


def _epochs(run):
    measured = zip(run.epochs, run.differences(), run.allowed(), strict=True)
    return [
        {
            "epoch": number,
            run.reference: reference.numbers(),
            run.ours: ours.numbers(),
            "differences": {q: d._asdict() for q, d in apart.items()},
            "allowed": allowed,
        }
        for number, ((reference, ours, *_), apart, allowed) in enumerate(measured, 1)
    ]


def save_curves(path, runs):
    """Draw one model's runs in float32 and in float64 as a PNG."""
    first, reference = runs[0], runs[0].reference
    epochs = range(1, len(first.epochs) + 1)
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(f"{first.title}\n{reference} and {OURS}", weight="bold")
    axes = figure.subplot_mosaic(
        [["loss"] * 3 + ["accuracy"] * 3, [q for q in QUANTITIES for _ in range(2)]]
    )
    for name, value, title, legend in (
        ("loss", "loss", "Training loss", "upper right"),
        ("accuracy", "val_accuracy", "Validation accuracy", "lower right"),
    ):
        theirs, ours = (
            [getattr(snapshots[side], value) for snapshots in first.epochs]
            for side in (0, 1)
        )
        axis = axes[name]
        axis.plot(epochs, theirs, "o-", color="#f2b134", lw=7, ms=11, label=reference)
        axis.plot(epochs, ours, "o-", color="#22333b", lw=1.5, ms=5, label=OURS)
        axis.set_title(f"{title}, {first.dtype}")
        axis.legend(frameon=False, loc=legend)
    axes["loss"].set_ylim(bottom=0)
    axes["accuracy"].yaxis.set_major_formatter(PercentFormatter(1))

    limits = {
        "float32": f"allowed: twice {reference} against itself, rows reordered",
        "float64": f"allowed: {FLOAT64_TOLERANCE:.0e}",
    }
    left = axes[QUANTITIES[0]]
    for quantity in QUANTITIES:
        axis = axes[quantity]
        if axis is not left:
            axis.sharey(left)
        for run, color in zip(runs, ("#d1603d", "#2f6690"), strict=True):
            found = [d[quantity].value for d in run.differences()]
            allowed = [a[quantity] for a in run.allowed()]
            axis.plot(epochs, found, "o-", color=color, label=run.dtype)
            axis.plot(epochs, allowed, "_--", color=color, label=limits[run.dtype])
        axis.set_yscale("log", nonpositive="clip")
        axis.set_title(f"Difference in {quantity}")
    left.set_ylabel(f"largest difference, {reference} and {OURS}")
    lines, labels = left.get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, frameon=False)
    for axis in axes.values():
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=120)
