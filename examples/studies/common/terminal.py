"""The look of what the terminal shows."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def console():
    """A console of at least 80 columns."""
    made = Console(highlight=False)
    return made if made.width >= 80 else Console(highlight=False, width=80)


def new_table(title, width=None):
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


def good(text):
    return Text(text, "bold green")


def bad(text):
    return Text(text, "bold red")
