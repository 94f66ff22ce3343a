"""The page of a diagnosis: what is on it, and how a real browser lays it out."""

import dataclasses
import json
import re

import keras
import numpy as np
import pytest
from keras import layers
from markupsafe import escape

import keras_bn
from keras_bn.diagnosis import drawings
from keras_bn.diagnosis.findings import Finding
from keras_bn.diagnosis.report import Report
from keras_bn.diagnosis.rules import RULES

pytestmark = pytest.mark.filterwarnings("ignore:The statistics of")
DEPTH, CHANNELS = 3, 40


@pytest.fixture(scope="module")
def sick():
    """The diagnosis of a model that is sick in several ways."""
    keras.utils.set_random_seed(0)
    inputs = h = keras.Input((8,))
    for k in range(DEPTH):
        h = layers.Dense(CHANNELS)(h)
        h = keras_bn.BatchNormalization(name=f"bn_{k}")(h)
    model = keras.Model(inputs, layers.Dense(3)(h), name="model")
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x, y = rng.normal(5, 3, (200, 8)), rng.integers(0, 3, 200)
    model.fit(x, y, verbose=0)
    mean = model.get_layer("bn_1").moving_mean
    mean.assign(np.where(np.arange(CHANNELS) < 2, np.nan, np.asarray(mean)))
    return keras_bn.diagnose(model, (x, y))


def rows(page):
    return re.findall(
        r'<tr id="bn-\w+-(\d+)" class="(\w+)"[^>]*>(.*?)</tr>', page, re.S
    )


def test_findings_remedies_and_layers_are_on_the_page(sick):
    page = sick.to_html()
    assert {f.severity for f in sick.findings} >= {"error", "warning", "note"}
    for finding in sick.findings:
        assert finding.kind in page
        shown = "<pre>{}</pre>" if finding.fix else "<p>→ {}</p>"  # code, or words
        assert shown.format(escape(finding.remedy)) in page
        assert escape(finding.message) in page
    found = rows(page)
    assert [int(number) for number, _, _ in found] == list(range(DEPTH))
    assert found[1][1] == "error"
    for (_, _, row), layer in zip(found, sick.record.layers, strict=True):
        assert layer.layer in row
        means, ratios = re.findall(r'class="dots" d="(.*?)"', row)
        assert means.count("h0") <= CHANNELS
        assert ratios.count("h0") <= CHANNELS
    assert "2 of 40 not finite" in found[1][2]
    drift = sick.record.layers[0].drift
    said = f"typically {drift.mean:.2f}, at worst {drift.worst_mean:.2f} std"
    assert said in found[0][2]
    assert f"{sick.record.samples:,} samples" in page


def test_dots_are_where_the_numbers_are():
    """From -limit to limit over the width but for the margins, the rest beyond."""
    strip = drawings.strip(np.array([-2.0, 0.0, 1.0, 5.0, np.nan]), 2.0, 1.0, 0)
    dots = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+h0", strip.dots)]
    reach = drawings.WIDTH / 2 - drawings.MARGIN
    middle = drawings.WIDTH / 2
    assert dots == [middle - reach, middle, middle + reach / 2]
    beyond = re.match(r"M([\d.]+) ", strip.beyond)
    assert float(beyond[1]) == middle + reach
    assert strip.median == middle + reach / 4
    assert strip.lost == "1 of 5 not finite"


def test_a_wide_layer_keeps_its_outermost_channels():
    values = np.linspace(-1, 1, 10_000)
    strip = drawings.strip(values, 1.0, 0.5, 0)
    dots = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+h0", strip.dots)]
    assert len(dots) == drawings.DOTS
    assert (dots[0], dots[-1]) == (drawings.MARGIN, drawings.WIDTH - drawings.MARGIN)


def test_the_page_is_self_contained_and_escaped(sick):
    page = sick.to_html()
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    for target in re.findall(r'(?:href|src)="([^"]*)"', page):
        assert target.startswith("#bn-")
        assert f'id="{target[1:]}"' in page


def test_names_are_escaped(sick):
    layer = dataclasses.replace(sick.record.layers[0], layer="<i>&")
    record = dataclasses.replace(sick.record, model="<b>&", layers=[layer])
    finding = Finding("frozen", "<i>&", "note", "<u>&", "<s>&")
    page = Report(record, [finding]).to_html()
    for letter in "bius":
        assert f"&lt;{letter}&gt;&amp;" in page
        assert f"<{letter}>&" not in page


def test_many_findings_of_a_kind_make_one_card(sick):
    many = [
        Finding("small-batch", f"bn_{k}", "warning", f"message {k}", "the same")
        for k in range(DEPTH)
    ]
    page = Report(sick.record, many).to_html()
    assert page.count("<article") == 1
    assert "small-batch in 3 layers" in page
    assert page.count("<p>→ the same</p>") == 1
    assert all(finding.message in page for finding in many)


