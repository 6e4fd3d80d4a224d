"""Pages: one file without a network, driven in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import CannotWrite
from paramend.pages.page import Column, Histogram, Page

HOSTILE = "z/</script><script>alert(1)</script>/w"


def small():
    paths = [f"layers/{i}/{n}" for i in range(12) for n in ("kernel", "bias")] + ["norm", HOSTILE]
    groups = ["changed" if "7" in path else "identical" for path in paths[:-2]] + ["added", "removed"]
    sizes = [64 if "kernel" in path else 8 for path in paths]
    return Page(
        "diff of a & b",
        "2 of 26 leaves <changed>",
        paths,
        sizes,
        [
            Column("max abs", [0.5 if group == "changed" else None for group in groups]),
            Column("rel", [i / 7 for i in range(len(paths))]),
            Column("spec", [f"float32[{size}]" for size in sizes], "text"),
            Column("odd", [float("nan"), float("inf"), *range(len(paths) - 2)]),
        ],
        groups,
        histograms={14: Histogram(-1.0, 1.0, [1, 2, 3, 4], [4, 3, 2, 1])},
    )


def embedded(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_names_cannot_break_out_of_the_page():
    html = small().html()
    assert html.count("<script") == 2
    assert embedded(html)["paths"][-1] == HOSTILE
    assert "diff of a &amp; b" in html and "&lt;changed&gt;" in html


def test_names_cannot_turn_the_direction_of_writing():
    name = "w\u202egnp.exe\x1b[2J\u2066"
    html = Page(name, name, [name], [1], [Column("text", [name], "text")], [name], name).html()
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x1b]", html)
    assert embedded(html)["paths"] == ["w\\u202egnp.exe\\x1b[2J\\u2066"]
    report = pm.diff({name: np.ones(1)}, {name: np.zeros(1)})
    for said in (str(report), report.to_html(), repr(pm.at({name: np.ones(1)}, "**"))):
        assert not re.search("[\u202e\u2066\x1b]", said) and "\\u202e" in said


def test_the_page_asks_for_nothing_from_anywhere():
    html = small().html()
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttp|import\(""", html)
    assert "default-src 'none'" in html


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    report = pm.graft({"a": np.zeros(2)}, {"a": np.ones(2)})[1]
    text = report.to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text() == text == report.to_html(tmp_path / "r.html")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CannotWrite, match="not an HTML page"):
        report.to_html(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(CannotWrite, match="there is no folder"):
        report.to_html(tmp_path / "nowhere" / "r.html")


def test_reports_are_pages_in_notebooks():
    report = pm.graft({"a": np.zeros(2), "b": np.zeros(1)}, {"a": np.ones(2)})[1]
    assert report._repr_html_().startswith("<iframe srcdoc=")
    assert embedded(report.to_html())["groups"] == ["copied", "fresh"]
    table = pm.ablate({"a": np.ones(2), "b": np.ones(1)}, ["a", "b"], lambda p: p["a"].sum() - p["b"].sum())
    assert embedded(table.to_html())["groups"] == ["score falls", "score rises"]
    many = Page("t", "headline", [f"w{i}" for i in range(30_000)], [1] * 30_000)
    assert many.notebook() == "<pre>headline</pre>"


def test_the_commands_write_pages(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(2), "b": np.zeros(1)}, tmp_path / "t.safetensors")
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "s.safetensors")
    save_file = safetensors.numpy.save_file
    save_file({f"l.{i}.w": np.ones(2) for i in range(3)}, tmp_path / "l.safetensors")
    (tmp_path / "score.py").write_text("def score(tree):\n    return tree['a'].sum()\n")
    for args in (
        ["graft", "s.safetensors", "--into", "t.safetensors", "--dry-run"],
        ["ablate", "s.safetensors", "a", "--score", "score.py"],
        ["diff", "s.safetensors", "t.safetensors"],
        ["stack", "l.safetensors", "l.<n>", "--dry-run"],
        ["deepen", "l.safetensors", "--drop", "1", "--dry-run"],
    ):
        command = [tmp_path / arg if arg.endswith((".safetensors", ".py")) else arg for arg in args]
        done = CliRunner().invoke(cli, [*map(str, command), "--html", str(tmp_path / "r.html")], prog_name="paramend")
        assert done.exit_code == (args[0] == "diff"), done.output
        assert embedded((tmp_path / "r.html").read_text())["paths"][0] in ("a", "l.w", "l.0")


