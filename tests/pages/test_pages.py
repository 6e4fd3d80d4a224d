"""Pages: one file without a network, driven in a real browser."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import CannotWrite
from paramend.pages.page import COLOURS, Column, Histogram, Page, Scale

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


def test_a_page_is_headed_by_the_names_of_what_it_tells_of(tmp_path):
    for run in ("1", "2"):
        (tmp_path / run).mkdir()
        pm.save({"w": np.full(2, float(run))}, tmp_path / run / "model.safetensors")
    pm.save({"w": np.ones(2)}, tmp_path / "base.safetensors")
    base, first, second = tmp_path / "base.safetensors", *sorted(tmp_path.glob("*/model.safetensors"))
    html = pm.diff(base, second).to_html()
    assert "<h1>base.safetensors → model.safetensors</h1>" in html
    assert "<title>base.safetensors → model.safetensors · diff</title>" in html
    assert "<h1>1/model.safetensors → 2/model.safetensors</h1>" in pm.diff(first, pm.open(second)).to_html()
    assert "<h1>before → after</h1>" in pm.diff({"w": np.ones(1)}, {"w": np.zeros(1)}).to_html()
    assert "<h1>base.safetensors</h1>" in pm.stats(base).to_html()
    assert "<h1>base.safetensors ← model.safetensors</h1>" in pm.graft(pm.open(base), pm.open(second))[1].to_html()
    assert "<h1>graft</h1>" in pm.graft({"w": np.ones(1)}, {"w": np.zeros(1)})[1].to_html()


def test_maps_are_in_natural_order_and_what_did_not_change_comes_last():
    order = [10, 2, 1]
    page = Page(
        "t", "h", [f"h.{n}" for n in order], order, [Column("n", order)], ["identical", "changed", "identical"],
        histograms={0: Histogram(0.0, 1.0, [10])},
    )  # fmt: skip
    data = embedded(page.html())
    assert data["paths"] == ["h.1", "h.2", "h.10"] and data["sizes"] == data["columns"][0]["values"] == [1, 2, 10]
    assert data["groups"] == ["changed", "identical"] and data["group"] == [1, 0, 1]
    assert list(data["histograms"]) == ["2"]
    (colour, texture), still = data["styles"]
    assert still == ["", 0] and colour and texture


def test_columns_that_say_nothing_are_left_out():
    before = {"a": np.zeros(3, "float32"), "b": np.ones(3, "float32"), "c": np.ones(3, "float32")}
    after = before | {"a": np.ones(3, "float32")}  # a billion units in the last place
    columns = {column["name"]: column["table"] for column in embedded(pm.diff(before, after).to_html())["columns"]}
    assert columns == {"relative l2": True, "max abs": True, "differing": True, "spec": False}
    near = before | {"b": np.nextafter(before["b"], np.float32(2))}
    assert "max ulp" in [column["name"] for column in embedded(pm.diff(before, near).to_html())["columns"]]
    alone = embedded(pm.diff({"b": before["b"]}, {"b": near["b"]}).to_html())["columns"]
    assert all(column["table"] for column in alone) and "spec" in [column["name"] for column in alone]


def test_scales():
    assert Scale.of([3.0, None, 1.0]) == Scale(1.0, 3.0, "linear")
    assert Scale.of([0, 1e-6, float("inf"), 1.0]) == Scale(1e-6, 1.0, "log")
    assert Scale.of([-2.0, 1.0]) == Scale(-2.0, 2.0, "signed")
    assert Scale.of([0.0, 0.0]) == Scale(0.0, 0.0, "linear")
    assert Scale.of([None, float("nan")]) is None


def test_pairs_are_linked_to_their_targets_and_layers_to_the_old_ones():
    table = pm.ablate({"a": np.ones(2), "b": np.ones(1)}, ["a", "b"], lambda p: p["a"].sum() - p["b"].sum(), pairs=True)
    data = embedded(table.to_html())
    assert (data["chart"], data["ends"], data["links"]) == ("bars", ["a", "b"], [[0], [1], [0, 1]])
    layers = {f"h.{n}": {"w": np.full(2, float(n))} for n in range(4)}
    report = pm.deepen(layers, layers="h.<n>", order=pm.depth.Order([0, 2, 2], of=4))[1]
    data = embedded(report.to_html())
    assert (data["chart"], data["ends"]) == ("arrows", ["h.0", "h.1", "h.2", "h.3"])
    assert (data["links"], data["group"]) == ([[0], [2], [2]], [1, 1, 0])
    assert data["groups"] == ["copied", "kept"]


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
    browser.get_log("browser")  # what was said of an earlier page
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


def luminance(colour):
    parts = re.findall("..", colour[1:]) if colour.startswith("#") else re.findall(r"\d+", colour)[:3]
    channels = [int(part, 16 if colour.startswith("#") else 10) / 255 for part in parts]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(browser, tmp_path, scheme):
    show(browser, small(), tmp_path, scheme)
    style = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    paper = browser.execute_script(style, "body", "backgroundColor")
    assert (luminance(paper) < 0.1) == (scheme == "dark")
    for what in ("h1", "#headline", ".row", "dt", ".keys"):
        assert contrast(browser.execute_script(style, what, "color"), paper) >= 4.5, what  # WCAG 2.2, 1.4.3
    shares = "[0, .1, .3, .5, .7, .9, 1].map((share) => mixed(stops, share))"
    ramps = f"return [style.quiet, ...[style.ramp, style.signed].flatMap((stops) => {shares})]"
    for cell in (*COLOURS, *browser.execute_script(ramps)):
        assert contrast(browser.execute_script("return ink(arguments[0])", cell), cell) >= 4.5, cell


DRAWN = """
const at = boxes.find(([node]) => node.path === arguments[0]), ratio = devicePixelRatio;
const one = (from, x, y, w, h) => { const seen = {}, d = from.getImageData(x, y, w, h).data;
  for (let i = 0; i < d.length; i += 4) { const c = [...d.slice(i, i + 3)].join(); seen[c] = (seen[c] || 0) + 1; }
  return Object.entries(seen).sort((a, b) => b[1] - a[1])[0][0]; };
