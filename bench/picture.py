"""Draws docs/diff.png, the picture of README.md: the page of a real `pm.diff`, photographed in headless chromium.

    python bench/picture.py docs/diff.png

It needs chromium with chromedriver; the packages come with the extra `test`.
"""

import argparse
import io
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

import paramend as pm

WIDTH, HEIGHT = 1500, 880
COLOURS = 256  # a palette: fewer bytes, and no difference to the eye
EDITED = "model.layers.7.mlp.down_proj.weight"


def model(layers=8, width=64, hidden=176, words=512):
    """A language model's names and shapes, small, with values drawn as an initializer draws them."""
    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (words, width)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (hidden, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (width, hidden), f"{layer}.input_layernorm.weight": (width,)}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    return {path: draw.normal(0, 0.02, shape).astype("float32") for path, shape in shapes.items()}


def page(folder):
    """The page of a diff: what two edits changed, and all that they left alone."""
    before, after = folder / "before.safetensors", folder / "after.safetensors"
    pm.save(model(), before)
    edited = pm.at(pm.open(before), "model.layers[-1].mlp.down_proj.weight").multiply(0.5)
    pm.at(edited, "model.layers[2].self_attn.o_proj.weight").noise(0.01, seed=1).save(after)
    pm.diff(before, after, histograms=True).to_html(folder / "diff.html")
    return folder / "diff.html"


def photograph(file, out):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        feature = {"name": "prefers-color-scheme", "value": "light"}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(file.as_uri())
        WebDriverWait(browser, 20).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
        rows = browser.find_elements(By.CSS_SELECTOR, ".row")
        edited = next(row for row in rows if EDITED in row.text)
        browser.execute_script("arguments[0].click()", edited)  # a real click scrolls the table sideways
        picture = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    finally:
        browser.quit()
    picture.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the picture, such as docs/diff.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photograph(page(Path(folder)), options.out.resolve())