def test_drawings(tmp_path):
    target = {f"Dense_{i}": {"kernel": np.zeros((4, 4)), "bias": np.zeros(4)} for i in range(4)}
    source = {f"Dense_{i}": {"kernel": np.ones((4, 4)), "bias": np.ones(4)} for i in range(2)}
    figure = pm.graft(target, source)[1].plot()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["copied", "fresh"]
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert len(widths) == 1 + 4 + 8 and abs(sum(widths) - 3) < 1e-9
    figure.savefig(tmp_path / "g.svg")
    figure.savefig(tmp_path / "g.png")
    assert (tmp_path / "g.svg").read_text().count("Dense_3") >= 1
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    stats = pm.stats(source).plot()
    assert not stats.legends and len({patch.get_facecolor() for patch in stats.axes[0].patches}) > 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=30), st.integers(0, 29))
def test_histograms_count_what_numpy_counts(values, shift):
    before = np.array(values, "float32")
    after = np.roll(before, shift) * np.float32(0.5)
    found = pm.diff({"w": before}, {"w": after}, histograms=True).histograms
    finite = [side[np.isfinite(side)].astype("float64") for side in (before, after)]
    both = np.concatenate(finite)
    if before.tobytes() == after.tobytes() or not both.size:
        assert found == {}
        return
    one = found["w"]
    assert [sum(one.before), sum(one.after)] == [side.size for side in finite]
    assert one.low <= both.min() and one.high >= both.max()
    expected = [np.histogram(side, len(one.before), (one.low, one.high))[0].tolist() for side in finite]
    assert [one.before, one.after] == expected


# ---- in a browser --------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 120  # seconds that a busy machine may take
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1300,1000",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program, chromedriver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    if not program or not chromedriver:
        pytest.fail("no chromium with a chromedriver on PATH; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def show(browser, page, folder, scheme="light"):
    file = folder / "page.html"
    file.write_text(page.html() if isinstance(page, Page) else page, "utf-8")
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(file.as_uri())
    WebDriverWait(browser, PATIENCE).until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
    return browser


def complaints(browser):
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def rows(browser):
    found = browser.find_elements(By.CSS_SELECTOR, ".row")
    return [row.find_elements(By.TAG_NAME, "span")[0].text for row in found]


def count(browser):
    return browser.find_element(By.ID, "count").text


def detail(browser):
    return browser.find_element(By.ID, "detail").text


@pytest.mark.browser
def test_it_loads_searches_sorts_and_shows_a_leaf(browser, tmp_path):
    show(browser, small(), tmp_path)
    assert complaints(browser) == []
    assert count(browser) == "26 of 26 leaves"
    search = browser.find_element(By.ID, "search")
    search.send_keys("7/k")
    WebDriverWait(browser, PATIENCE).until(lambda b: count(b) == "1 of 26 leaves")
    assert rows(browser) == ["layers/7/kernel"]
    browser.execute_script("document.querySelector('.row').click()")
    assert "layers/7/kernel" in detail(browser)
    assert "changed" in detail(browser) and "0.5" in detail(browser)
    assert browser.find_elements(By.CSS_SELECTOR, "#detail svg path")
    search.send_keys(Keys.ESCAPE)
    WebDriverWait(browser, PATIENCE).until(lambda b: count(b) == "26 of 26 leaves")
    search.send_keys("layers/*bias")
    WebDriverWait(browser, PATIENCE).until(lambda b: count(b) == "12 of 26 leaves")
    search.send_keys(Keys.ESCAPE)
    browser.find_element(By.CSS_SELECTOR, '[title="Sort by rel"]').click()  # the greatest first
    assert rows(browser)[0] == HOSTILE
    browser.find_element(By.CSS_SELECTOR, '[title="Sort by rel"]').click()
    assert rows(browser)[0] == "layers/0/kernel"
    browser.find_element(By.CSS_SELECTOR, '[data-group="identical"]').click()
    assert count(browser) == "4 of 26 leaves"
    assert complaints(browser) == []


@pytest.mark.browser
def test_the_keyboard_does_it_all(browser, tmp_path):
    show(browser, small(), tmp_path)
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    canvas = browser.find_element(By.ID, "map")
    browser.execute_script("arguments[0].focus()", canvas)
    keys = ActionChains(browser)
    keys.send_keys(Keys.ARROW_DOWN).perform()  # the first child of the root
    assert detail(browser).startswith("layers")
    ActionChains(browser).send_keys(Keys.ENTER, Keys.ARROW_DOWN, Keys.ARROW_RIGHT).perform()
    assert detail(browser).startswith("layers/1")
    assert "layers" in browser.find_element(By.ID, "trail").text
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).perform()
    assert detail(browser).startswith("layers/1/bias")
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert detail(browser).startswith("all leaves")
    table = browser.find_element(By.ID, "rows")
    browser.execute_script("arguments[0].focus()", table)
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    assert detail(browser).startswith("layers/7/kernel")  # the table begins with what changed
    assert complaints(browser) == []


