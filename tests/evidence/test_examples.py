"""Examples of what the functions of evidence/ give."""

import ml_dtypes
import numpy as np

from paramend.evidence.comparisons import Pair, same_bytes
from paramend.evidence.distances import Gap, bits, ulps
from paramend.evidence.histograms import histograms
from paramend.evidence.measures import Tally, total, widened
from paramend.evidence.pairing import chosen, matches
from paramend.evidence.permutations import transposed
from paramend.evidence.reading import _spread
from paramend.evidence.spectra import spectrum
from paramend.evidence.statistics import StatsRow, shown, together
from paramend.evidence.stats import measured
from paramend.evidence.streams import stream_of
from paramend.reports.progress import Meter
from paramend.selectors.selector import sel
from paramend.trees.tree import Tree


def test_chosen():
    old, new = Tree({"a": np.ones(1), "b": np.ones(1)}), Tree({"a": np.ones(1), "c": np.ones(1)})
    assert chosen(~sel("c"), old, new) == ({0, 1}, {0})


def test_gap():
    gap = Gap()
    gap.add(np.array([3.0, 4.0]), np.array([3.0, 4.0]))
    gap.add(np.array([0.0]), np.array([0.5]))
    assert (gap.distance().differing, gap.distance().relative_l2, gap.distance().max_abs) == (1, 0.1, 0.5)


def test_ulps():
    after = np.nextafter(np.float32(1), np.float32(2))
    found = ulps(np.array([1.0, -0.0, -1e-45], "float32"), np.array([after, 0.0, 1e-45], "float32"))
    assert repr(found) == "array([1, 0, 2], dtype=uint32)"


def test_histograms():
    tree = Tree([np.array([0.0, 1.0, 1.0, 4.0]), np.array([2.0, 2.0, np.nan, 4.0])])
    found = histograms({"w": (stream_of(tree, 0), stream_of(tree, 1))}, bins=4)["w"]
    assert (found.low, found.high, found.before, found.after) == (0.0, 4.0, [1, 2, 0, 1], [0, 0, 2, 1])


def test_tally():
    tally = Tally()
    tally.add(np.array([3.0, np.nan]))
    tally.add(np.array([4], "int8"))
    assert tally.measures().norm == 5.0


def test_matches(capsys):
    for match in matches(Tree({"fc.weight": np.ones(1), "x": np.ones(1)}), Tree({"fc": {"weight": np.ones(1)}})):
        print(match.path, match.a, match.b)
    assert capsys.readouterr().out == "fc/weight 0 0\nx 1 None\n"


def test_transposed():
    a = np.arange(6.0).reshape(2, 3)
    assert transposed(Pair(Tree([a]), 0, Tree([a.T.copy()]), 0)) == (1, 0)


def test_spectrum():
    stream = stream_of(Tree([np.array([[3.0, 0, 0], [0, 0, 4]])]), 0)
    found = spectrum(stream, out_first=False)
    assert (round(found.spectral_norm, 6), found.units, found.dead) == (4.0, 3, 1)


def test_together():
    rows = [StatsRow("a", (1,), "float32", 4, mean=1.0, std=0.0, norm=1.0, zeros=0), StatsRow("b", (0,), "int8", 0)]
    assert (together(rows)["mean"], together(rows)["norm"], together(rows)["min"]) == (1.0, 1.0, None)


def test_measured():
    tree = Tree([np.array([3.0, 4.0]), np.array(["a"])])
    found = measured(tree, [0, 1], Meter(None, 0))
    assert (found[0].norm, found[1]) == (5.0, "str32 is not a number")


def test_widened():
    assert repr(widened(np.array([1.5, -0.0], ml_dtypes.float8_e5m2))) == "array([ 1.5, -0. ])"
    assert widened(np.array(["a"])) is None


def test_same_bytes():
    assert (same_bytes(np.array([np.nan]), np.array([np.nan])), same_bytes(np.array([0.0]), np.array([-0.0]))) == (
        True,
        False,
    )


def test_bits():
    assert repr(bits(np.array([-0.0], "float32"))) == "array([2147483648], dtype=uint32)"


def test_spread():
    assert list(_spread(range(5), lambda n: n * n)) == [0, 1, 4, 9, 16]


def test_shown():
    assert (shown(None), shown(1234), shown(0.123456)) == ("-", "1,234", "0.1235")


def test_total():
    assert repr((total([1e16, 1.0, -1e16]), total([1e308, 1e308]))) == "(1.0, inf)"
