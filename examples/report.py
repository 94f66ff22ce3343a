"""What the equivalence examples show in the terminal and write to files."""

from studies.common.terminal import bad, console, good, new_table  # isort: skip

import json
import platform
import sys

import keras
import numpy as np
from equivalence import FLOAT64_TOLERANCE, OURS, QUANTITIES, REORDERED
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import keras_bn


class Report:
    """Prints to the terminal; `equivalence.side_by_side` tells it what happens.

    A context manager: the terminal is as before if anything goes wrong.
    """

    def __init__(self):
        self._console = console()
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
        self._table = table = new_table(f"{run.title}, {run.dtype}", width=80)
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
        table = new_table("How far apart they ended, and how far they might")
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
    backend = sys.modules[keras.backend.backend()]
    table = {
        "equivalent": all(run.equivalent() for run in runs),
        "settings": {
            name: getattr(given, name)
            for name in ("data", "epochs", "batch_size", "seed")
        },
        "versions": {
            "python": platform.python_version(),
            **{m.__name__: m.__version__ for m in (np, backend, keras, keras_bn)},
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