@pytest.mark.browser
def test_a_click_on_the_map_shows_the_leaf(browser, tmp_path):
    show(browser, Page("t", "h", ["a/x", "b"], [90, 10], [], ["one", "two"]), tmp_path)
    canvas = browser.find_element(By.ID, "map")
    size = canvas.size
    click = ActionChains(browser)
    click.move_to_element_with_offset(canvas, -size["width"] // 4, size["height"] // 2 - 5).click().perform()
    assert detail(browser).startswith("a/x")
    click = ActionChains(browser)
    click.move_to_element_with_offset(canvas, size["width"] // 2 - 10, size["height"] // 2 - 5).click().perform()
    assert detail(browser).startswith("b")


@pytest.mark.browser
def test_a_hundred_thousand_leaves(browser, tmp_path):
    paths = [f"model.layers.{i}.experts.{j}.w{k}" for i in range(50) for j in range(500) for k in range(4)]
    rng = np.random.default_rng(0)
    page = Page("big", "100,000 leaves", paths, [1000] * len(paths), [Column("norm", rng.random(len(paths)).tolist())])
    show(browser, page, tmp_path)
    assert complaints(browser) == []
    assert count(browser) == "100,000 of 100,000 leaves"
    assert len(rows(browser)) < 60
    browser.find_element(By.ID, "search").send_keys("layers.49.experts.499.")
    WebDriverWait(browser, PATIENCE).until(lambda b: count(b) == "4 of 100,000 leaves")
    assert rows(browser)[0] == "model.layers.49.experts.499.w0"


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser, tmp_path, scheme):
    show(browser, small(), tmp_path, scheme)

    def luminance(colour):
        channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    paper = luminance(browser.execute_script(style, "body", "backgroundColor"))
    assert (paper < 0.1) == (scheme == "dark")
    for what in ("h1", "#headline", ".row", "dt", ".keys"):
        ink = luminance(browser.execute_script(style, what, "color"))
        light, dark = max(ink, paper), min(ink, paper)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, what  # WCAG 2.2, 1.4.3


@pytest.mark.browser
def test_groups_are_told_apart_without_colour(browser, tmp_path):
    show(browser, small(), tmp_path)
    chips = browser.execute_script(
        "return [...document.querySelectorAll('#groups canvas')].map((c) => {"
        "const d = c.getContext('2d').getImageData(0, 0, 14, 14).data; const grey = [];"
        "for (let i = 0; i < d.length; i += 4) grey.push((.21 * d[i] + .72 * d[i + 1] + .07 * d[i + 2]));"
        "const mean = grey.reduce((a, b) => a + b) / grey.length; return grey.map((g) => Number(g < mean - 8)); })"
    )
    textures = {tuple(chip) for chip in chips}
    assert len(textures) == len(chips) == 4


@pytest.mark.browser
def test_the_reports_open_without_complaint(browser, tmp_path):
    target = {f"Dense_{i}": {"kernel": np.zeros((4, 4)), "bias": np.zeros(4)} for i in range(4)}
    source = {f"Dense_{i}": {"kernel": np.ones((4, 4)), "bias": np.ones(4)} for i in range(2)}
    show(browser, pm.graft(target, source)[1].to_html(), tmp_path)
    assert count(browser) == "8 of 8 leaves"
    table = pm.ablate(source, ["Dense_0/**", "Dense_1/**"], lambda p: p["Dense_0"]["bias"].sum(), pairs=True)
    show(browser, table.to_html(), tmp_path)
    assert count(browser) == "3 of 3 rows"
    before = {"layers": [{"w": np.full(3, float(i)), "b": np.arange(i + 1.0)} for i in range(3)], "h": np.ones(2)}
    after = pm.at(before, "layers[1]/*").add(0.5)
    show(browser, pm.diff(before, after, histograms=True).to_html(), tmp_path)
    assert count(browser) == "7 of 7 leaves"
    browser.execute_script("document.querySelector('.row').click()")
    assert "changed" in detail(browser) and "0.5" in detail(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, "#detail svg path")) == 2
    show(browser, pm.stats(before, histograms=True).to_html(), tmp_path)
    assert browser.find_element(By.ID, "colour").get_attribute("value") != ""
    assert complaints(browser) == []
