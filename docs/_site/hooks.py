"""The pages of the site that live elsewhere, their links, and the tutorial's notebook.

The README is the home page, and so on. Their links are written for the repository;
here they become those of the site.
"""

import importlib.util
import posixpath
import re
from pathlib import Path

from as_notebook import of_the_site
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

NOTEBOOK = """\
This page is also a notebook:
[download it](tutorial.ipynb){: download="tutorial.ipynb" } and open it in Jupyter,
"""
COLAB = "https://colab.research.google.com"
GITHUB = "https://github.com/"


def notebook(address):
    """The lines about the notebook of the tutorial.

    Args:
        address: of the repository; one on GitHub has the site in its branch `gh-pages`,
            from where Colab opens the notebook in one click.
    """
    if address is not None and address.startswith(GITHUB):
        file = f"{address.removeprefix(GITHUB)}/blob/gh-pages/tutorial.ipynb"
        return f"{NOTEBOOK}or [open it in Colab]({COLAB}/github/{file}).\n"
    return f"{NOTEBOOK}or in [Colab]({COLAB}) under *File*, *Upload notebook*.\n"


def address_of_the_project():
    """The address in setup.cfg, as setup.py reads it."""
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    return setup.address()


def target_of(link, source):
    """The path in the repository that a link on the page `source` leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link[2]))


def on_files(files, config):
    """Add the pages from elsewhere, the pictures they show, and the notebook."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
        for target in (target_of(link, source) for link in LINK.finditer(text)):
            if target.endswith(".png") and not target.startswith("docs/"):
                path = str(ROOT / target)
                files.append(File.generated(config, target, abs_src_path=path))
    # What `make docs` wrote may be of another text than the page has now.
    written = files.get_file_from_path("tutorial.ipynb")
    if written is not None:
        files.remove(written)
    tutorial = files.get_file_from_path("tutorial.md").content_string
    notebook = of_the_site(tutorial)
    files.append(File.generated(config, "tutorial.ipynb", content=notebook))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to pages lead to those of the site; of links to code, the text stays."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # of one page, a column with one word
    uri = page.file.src_uri
    source = SOURCES.get(uri, f"docs/{uri}")

    def rewritten(link):
        target = target_of(link, source)
        if (ROOT / target).is_file() and not target.endswith((".md", ".png")):
            return link[1]
        target = PAGES.get(target, target.removeprefix("docs/"))
        return f"[{link[1]}]({target}{link[3]})"

    markdown = LINK.sub(rewritten, markdown)
    if uri == "tutorial.md":
        markdown = markdown.replace(
            "\n## ", f"\n{notebook(address_of_the_project())}\n## ", 1
        )
    return markdown
