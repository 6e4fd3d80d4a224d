"""Names of leaves: keys split into pieces as they read, and paths that read back."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import paramend as pm
from paramend.leaves.leaves import Index
from paramend.leaves.paths import SPECIAL, labels, natural, number_of, text_of, write_path, write_piece
from paramend.selectors.patterns import parse

PIECES = [
    ("kernel", ["kernel"]),
    (3, ["3"]),
    ("mlp/~/linear_0", ["mlp", "~", "linear_0"]),
    ("model.layers.0.weight", ["model", "layers", "0", "weight"]),
    ("a.b/c", ["a", "b", "c"]),
    ("", [""]),
    ("/", ["/"]),
    ("a//b", ["a//b"]),
    ("a/", ["a/"]),
    (".a", [".a"]),
    ("a..b", ["a..b"]),
    (None, ["None"]),
    (1.5, ["1", "5"]),
    (("a", 0), ["('a', 0)"]),
]


@pytest.mark.parametrize(("key", "pieces"), PIECES, ids=[repr(key) for key, _ in PIECES])
def test_a_key_is_read_piece_by_piece(key, pieces):
    assert [text_of(label) for label in labels(key)] == pieces


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("kernel", "kernel"),
        ("a b", "a b"),
        ("größe", "größe"),
        ("a*b", r"a\*b"),
        ("**", r"\*\*"),
        ("h[0]", r"h\[0\]"),
        ("{a,b}", r"\{a\,b\}"),
        ("<n>", r"\<n\>"),
        ('say "hi"', r"say \"hi\""),
        ("back\\slash", r"back\\slash"),
        ("", '""'),
        ("a//b", '"a//b"'),
        ('"/', r'"\"/"'),
    ],
)
def test_a_piece_is_written_as_a_selector_for_it(text, written):
    assert write_piece(text) == written


@pytest.mark.parametrize(
    ("keys", "separator", "path"),
    [
        (["params", "Dense_0", "kernel"], "/", "params/Dense_0/kernel"),
        (["layers", 0, "weight"], ".", "layers.0.weight"),
        (["mlp/~/linear_0", "w"], "/", "mlp/~/linear_0/w"),
        (["fc.weight"], "/", "fc.weight"),
        (["state", "fc.weight"], "/", "state/fc.weight"),
        (["a//b", ""], "/", '"a//b"/""'),
        ([], "/", ""),
    ],
)
def test_keys_are_joined_by_the_separator_and_keep_their_own(keys, separator, path):
    assert write_path([label for key in keys for label in labels(key)], separator) == path


keys = st.one_of(
    st.text(max_size=5),
    st.text(alphabet='ab01/.*{}[]<>,"\\ ', max_size=6),
    st.integers(-3, 12),
    st.sampled_from(["0", "00", "1", "a/b", "a.b", "layers.0", "'", "\n", "🙂", "\u200b", "None", "[-1]", "**"]),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(keys, min_size=1, max_size=5), st.sampled_from("/."))
def test_a_path_reads_back_as_the_same_pieces(path, separator):
    written = [label for key in path for label in labels(key)]
    names = 0
    for label in reversed(written):
        names = {label: names}
    assert parse(write_path(written, separator)).find(names) == [0]


@settings(max_examples=80, deadline=None)
@given(st.dictionaries(keys, st.dictionaries(keys, st.none(), max_size=3), min_size=1, max_size=6))
def test_every_path_selects_its_leaf_and_what_reads_the_same(shape):
    tree = {key: {inner: np.zeros(1) for inner in below} or np.zeros(1) for key, below in shape.items()}
    everything = pm.at(tree, "**")
    assert len(everything) == sum(max(len(below), 1) for below in shape.values())
    spelled = [tuple(parse(path).segments) for path in everything.paths]
    for path, segments in zip(everything.paths, spelled, strict=True):
        assert set(pm.at(tree, path).paths) >= {path}
        assert len(pm.at(tree, path)) >= spelled.count(segments)


NASTY = {
    "": {"w": np.zeros(1)},
    "a/b": {"w": np.zeros(1)},
    "a": {"b": {"w": np.zeros(1), "v.w": np.zeros(1)}},
    "a//b": np.zeros(1),
    ".": np.zeros(1),
    "a*b": np.zeros(1),
    "**": np.zeros(1),
    '"q"': np.zeros(1),
    "x[-1]": np.zeros(1),
    "{l,r}": np.zeros(1),
    "<n>": np.zeros(1),
    "back\\": np.zeros(1),
    0: np.zeros(1),
    "0": np.zeros(1),
    "00": np.zeros(1),
    (0, 1): np.zeros(1),
    "ключ 🔑": np.zeros(1),
}
NASTY_PATHS = {
    '""/w': 1,
    "a/b/w": 2,
    "a/b/v.w": 1,
    '"a//b"': 1,
    '"."': 1,
    r"a\*b": 1,
    r"\*\*": 1,
    r"\"q\"": 1,
    r"x\[-1\]": 1,
    r"\{l\,r\}": 1,
    r"\<n\>": 1,
    "back\\\\": 1,
    "0": 2,
    "00": 1,
    r"(0\, 1)": 1,
    "ключ 🔑": 1,
}


def test_paths_of_nasty_keys_are_selectors_for_them():
    assert set(pm.at(NASTY, "**").paths) == set(NASTY_PATHS)
    for path, count in NASTY_PATHS.items():
        assert len(pm.at(NASTY, path, count=count)) == count


def test_quotes_tell_apart_what_reads_the_same():
    edited = pm.at(NASTY, '"a/b"/w').fill(1)
    assert edited["a/b"]["w"] == 1
    assert edited["a"] is not None
    assert edited["a"]["b"]["w"] is NASTY["a"]["b"]["w"]
    assert pm.at(NASTY, '"a"/b/w').one() is NASTY["a"]["b"]["w"]


def test_keys_that_read_the_same_are_all_kept():
    index = Index()
    names = {}
    for number, key in enumerate([0, "0", "a.b", "a.b"]):
        index.add(names, key, number)
    assert parse("0").find(names) == [0, 1]
    assert parse("a.b").find(names) == [2, 3]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("007", 7),
        ("10", 10),
        ("", None),
        ("-1", None),
        ("x1", None),
        ("²", None),
        ("٣", None),
        ("9" * 19, None),
    ],
)
def test_a_number_is_written_in_plain_digits(text, number):
    assert number_of(text) == number


def test_numbers_inside_names_sort_as_numbers():
    names = ["Dense_10", "Dense_9", "Dense_1", "Dense", "Conv_2", "10", "9"]
    assert sorted(names, key=natural) == ["Conv_2", "Dense", "Dense_1", "Dense_9", "Dense_10", "9", "10"]


def test_the_special_characters_are_those_that_need_an_escape():
    for char in map(chr, range(32, 127)):
        needs = char in SPECIAL
        names = {char: 0} if char not in "/." else {labels(char)[0]: 0}
        assert (write_piece(char) != char) == needs
        assert parse(write_piece(char)).find(names) == [0]
