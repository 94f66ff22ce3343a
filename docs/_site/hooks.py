"""The pages of the site that live elsewhere in the repository, and their links.

The README is the home page, and so on. Their links are written for the repository;
here they become those of the site.
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
SOURCES = {page: source for source, page in PAGES.items()}
# Of a link within the repository: its text, its target, and the rest.
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)([^)\s]*)\)")


def target_of(link, source):
    """The path in the repository that a link on the page `source` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))


def on_files(files, config):
    """Add the pages from elsewhere, and the pictures they show."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for target in (target_of(link, source) for link in LINK.finditer(text)):
            if target.endswith(".png") and not target.startswith("docs/"):
                path = str(ROOT / target)
                files.append(File.generated(config, target, abs_src_path=path))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to pages lead to those of the site; of links to code, the text stays."""
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")

    def rewritten(link):
        target = target_of(link, source)
        if (ROOT / target).is_file() and not target.endswith((".md", ".png")):
            return link[1]
        target = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{link[1]}]({target}{link[3]})"

    return LINK.sub(rewritten, markdown)
