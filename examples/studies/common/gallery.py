"""The frame of a study: command line, progress, results, verdict.

A study measures, for every seed, what a claim of the literature is about, and hands
over the figures. It looks like this:

    \"\"\"First line: what is claimed, as a sentence.

    What is trained and measured. Source: Authors, "Title", year.
    \"\"\"

    from common import claims, data, drawing, gallery  # isort: skip

    import itertools
    import sys

    CLAIM = "The claim in one or two sentences."

    def main(argv=None):
        example = gallery.Example("placement", __doc__, seeds=5, argv=argv)
        digits = data.small_digits()
        accuracy = {}
        for seed, place in example.each(itertools.product(example.seeds, PLACES)):
            accuracy[seed, place] = ...  # example.short asks for less of everything
        parts = [claims.Part("accuracy before, less that after", [...], above=0)]
        figures = [{"seed": seed, "before": ..., "after": ...} for seed in ...]
        example.table("Validation accuracy", ["place", "median"], rows)
        return example.conclude(CLAIM, parts, figures, draw(figures))

    if __name__ == "__main__":
        sys.exit(main())

`conclude` prints the parts and the verdict and writes DIR/<name>.json and
DIR/<name>.png. It returns 0 whether the claim held or not: the finding is the result.
How claims are judged: `common.claims`. Colours and axes: `common.drawing`.
"""

import argparse
import json
import math
import pathlib
import platform

import keras
import numpy as np
import tensorflow as tf
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

import keras_bn
from common import claims, drawing, terminal


class Example:
    """One run of an example.

    Attributes:
        short: whether --short asks for less of everything, to see that it runs.
        seeds: range of the seeds to go through.
        out: folder of the results, a `Path`.
        given: namespace of the command line, for options of the example's own.
    """

    def __init__(
        self, name, description, seeds, short_seeds=2, argv=None, options=None
    ):
        """Read the command line.

        Args:
            name: of the example and of its files.
            description: for --help.
            seeds: how many seeds a full run takes if --seeds doesn't say.
            short_seeds: how many with --short.
            argv: list of arguments; None for those of the command line.
            options: function that adds arguments to the parser it is given.
        """
        given = _parse(name, description, seeds, short_seeds, argv, options)
        self.given = given
        self.name = name
        self.short = given.short
        self.seeds = range(given.seeds or (short_seeds if given.short else seeds))
        self.out = given.out
        self._console = terminal.console()

    def each(self, jobs):
        """Go through jobs with a progress bar that names the one being done.

        Args:
            jobs: iterable of whatever one job is; tuples are named by their items.
        """
        jobs = list(jobs)
        shown = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            Elapsed(),
            console=self._console,
        )
        with shown:
            task = shown.add_task("", total=len(jobs))
            for job in jobs:
                items = job if isinstance(job, tuple) else (job,)
                shown.update(task, description=", ".join(map(str, items)))
                yield job
                shown.advance(task)
            shown.update(task, description="done")

    def say(self, *lines):
        self._console.print(*lines, sep="\n", markup=False)

    def table(self, title, header, rows):
        """Print a table; its first column is words, the others are figures.

        Args:
            title: of the table.
            header: list of strings, one per column.
            rows: iterable of lists of strings.
        """
        table = terminal.new_table(title)
        for column, name in enumerate(header):
            table.add_column(name, justify="right" if column else "left")
        for row in rows:
            table.add_row(*map(str, row))
        self.say("", table)

    def conclude(self, claim, parts, figures, picture):
        """Print the claim's parts and the verdict, and write the results.

        Args:
            claim: the claim in words.
            parts: list of `claims.Part`.
            figures: list of one dictionary per seed, of numbers, strings, lists and
                dictionaries; written to the JSON as they are.
            picture: the matplotlib figure.

        Returns:
            0, the exit status.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        held = claims.held(parts)
        results = {
            "example": self.name,
            "claim": claim,
            "held": held,
            "parts": [_part(part) for part in parts],
            "figures": figures,
            "settings": {
                **{k: v for k, v in vars(self.given).items() if k != "out"},
                "seeds": len(self.seeds),
            },
            "versions": {
                "python": platform.python_version(),
                **{m.__name__: m.__version__ for m in (np, tf, keras, keras_bn)},
            },
        }
        text = json.dumps(_plain(results), indent=2, allow_nan=False) + "\n"
        (self.out / f"{self.name}.json").write_text(text)
        drawing.save(picture, self.out / f"{self.name}.png")
        self._judgement(parts)
        self._console.print(
            f"\nFigures and picture are in {self.out}", markup=False, soft_wrap=True
        )
        self.say("", f"Claim: {claim}")
        if failed := [part.says for part in parts if not part.held]:
            self.say(f"Not held: {'; '.join(failed)}.")
        self.say(
            terminal.good("The claim held here.")
            if held
            else terminal.bad("The claim did NOT hold here.")
        )
        return 0

    def _judgement(self, parts):
        table = terminal.new_table("What the claim rests on")
        for name in ("", "median", "lowest", "highest", "claimed", "seeds", "held"):
            number = name in ("median", "lowest", "highest", "claimed", "seeds")
            table.add_column(name, justify="right" if number else "left")
        for part in parts:
            table.add_row(
                part.says,
                *map(
                    part.form.format, (part.median, min(part.values), max(part.values))
                ),
                part.bound,
                f"{part.agreeing}/{len(part.values)}",
                terminal.good("yes") if part.held else terminal.bad("NO"),
            )
        table.caption = (
            "A part is held if at least three seeds in four are beyond what is claimed."
        )
        self.say("", table)


def _parse(name, description, seeds, short_seeds, argv, options):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="less of everything, in seconds: shows that it runs, proves little",
    )
    parser.add_argument(
        "--seeds",
        type=_seeds,
        metavar="N",
        help=f"how many seeds to go through ({seeds}, or {short_seeds} with --short)",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("out") / name,
        metavar="DIR",
        help="folder for picture and figures (%(default)s)",
    )
    if options:
        options(parser)
    return parser.parse_args(argv)


def _seeds(text):
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _part(part):
    bound = "above" if part.above is not None else "below"
    return {
        "says": part.says,
        "values": part.values,
        "median": part.median,
        bound: getattr(part, bound),
        "held": part.held,
    }


def _plain(value):
    """With Python's own numbers, and None for those that JSON doesn't have."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
