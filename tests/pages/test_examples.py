"""Examples of what the functions of pages/ give, which import matplotlib."""

from paramend.pages.drawing import draw
from paramend.pages.page import Page


def test_draw():
    figure = draw(Page("t", "h", ["a/x", "a/y", "b"], [1, 1, 2], groups=["new", "old", "old"]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["new", "old"]


def test_page_html():
    page = Page("diff", "1 leaf", ["a/w"], [4], groups=["changed"])
    assert (page.html().count("</html>"), page.html().count("src=")) == (1, 0)
