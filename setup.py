"""The description of the package for PyPI: the README with absolute addresses.

Everything else about the package is in setup.cfg, the address of the project too.
"""

import configparser
import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# A link or a picture: an exclamation mark or nothing, the text, the target.
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!\w+:)([^)\s]*)\)")


def address():
    """The address of the repository in setup.cfg; None before it is filled in."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["metadata"].get("project_urls", "").splitlines()
    urls = dict(map(str.strip, line.split("=", 1)) for line in lines if "=" in line)
    return urls.get("Source", "").rstrip("/") or None


def description(readme, source):
    """The README for another site: its links lead to the repository.

    Args:
        readme: its text.
        source: the address of the repository, whose pages are under `blob/main` and
            whose pictures under `raw/main`, as on GitHub; without one, of links the
            text stays, and of pictures nothing.
    """

    def absolute(link):
        picture, text, target = link.groups()
        if source is None:
            return "" if picture else text
        if target.startswith("#"):
            return f"[{text}]({source}{target})"
        kind = "raw" if picture else "blob"
        return f"{picture}[{text}]({source}/{kind}/main/{target})"

    return LINK.sub(absolute, readme)


if __name__ == "__main__":
    setup(
        long_description=description(
            (ROOT / "README.md").read_text(encoding="utf-8"), address()
        ),
        long_description_content_type="text/markdown",
    )