const chip = document.querySelector(`[data-group="${arguments[1]}"] canvas`);
return [one(pen, (at[1] + 1) * ratio, (at[2] + at[4] / 2) * ratio, Math.max(1, (at[3] - 2) * ratio), 24 * ratio),
        chip && one(chip.getContext("2d"), 0, 0, 14, 14)];
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_legend_matches_what_is_drawn(browser, tmp_path, scheme):
    page = small()
    show(browser, page, tmp_path, scheme)
    shown = [button.text.split()[0] for button in browser.find_elements(By.CSS_SELECTOR, "#groups button")]
    assert shown == ["changed", "added", "removed", "identical"]
    colours = set()
    for group in shown:
        path = page.paths[max(i for i, name in enumerate(page.groups) if name == group)]
        drawn, chip = browser.execute_script(DRAWN, path, group)
        assert drawn == chip, group
        colours.add(drawn)
    assert len(colours) == 4
    browser.execute_script("const s = document.getElementById('colour'); s.value = '1'; s.onchange()")
    assert not any(chip.is_displayed() for chip in browser.find_elements(By.CSS_SELECTOR, "#groups canvas"))


@pytest.mark.browser
def test_a_figure_has_a_scale(browser, tmp_path):
    columns = [Column("wide", [1e-6, 0.5, 1.0]), Column("signed", [-2.0, 0.0, 1.0]), Column("near", [1.0, 1.5, 2.0])]
    show(browser, Page("t", "h", ["a", "b", "c"], [1, 1, 1], columns, colour="wide"), tmp_path)
    found = []
    for value in "012":
        browser.execute_script(
            "const s = document.getElementById('colour'); s.value = arguments[0]; s.onchange()", value
        )
        found.append(browser.find_element(By.ID, "scale").text.split())
    assert found == [["1.000e-6", "1", "(log", "scale)"], ["-2", "2"], ["1", "2"]]
    ends = browser.execute_script("return [mixed(style.ramp, 0), mixed(style.ramp, 1), colourOf(0), colourOf(2)]")
    assert ends[:2] == ends[2:]


