"""Screenshots of what people look at: light and dark, wide and narrow.

    python tests/screenshots.py FOLDER [SITE]

FOLDER gets the pages of a diagnosis, of a fix and of int8, and PNGs of them; with SITE,
the folder of the built documentation, of its home and its reference too.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
from keras import layers
from support.served import served

import keras_bn

SIZES = ((1280, 2400), (400, 3600))
# What Chromium takes for the preference of the system.
THEMES = {"light": "1", "dark": "0"}
# A window has a least width; a frame has not.
FRAME = '<!doctype html><style>body {{ margin: 0 }}</style><iframe src="{}" width="{}" \
height="{}" style="border: 0"></iframe>'


def pages(folder):
    """Write the pages of a model that evaluates badly, before and after a fix."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.Conv2D(16, 3, name="stem"),
            layers.BatchNormalization(name="stem_bn"),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, use_bias=False, name="depthwise"),
            layers.BatchNormalization(name="depthwise_bn"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, name="head"),
        ],
        name="small",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss)
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (128, 16, 16, 3)).astype("float32")
    y = rng.integers(0, 4, 128)
    model.fit(x, y, verbose=0)
    report = keras_bn.diagnose(model, (x, y))
    report.write_html(folder / "report.html")
    report.fix().write_html(folder / "fixed.html")
    int8 = keras_bn.export_int8(model, folder / "small.tflite", x)
    int8.write_html(folder / "int8.html")
    return ["report.html", "fixed.html", "int8.html"]


def shoot(folder, page, address):
    """Take the screenshots of a page.

    Args:
        folder: of the pages, for the screenshots.
        page: its path in the folder.
        address: of a server of the folder: from a file, a browser runs few scripts, and
            the site needs one to be dark.
    """
    name = page.removesuffix(".html").removesuffix("/index").replace("/", "-")
    for (width, height), (theme, value) in (
        (size, theme) for size in SIZES for theme in THEMES.items()
    ):
        frame = folder / "frame.html"
        frame.write_text(FRAME.format(page, width, height))
        command = [
            "chromium",
            *["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"],
            f"--user-data-dir={folder / 'profile' / theme}",
            f"--blink-settings=preferredColorScheme={value}",
            f"--window-size={max(width, 500)},{height}",
            f"--screenshot={folder / f'{name}-{width}-{theme}.png'}",
            f"{address}/{frame.name}",
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        frame.unlink()
    for width, _ in SIZES:
        light, dark = (folder / f"{name}-{width}-{theme}.png" for theme in THEMES)
        if light.read_bytes() == dark.read_bytes():
            raise SystemExit(f"{dark} is not dark")


def main():
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = pages(folder)
    if len(sys.argv) > 2:
        shutil.copytree(sys.argv[2], folder / "site", dirs_exist_ok=True)
        found += ["site/index.html", "site/reference/index.html"]
    with served(folder) as address:
        for page in found:
            shoot(folder, page, address)
    for part in "site", "profile":
        shutil.rmtree(folder / part, ignore_errors=True)


if __name__ == "__main__":
    main()
