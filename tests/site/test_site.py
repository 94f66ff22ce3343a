"""The documentation site: it builds, is whole, fetches nothing, and fits a phone."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require
from support.served import served

import keras_bn

ROOT = Path(__file__).parents[2]
NAMES = [name for name in keras_bn.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the site, built with warnings as errors."""
    require("mkdocs")
    require("material")
    require("mkdocstrings")
    require("nbformat")
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def pages(site):
    return sorted(path for path in site.rglob("*.html") if path.name != "404.html")


def reference(site):
    return (site / "reference" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_in_the_reference(site, name):
    assert f'id="keras_bn.{name}"' in reference(site)


def test_docstrings_are_set_as_they_are_meant(site):
    page = reference(site)
    text = re.sub(r"<[^>]+>", "", page)
    for line in ("Returns:", "Raises:", "Parameters:", "Call arguments:"):
        assert line in text
    # A doctest that Markdown takes for a quotation, or a section it doesn't know.
    assert "<blockquote>" not in page
    assert "<details" not in page
    assert "$$" not in text
    assert page.count("&gt;&gt;&gt; ") >= len(NAMES)


def test_every_page_of_the_repository_is_on_the_site(site):
    titles = {re.search(r"<h1[^>]*>(.*?)<", p.read_text())[1] for p in pages(site)}
    sources = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
    for source in [*sources, *(ROOT / "docs").glob("*.md")]:
        assert source.read_text().splitlines()[0].removeprefix("# ") in titles, source


def test_nothing_is_fetched_from_elsewhere(site):
    for path in pages(site):
        page = path.read_text(encoding="utf-8")
        fetched = re.findall(r'<(?:link|script|img)[^>]+(?:href|src)="([^"]+)"', page)
        assert fetched
        for target in fetched:
            assert not re.match(r"(https?:)?//", target), (path, target)
            if not target.startswith("data:"):
                file = (path.parent / target.split("#")[0].split("?")[0]).resolve()
                assert file.exists(), (path, target)
    # The home page has its picture.
    assert "pictures/recalibrated.png" in (site / "index.html").read_text()


def test_the_tutorial_offers_its_notebook(site):
    page = (site / "tutorial" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<a [^>]*href="\.\./tutorial\.ipynb"', page)
    notebook = json.loads((site / "tutorial.ipynb").read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    assert sources[0].startswith("# Tutorial")
    # The offer is the page's, not the notebook's.
    assert not any("tutorial.ipynb" in source for source in sources)


# Measures every frame once all are loaded, which is when a browser prints the page.
MEASURE = """<script>
onload = () => {
    const found = [...document.querySelectorAll("iframe")].map((frame) => [
        frame.contentWindow.innerWidth,
        frame.contentDocument.documentElement.scrollWidth,
        frame.contentDocument.querySelectorAll("h1").length]);
    document.body.textContent = JSON.stringify(found);
};
</script>"""


def test_no_page_is_wider_than_a_phone(site, browser):
    paths = [path.relative_to(site).as_posix() for path in pages(site)]
    frames = [
        f'<iframe width="390" height="844" src="{path}"></iframe>' for path in paths
    ]
    (site / "framed.html").write_text("<!doctype html>" + "".join(frames) + MEASURE)
    try:
        with served(site) as address:
            dom = browser(f"{address}/framed.html", (800, 900), "--dump-dom")
    finally:
        (site / "framed.html").unlink()
    found = json.loads(re.search(r"<body>\s*(\[.*\])", dom, re.S)[1])
    for path, (window, across, titles) in zip(paths, found, strict=True):
        assert window == 390
        assert across <= window, f"{path} is {across} wide"
        assert titles == 1


def test_a_page_of_its_own_has_no_column_of_one_word(site):
    for page in ("index.html", "tutorial/index.html", "reference/index.html"):
        text = (site / page).read_text(encoding="utf-8")
        column = re.search(r'<div class="md-sidebar md-sidebar--primary"[^>]*>', text)
        assert "hidden" in column[0], page


def test_the_tutorial_opens_in_one_click_where_an_address_is_known(monkeypatch):
    require("mkdocs")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_site")
    hooks = importlib.import_module("hooks")
    words = hooks.notebook("https://github.com/someone/keras_bn")
    assert "/github/someone/keras_bn/blob/gh-pages/tutorial.ipynb)" in words
    assert "Upload notebook" in hooks.notebook(None)