def renamed(report, model, layer):
    """A report with another name of its model, and of its first layer alone."""
    first = dataclasses.replace(report.record.layers[0], layer=layer)
    record = dataclasses.replace(report.record, model=model, layers=[first])
    return dataclasses.replace(report, record=record)


def test_control_characters_in_names_are_shown(sick):
    evil = "a\x1b[2J\n\x00\u202eb"
    for each in evil, evil * 3:
        page = renamed(sick, evil, each).to_html()
        assert page.replace("\n", "").isprintable()
        assert r"a\x1b[2J\n\x00\u202eb" in page


def test_names_are_broken_between_their_words(sick):
    page = renamed(sick, "model", "a/depthwise_<b>_long_BN").to_html()
    assert "a/<wbr>depthwise_<wbr>&lt;b&gt;_<wbr>long_<wbr>BN<small>" in page


def test_a_healthy_model(sick):
    page = Report(sick.record, []).to_html()
    assert "No problems found" in page
    assert '<header class="healthy">' in page


def test_the_ids_of_rules_lead_to_their_text(sick):
    page = sick.to_html()
    for kind in {finding.kind for finding in sick.findings}:
        rule = RULES[kind]
        (target,) = set(re.findall(rf'href="#(bn-\w+-{rule.id})"', page))
        assert f'id="{target}">{rule.id} {kind}</dt>' in page
        text = str(escape(rule.text)).replace("\n", " ")
        marked = re.sub("`(.*?)`", r"<code>\1</code>", text)
        assert marked in page
    assert "<code>momentum ** t</code>" in page
    assert "`" not in page


def test_the_page_says_where_it_comes_from(sick, tmp_path):
    origin = sick.origin._replace(file="a<b>.keras", data="inputs.npz")
    dataclasses.replace(sick, origin=origin).write_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in (
        *("Model: a&lt;b&gt;.keras", "Data: inputs.npz", sick.origin.time),
        *(f"keras_bn {keras_bn.__version__}", f"Keras {keras.__version__}"),
    ):
        assert words in page
    assert "Data: ndarray (200, 8), ndarray (200,)" in sick.to_html()


SORTED = """<!doctype html><iframe width="1200" height="900"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.srcdoc = {};
frame.onload = () => {{
    const page = frame.contentDocument;
    const order = () => [...page.querySelectorAll("tbody tr")]
        .map((row) => [row.getBoundingClientRect(), row.querySelector("th").innerText])
        .filter(([box]) => box.height > 0)
        .sort((one, other) => one[0].top - other[0].top)
        .map(([, name]) => name.split("\\n")[0]);
    const found = {{}};
    for (const input of page.querySelectorAll('input[type="radio"]')) {{
        input.checked = true;
        found[input.value] = order();
    }}
    page.querySelector('input[value="order"]').checked = true;
    page.querySelector(".only").checked = true;
    found.only = order();
    document.body.textContent = JSON.stringify(found);
}};
</script>"""


def test_layers_can_be_sorted_and_filtered_without_a_script(sick, browser, tmp_path):
    layers_of = [
        dataclasses.replace(sick.record.layers[0], layer=name, gap=gap)
        for name, gap in (("a", 0.1), ("b", 0.9), ("c", 0.5))
    ]
    record = dataclasses.replace(sick.record, layers=layers_of)
    finding = Finding("frozen", "c", "note", "", "")
    text = Report(record, [finding]).to_html()
    file = tmp_path / "page.html"
    file.write_text(SORTED.format(json.dumps(text).replace("</", "<\\/")))
    dom = browser(file.as_uri(), (1300, 950), "--dump-dom")
    found = json.loads(re.search(r"<body>\s*(\{.*?\})", dom, re.S)[1])
    assert found["order"] == ["a", "b", "c"]
    assert found["gap"] == ["b", "c", "a"]
    assert found["severity"] == ["c", "a", "b"]
    assert found["only"] == ["c"]


# The page in a frame of a given size, for the window of a browser has a least width.
FRAMED = """<!doctype html><iframe width="{}" height="{}" style="border: 0"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.srcdoc = {};
frame.onload = () => {{
    const page = frame.contentDocument, window = frame.contentWindow;
    const style = (query) => window.getComputedStyle(page.querySelector(query));
    const boxes = [...page.querySelectorAll("td svg")].map(
        (drawing) => drawing.getBoundingClientRect());
    document.body.textContent = JSON.stringify({{
        across: page.documentElement.scrollWidth,
        window: window.innerWidth,
        head: style("thead").display,
        row: style("tbody tr").display,
        rows: page.querySelectorAll("tbody tr").length,
        text: parseFloat(style("body").fontSize),
        drawings: boxes.length,
        narrowest: Math.min(...boxes.map((box) => box.width)),
        furthest: Math.max(...boxes.map((box) => box.right)),
    }});
}};
</script>"""


