"""Examples of what the functions of reports/ give."""

from paramend.reports.progress import Meter
from paramend.reports.report import Line, _head, fold, table
from paramend.reports.tables import aligned
from paramend.reports.wording import closest, described, listing, plural


def test_meter():
    heard = []
    meter = Meter(heard.append, total=10)
    meter.advance(4, "a")
    assert [(event.done, event.total, event.at) for event in heard] == [(4, 10, "a")]


def test_fold():
    layers = [Line((f"layers/{i}/{name}",), ("float32[4]",)) for i in range(12) for name in "wb"]
    assert str(table(fold(layers))) == "  layers/{0..11}/w  12 × float32[4]\n  layers/{0..11}/b  12 × float32[4]"
    assert str(table(fold(layers, limit=1))) == "  layers/{0..11}/**  24 leaves"


def test_closest():
    assert closest("dense_0", ["Conv_0", "Dense_0", "Dense_1"], limit=1) == ["Dense_0"]
    assert closest("blok_7", [f"block_{i}" for i in range(5000)], limit=1) == ["block_7"]


def test_head():
    assert _head("layers/{0..11}/mlp/w", 2) == "layers/{0..11}"


def test_aligned(capsys):
    for line in aligned([("name", "size"), ("bias", "8"), ("kernel", "1024")], right="lr"):
        print(line)
    assert capsys.readouterr().out == "name    size\nbias       8\nkernel  1024\n"


def test_plural():
    assert (plural(1, "leaf", "leaves"), plural(148, "leaf", "leaves")) == ("1 leaf", "148 leaves")


def test_listing():
    assert listing(["a", "b", "c"], limit=2) == "a, b, and 1 more"


def test_described():
    assert (described(5), described("text"), described(dict)) == ("an int", "a str", "the class dict")
