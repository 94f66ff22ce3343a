"""The pages of the site that live elsewhere in the repository, and the links to them.

The README is the home page, and so on; their links, written for the repository, are
turned into those of the site. Guides that the navigation doesn't name are added to it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "examples/studies/README.md": "studies.md",
    "benchmarks/RESULTS.md": "results.md",
    "benchmarks/NOTES.md": "notes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
PICTURES = (".png", ".svg", ".jpg")


def on_config(config):
    """Add the guides that the navigation doesn't name."""
    named = set(_pages(config.nav))
    others = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    guides = next(part["Guides"] for part in config.nav if "Guides" in part)
    guides += [page for page in others if page not in named]
    return config


def _pages(nav):
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        if isinstance(value, str):
            yield value
        else:
            yield from _pages(value)


def on_files(files, config):
    """Add the pages from elsewhere, and the pictures they show."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for target in _links(source, text):
            path = ROOT / target
            outside = not target.startswith("docs/")
            if path.suffix in PICTURES and outside and path.exists():
                file = File.generated(config, target, abs_src_path=str(path))
                files.append(file)
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are in the repository become those of the site.

    What the site doesn't have, such as code, stays as the text alone.
    """
    of_page = {page: source for source, page in PAGES.items()}
    uri = page.file.src_uri
    folder = posixpath.dirname(of_page.get(uri, f"docs/{uri}"))

    def rewritten(match):
        target = posixpath.normpath(posixpath.join(folder, match["target"]))
        if (ROOT / target).is_file() and not target.endswith((".md", *PICTURES)):
            return match["text"]
        target = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{match['text']}]({target}{match['anchor']})"

    return LINK.sub(rewritten, markdown)


LINK = re.compile(
    r"\[(?P<text>[^\]]*)\]"
    r"\((?!\w+:|#)(?P<target>[^)#\s]+)(?P<anchor>(?:#[^)\s]*)?)\)"
)


def _links(source, text):
    for match in LINK.finditer(text):
        folder = posixpath.dirname(source)
        yield posixpath.normpath(posixpath.join(folder, match["target"]))