@pytest.mark.parametrize(
    ("size", "head", "row"),
    [((390, 844), "none", "block"), ((1280, 900), "table-header-group", "table-row")],
    ids=["phone", "desktop"],
)
def test_in_a_browser(sick, browser, tmp_path, size, head, row):
    page = sick.to_html()
    file = tmp_path / "page.html"
    file.write_text(page, encoding="utf-8")
    picture = tmp_path / "page.png"
    browser(file.as_uri(), size, f"--screenshot={picture}")
    pixels = read_png(picture)
    assert pixels.shape[:2] == size[::-1]
    red = np.array([0xC1, 0x27, 0x2D])
    assert (np.abs(pixels - red).max(axis=-1) < 8).sum() > 200

    text = json.dumps(page).replace("</", "<\\/")
    file.write_text(FRAMED.format(*size, text), encoding="utf-8")
    dom = browser(file.as_uri(), size, "--dump-dom")
    found = json.loads(re.search(r"<body>\s*(\{.*?\})", dom, re.S)[1])
    assert found["window"] == size[0]
    assert found["across"] <= found["window"], "nothing sticks out to the side"
    assert (found["head"], found["row"]) == (head, row)
    assert (found["rows"], found["drawings"]) == (DEPTH, 2 * DEPTH)
    assert found["narrowest"] > 150
    assert found["furthest"] <= size[0]
    assert found["text"] >= 16


# What JupyterLab and its exported pages say of all HTML in an output.
JUPYTER = """
.jp-RenderedHTMLCommon h1, .jp-RenderedHTMLCommon h2, .jp-RenderedHTMLCommon h3 {
  line-height: 1; font-weight: 500; margin: 1.2em 0 0.8em 0; }
.jp-RenderedHTMLCommon h1:first-child, .jp-RenderedHTMLCommon h2:first-child,
.jp-RenderedHTMLCommon h3:first-child { margin-top: 0.6em; }
.jp-RenderedHTMLCommon h1:last-child, .jp-RenderedHTMLCommon h2:last-child,
.jp-RenderedHTMLCommon h3:last-child { margin-bottom: 0.4em; }
.jp-RenderedHTMLCommon h1 { font-size: 2.4em; }
.jp-RenderedHTMLCommon h2 { font-size: 2em; }
.jp-RenderedHTMLCommon h3 { font-size: 1.7em; }
.jp-RenderedHTMLCommon p { margin-bottom: 1em; }
.jp-RenderedHTMLCommon pre { border: 0; font-size: inherit; line-height: 1.3;
  padding: 0; white-space: pre-wrap; }
.jp-RenderedHTMLCommon table { border-collapse: collapse; border-spacing: 0;
  border: none; font-size: 12px; table-layout: fixed; margin: 0 auto 1em auto; }
.jp-RenderedHTMLCommon td, .jp-RenderedHTMLCommon th, .jp-RenderedHTMLCommon tr {
  vertical-align: middle; padding: 0.5em; line-height: normal; white-space: normal;
  max-width: none; border: none; text-align: right; }
.jp-RenderedHTMLCommon svg { max-width: 100%; height: auto; }
.jp-OutputArea-output pre { border: none; margin: 0; padding: 0; overflow-x: auto;
  overflow-y: auto; word-break: break-all; word-wrap: break-word; }
.jp-OutputArea-output dl, .jp-OutputArea-output dt, .jp-OutputArea-output dd {
  display: block; }
.jp-OutputArea-output dl { width: 100%; overflow: hidden; padding: 0; margin: 0; }
.jp-OutputArea-output dt { font-weight: bold; float: left; width: 20%; padding: 0;
  margin: 0; }
.jp-OutputArea-output dd { float: left; width: 80%; padding: 0; margin: 0; }
"""
BESIDE = """<!doctype html><style>{}</style>
<div class="jp-OutputArea-output jp-RenderedHTMLCommon">{}</div><div>{}</div>
<script>
const size = (part) => {{
    const box = part.getBoundingClientRect();
    return [part.tagName, part.textContent.slice(0, 30), box.width, box.height];
}};
const parts = "header, h1, h2, h3, p, dt, dd, pre, li, th, td, svg";
const sizes = (output) => [...output.querySelectorAll(parts)].map(size);
const outputs = [...document.querySelectorAll("body > div")].map(sizes);
document.body.textContent = JSON.stringify(outputs);
</script>"""


def test_a_notebook_lays_it_out_as_a_page_does(sick, browser, tmp_path):
    """The rules of JupyterLab for lists, headings and tables do not reach into it."""
    shown = sick._repr_html_()
    file = tmp_path / "page.html"
    file.write_text(BESIDE.format(JUPYTER, shown, shown), encoding="utf-8")
    dom = browser(file.as_uri(), (1300, 900), "--dump-dom")
    inside, outside = json.loads(re.search(r"<body>\s*(\[.*\])", dom, re.S)[1])
    assert len(inside) > 30
    assert inside == outside


def read_png(path):
    """The pixels of a picture as integers, (height, width, 3)."""
    from matplotlib.image import imread

    return (imread(path)[..., :3] * 255).round().astype(int)