@pytest.mark.browser
def test_one_changed_leaf_of_thousands_is_seen(browser, tmp_path):
    paths = [f"layers.{i}.experts.{j}.{w}" for i in range(20) for j in range(50) for w in ("up", "down", "bias")]
    groups = ["changed" if path == "layers.3.experts.7.bias" else "identical" for path in paths]
    show(browser, Page("t", "h", paths, [1 if "bias" in path else 1000 for path in paths], [], groups), tmp_path)
    drawn, chip = browser.execute_script(DRAWN, "layers.3.experts.7.bias", "changed")
    assert drawn == chip and rows(browser)[0] == "layers.3.experts.7.bias"


@pytest.mark.browser
def test_bars_matrices_and_arrows(browser, tmp_path):
    tree = {"a": np.ones(2), "b": np.ones(1), "c": np.ones(1)}
    table = pm.ablate(tree, ["a", "b", "c"], lambda p: 3 * p["a"].sum() - p["b"].sum(), pairs=True)
    show(browser, table.to_html(), tmp_path)
    drawn = "return boxes.map(([node, x, y, w, h]) => [node.path, Math.round(x), Math.round(y)])"
    found = browser.execute_script(drawn)
    assert [path for path, *_ in found[:3]] == ["a", "b", "c"] and len(found) == 3 + 9
    cells = {(x, y): path for path, x, y in found[3:]}
    assert len(cells) == 9 and {path: [*cells.values()].count(path) for path in ("a", "a + b")} == {"a": 1, "a + b": 2}
    layers = {f"h.{n}": {"w": np.full(2, float(n))} for n in range(3)}
    report = pm.deepen(layers, layers="h.<n>", order=pm.depth.Order([0, 1, 1, 2]))[1]
    show(browser, report.to_html(), tmp_path)
    assert [path for path, *_ in browser.execute_script(drawn)] == ["h.0", "h.1", "h.2", "h.3"]
    browser.execute_script("document.getElementById('map').focus()")
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    assert detail(browser).startswith("h.2\nlayer\ncopied")
    assert complaints(browser) == []


@pytest.mark.browser
def test_a_narrow_screen_needs_no_scrolling_sideways(browser, tmp_path):
    names = [f"model.language_model.layers.{i}.self_attn.{x}_projection.weight" for i in range(12) for x in "qkvo"]
    before = {name: np.ones(3) for name in names}
    after = before | {names[5]: np.full(3, 2.0)}
    targets = [f"{name.rpartition('.')[0]}.*" for name in names[:3]]
    reports = [
        pm.diff(before, after),
        pm.stats(after),
        pm.ablate(before, targets, lambda p: p[names[0]].sum(), pairs=True),
        pm.deepen({f"h.{n}": {"w": np.ones(2)} for n in range(3)}, layers="h.<n>", order=[0, 1, 1, 2])[1],
    ]
    size = {"width": 420, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        for report in reports:
            show(browser, report.to_html(), tmp_path)
            for box in ("html", "#rows"):
                over = f"const e = document.querySelector('{box}'); return e.scrollWidth - e.clientWidth"
                assert browser.execute_script(over) == 0, box
        show(browser, reports[0].to_html(), tmp_path)
        assert [head.text for head in browser.find_elements(By.CSS_SELECTOR, "#head button")][:2] == ["path", "state"]
        first = browser.find_element(By.CSS_SELECTOR, ".row span")
        head, _, tail = first.text.replace("\n", "").partition("…")
        assert (
            first.get_attribute("title") == names[5] and names[5].startswith(head) and names[5].endswith(tail) and tail
        )
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


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
