"""What the terminal shows: tables that fill while the models train, and a verdict."""

import numpy as np
from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from common.terminal import bad, console, good, new_table
from common.training import FLOAT64_TOLERANCE, QUANTITIES, REORDERED


class Report:
    """Prints to the terminal; `side_by_side` tells it what happens.

    A context manager, so that the terminal is as before if anything goes wrong.
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

    # While the models train

    def start(self, run, steps):
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
        reference, ours, *_ = self._run.epochs[-1]
        apart = self._run.differences()[-1]
        number = str(len(self._run.epochs))
        differences = (f"{apart[quantity].value:.1e}" for quantity in QUANTITIES)
        self._table.add_row(number, self._run.reference, *_cells(reference))
        self._table.add_row("", self._run.ours, *_cells(ours), *differences)

    def finish(self):
        if self._live:
            self._live.update(self._table)
            self._live.stop()
            self._live = None
            # Rich ends a live display with a new line on terminals only.
            self._console.line(1 if self._console.is_terminal else 2)

    # At the end

    def hardest(self, run, data, shown=5):
        """Draw the validation images the reference was least sure of, with answers."""
        if not self._console.encoding.startswith("utf"):
            return
        outputs = {
            name: snapshot.arrays["outputs"]["validation images"]
            for name, snapshot in zip(
                (run.reference, run.ours), run.epochs[-1], strict=False
            )
        }
        sureness = outputs[run.reference].max(axis=1)
        drawings = []
        for index in np.argsort(sureness, kind="stable")[:shown]:
            lines = [_draw(data.x_val[index]), Text()]
            for name, output in outputs.items():
                answer = output[index].argmax()
                color = "green" if answer == data.y_val[index] else "yellow"
                lines.append(Text(f"{name}: {answer}", style=color))
            lines.append(Text(f"truth: {data.y_val[index]}"))
            drawings.append(Group(*lines))
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
        reference = runs[0].reference
        if any(run.dtype == "float32" for run in runs):
            table.caption = (
                "Allowed in float32: twice what lies between any two of "
                f"{REORDERED + 1} trainings with {reference} that only take the rows "
                "of each batch in another order, which changes nothing but rounding. "
                f"In float64: {FLOAT64_TOLERANCE:.0e}."
            )
        self.say(table, "")
        for run in runs:
            for name, same in run.reloaded_identical.items():
                outputs = f"Outputs of {name} in {run.dtype}, saved and reloaded: "
                said = good("identical") if same else bad("NOT identical")
                self.say(Text.assemble(outputs, said))

    def written(self, what, folder):
        """Say where the results are, on one line however long."""
        self._console.print(f"\n{what} are in {folder}", markup=False, soft_wrap=True)

    def verdict(self, equivalent):
        """Say it on a line of its own; returns the exit status."""
        say = good if equivalent else bad
        self.say("", say("Verdict: " + "NOT " * (not equivalent) + "equivalent"))
        return 0 if equivalent else 1


def _cells(snapshot):
    return (
        f"{snapshot.loss:.6f}",
        f"{snapshot.accuracy:.2%}",
        f"{snapshot.val_accuracy:.2%}",
        f"{snapshot.seconds:.2f}"[:4].rstrip(".") + " s",
    )


def _draw(image):
    """A 28x28 image as 7 lines of 14 half blocks."""
    dark = image.reshape(14, 2, 14, 2).mean(axis=(1, 3)) > 0.4
    blocks = np.array([[" ", "▄"], ["▀", "█"]])[dark[::2] * 1, dark[1::2] * 1]
    return Text("\n".join(map("".join, blocks)))
