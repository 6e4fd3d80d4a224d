"""The selector grammar: text ↔ pattern, errors that point at the character, and agreement with a slow matcher."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

from paramend.errors import OutOfRange, SelectorError
from paramend.leaves.leaves import Index
from paramend.leaves.paths import SPECIAL, write_piece
from paramend.selectors.grammar import AnyPieces, Either, Literal, Number, Piece, Positions, Quoted, Star
from paramend.selectors.patterns import Pattern, parse
from paramend.selectors.selector import resolve
from paramend.trees.tree import Tree
from support import reference_matcher as reference

# ---- text ↔ pattern

texts = st.text(alphabet='abAB01_-~ ü*{}[]<>,"\\', min_size=1, max_size=6)
literals = texts.map(Literal)
stars = st.just(Star())
ints = st.integers(-12, 12)
slices = st.tuples(st.none() | ints, st.none() | ints, st.none() | ints.filter(bool))


def alternating(*atoms):
    """Atoms as the parser gives them: no two literals and no two stars side by side."""
    return st.lists(st.one_of(*atoms), min_size=1, max_size=4).filter(
        lambda found: all(type(a) is not type(b) or isinstance(a, Either) for a, b in pairwise(found))
    )


options = st.one_of(alternating(literals, stars).map(tuple), st.just(()))
eithers = st.lists(options, min_size=1, max_size=3).map(lambda found: Either(tuple(found)))
numbers = st.builds(Number, st.sampled_from(["n", "layer", "_x1"]), st.integers(0, 9), st.integers(-9, 9))
positions = st.lists(ints | slices, min_size=1, max_size=3).map(lambda items: Positions(tuple(items)))
pieces = (
    alternating(literals, stars, eithers, numbers, positions)
    .filter(lambda atoms: sum(isinstance(atom, Positions) for atom in atoms) <= 1)
    .map(lambda atoms: Piece(tuple(atoms)))
)
segments = st.one_of(st.just(AnyPieces()), st.text(max_size=6).map(Quoted), pieces)
patterns = st.lists(segments, min_size=1, max_size=5).map(lambda found: Pattern(tuple(found)))


@settings(max_examples=100, deadline=None)
@given(patterns)
def test_every_pattern_can_be_written_and_read_back(pattern):
    assert parse(str(pattern)) == pattern
    assert parse(pattern.write(".")) == pattern


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='ab01*{}[]<>n,:-"\\/.+', max_size=12))
def test_any_text_is_a_pattern_or_a_selector_error_within_it(text):
    try:
        pattern = parse(text)
    except SelectorError as error:
        start, stop = error.span
        assert error.text == text
        assert 0 <= start <= len(text)
        assert start < stop <= len(text) + 1
        assert text in str(error)
    else:
        assert parse(str(pattern)) == pattern


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=8))
def test_any_text_can_be_written_as_a_piece(text):
    names = {}
    index = Index()
    index.add(names, text, 0)
    index.add(names, text + "x", 1)
    index.add(names, "x" + text, 2)
    assert parse(write_piece(text)).find(names) == [0]


READS = [
    ("a/b", (Piece((Literal("a"),)), Piece((Literal("b"),)))),
    ("a.b", (Piece((Literal("a"),)), Piece((Literal("b"),)))),
    ("*", (Piece((Star(),)),)),
    ("**", (AnyPieces(),)),
    ("*_proj", (Piece((Star(), Literal("_proj"))),)),
    ("{kernel,bias}", (Piece((Either(((Literal("kernel"),), (Literal("bias"),))),)),)),
    ("{a,}", (Piece((Either(((Literal("a"),), ())),)),)),
    ("{*_a,b}", (Piece((Either(((Star(), Literal("_a")), (Literal("b"),))),)),)),
    ("Dense_[-1]", (Piece((Literal("Dense_"), Positions((-1,)))),)),
    ("h[ 4 : 8 : 2 ]", (Piece((Literal("h"), Positions(((4, 8, 2),)))),)),
    ("h[0,3,-1:]", (Piece((Literal("h"), Positions((0, 3, (-1, None, None))))),)),
    ("<n>", (Piece((Number("n"),)),)),
    ("h_<n+1>", (Piece((Literal("h_"), Number("n", 1, 1))),)),
    ("<2*n-3>", (Piece((Number("n", 2, -3),)),)),
    ('"a/b".c', (Quoted("a/b"), Piece((Literal("c"),)))),
    (r"a\*b", (Piece((Literal("a*b"),)),)),
    (r"a\/b", (Quoted("a/b"),)),
    (r'"say \"hi\""', (Quoted('say "hi"'),)),
    ('""', (Quoted(""),)),
    ("a b", (Piece((Literal("a b"),)),)),
]


@pytest.mark.parametrize(("text", "segments"), READS, ids=[text for text, _ in READS])
def test_what_a_selector_says(text, segments):
    assert parse(text).segments == segments


# ---- errors point at the character: the text, the words it must hold, and the place, underlined

MALFORMED = [
    ("", "empty", "^"),
    ("/a", "a key is missing", "^"),
    ("a//b", "a key is missing", "  ^"),
    ("a/", "a key is missing", "  ^"),
    ("a/b.", "a key is missing", "    ^"),
    ("a..b", "a key is missing", "  ^"),
    ("**x", "`**` stands alone", "~~^"),
    ("a**", "`**` stands alone", " ~^"),
    ("a/***", "`**` stands alone", "  ~~^"),
    ("{a**}", "`**` stands alone", "  ~^"),
    ("Dense_[-1/kernel", "expected ']'", "      ~~^"),
    ("Dense_[", "expected ']'", "      ^"),
    ("a/b[1.2]", "expected ']'", "   ~^"),
    ("Dense_[]", "an index is an int or a slice", "       ^"),
    ("Dense_[a]", "an index is an int or a slice", "       ^"),
    ("Dense_[0,x1]", "an index is an int or a slice", "         ~^"),
    ("Dense_[1,]", "an index is an int or a slice", "         ^"),
    ("Dense_[--1]", "an index is an int or a slice", "       ~~^"),
    ("h[::0]", "cannot step by 0", "  ~~^"),
    ("h[1:2:3:4]", "an index is an int or a slice", "  ~~~~~~^"),
    ("h[0][1]", "one key takes one index", "    ~~^"),
    ("a/{b,c", "expected '}'", "  ~~~^"),
    ("a/{b/c}", "expected '}'", "  ~^"),
    ("{a{b}}", "cannot stand inside", "  ^"),
    ("{a,[0]}", "cannot stand inside", "   ^"),
    ("{a]}", "cannot stand inside", "  ^"),
    ("{a>}", "cannot stand inside", "  ^"),
    ("a}", "closes nothing", " ^"),
    ("a]b", "closes nothing", " ^"),
    ("a>b", "closes nothing", " ^"),
    ("a,b", "has no meaning here", " ^"),
    ('a"b"', "has no meaning here", " ^"),
    ('"a"b', "a quoted key stands alone", "~~~^"),
    ('x/"a', "to close the quote", "  ~^"),
    ('"a\\', "to close the quote", "~~^"),
    ("a\\", "a backslash ends", " ^"),
    ("<>", "a captured number", "~^"),
    ("h/<1>", "a captured number", "  ~~^"),
    ("h/<n", "a captured number", "  ~^"),
    ("h/<n*2>", "a captured number", "  ~~~~^"),
    (r"*\/b", "an escaped separator", "~~~^"),
    (r"x/{a,b\.c}", "an escaped separator", "  ~~~~~~~^"),
    ("h[" + "9" * 30 + "]", "an index is an int or a slice", "  " + "~" * 29 + "^"),
]


@pytest.mark.parametrize(("text", "words", "caret"), MALFORMED, ids=[text or "(empty)" for text, _, _ in MALFORMED])
def test_a_grammar_error_points_at_the_character(text, words, caret):
    with pytest.raises(SelectorError) as caught:
        parse(text)
    message = str(caught.value)
    assert words in message
    assert f"\n    {text}\n    {caret}" in message.partition("\n\nhint")[0] + "\n"
    assert message.split("\n")[3].rstrip() == "    " + caret
    assert isinstance(caught.value, ValueError)


# ---- one example for each line of the grammar, on names alone

TREE = {
    "params": {
        "Dense_0": {"kernel": 0, "bias": 1},
        "Dense_2": {"kernel": 2, "bias": 3},
        "Dense_10": {"kernel": 4, "bias": 5},
        "layers": [{"wq": 6, "wo": 7}, {"wq": 8, "wo": 9}, {"wq": 10, "wo": 11}],
    },
    "mlp/~/linear_0": {"w": 12},
    "mlp/~/linear_1": {"w": 13},
    "model.layers.0.w": 14,
    "model.layers.1.w": 15,
    "model.layers.11.w": 16,
    "model.experts.3.layers.0.w": 17,
    "a/b": {"c": 18},
    "a": {"b": {"c": 19}},
    "a*b": 20,
    "": 21,
    "x//y": 22,
    "f(x)_1": 23,
    "f[x]": 24,
    "block_0_w": 25,
    "block_3_w": 26,
}

MATCHES = [
    ("params/Dense_0/kernel", [0]),
    ("params.Dense_0/kernel", [0]),
    ("model.layers.0.w", [14]),
    ("model/layers/0/w", [14]),
    ("params/Dense_*/kernel", [0, 2, 4]),
    ("params/*/kernel", [0, 2, 4]),
    ("*/kernel", []),
    ("**/kernel", [0, 2, 4]),
    ("params/**", [*range(12)]),
    ("params/**/kernel", [0, 2, 4]),
    ("params/**/Dense_0/**/bias", [1]),
    ("**/**", [*range(27)]),
    ("params/Dense_2/{kernel,bias}", [2, 3]),
    ("**/w{q,o}", [*range(6, 12)]),
    ("**/{w*,bias}", [1, 3, 5, *range(6, 18)]),
    ("params/Dense_[-1]/kernel", [4]),
    ("params/Dense_[:2]/kernel", [0, 2]),
    ("params/Dense_[0,2]/kernel", [0, 4]),
    ("params/Dense_[::-2]/kernel", [0, 4]),
    ("params/Dense_[7:]/kernel", []),
    ("params/layers[-1]/wq", [10]),
    ("params/layers[0:3:2]/wq", [6, 10]),
    ("params.layers[1].*", [8, 9]),
    ("params/layers/1/*", [8, 9]),
    ("params/layers/[1]/*", [8, 9]),
    ("params/layers/<n>/wq", [6, 8, 10]),
    ("params/Dense_<n>/kernel", [0, 2, 4]),
    ("mlp/~/linear_0/w", [12]),
    ("mlp/~/linear_[-1]/w", [13]),
    ("mlp/**", [12, 13]),
    ("model.layers[-1].w", [16]),
    ("**.layers[0].w", [14, 17]),
    ("model.layers[0].w", [14]),
    ("model.*.3.**", [17]),
    ("a/b/c", [18, 19]),
    ('"a/b".c', [18]),
    ('"a"."b".c', [19]),
    ('"a.b"/c', []),
    (r"a\/b/c", [18]),
    (r"a\*b", [20]),
    ("a*b", [20]),
    ('"a*b"', [20]),
    ('""', [21]),
    ('"x//y"', [22]),
    ("x*y", [22]),
    ("{f(x),g}_*", [23]),
    (r"f\[x\]", [24]),
    ("block_[-1]_w", [26]),
    ("block_<n>_w", [25, 26]),
]


def names_of(tree):
    """The tree of names of nested dicts and lists whose leaves are numbers."""
    index = Index()

    def enter(node):
        out = {}
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            index.add(out, key, child if isinstance(child, int) else enter(child))
        return out

    return enter(tree)


@pytest.mark.parametrize(("text", "leaves"), MATCHES, ids=[text for text, _ in MATCHES])
def test_what_a_selector_matches(text, leaves):
    assert parse(text).find(names_of(TREE)) == leaves
    read = reference.read_tree(TREE, is_leaf=lambda node: isinstance(node, int))
    assert [leaf.value for leaf in reference.select(text, read)] == leaves


def widened(node):
    """The tree with many more keys at every level, at which no search may get lost."""
    if not isinstance(node, dict):
        return [widened(child) for child in node] if isinstance(node, list) else node
    return {key: widened(child) for key, child in node.items()} | {f"more{char}": 1000 for char in "abcdefghijklmnopqr"}


@pytest.mark.parametrize(("text", "leaves"), MATCHES, ids=[text for text, _ in MATCHES])
def test_wide_trees_are_searched_no_other_way(text, leaves):
    assert [number for number in parse(text).find(names_of(widened(TREE))) if number < 1000] == leaves


OUT_OF_RANGE = [
    ("params/Dense_[3]/kernel", "Dense_<n> has 3 numbered entries", "params/Dense_[2]/kernel"),
    ("params/Dense_[-4]/kernel", "Dense_<n> has 3 numbered entries", "params/Dense_[-3]/kernel"),
    ("params/Dense_[0,9]/kernel", "Dense_<n> has 3 numbered entries", "params/Dense_[0,2]/kernel"),
    ("params/layers[5]/wq", "layers has 3 numbered entries", "params/layers[2]/wq"),
    ("**/linear_[2]/w", "linear_<n> has 2 numbered entries", "**/linear_[1]/w"),
]


@pytest.mark.parametrize(("text", "words", "near"), OUT_OF_RANGE, ids=[text for text, _, _ in OUT_OF_RANGE])
def test_an_integer_position_must_exist(text, words, near):
    with pytest.raises(OutOfRange, match=words) as caught:
        parse(text).find(names_of(TREE))
    assert caught.value.near == (near,)
    assert parse(near).find(names_of(TREE))


def test_a_position_counts_only_where_the_rest_of_the_selector_matches():
    tree = {"enc": {"Dense_0": {"kernel": 0}}, "dec": {"Dense_0": {"scale": 1}, "Dense_1": {"scale": 2}}}
    assert parse("**/Dense_[1]/scale").find(names_of(tree)) == [2]  # enc has no second Dense, and no scale either
    with pytest.raises(OutOfRange):
        parse("**/Dense_[1]/kernel").find(names_of(tree))


def test_two_positions_out_of_range_are_out_of_range():
    tree = {"layers": [{"heads": [{"w": 0}, {"w": 1}]}]}
    with pytest.raises(OutOfRange, match="position 5"):
        parse("layers[5]/heads[7]/w").find(names_of(tree))


# ---- agreement with the reference matcher

KEYS = [
    *("a", "b", "A", "kernel", "layers", "Dense", "Dense_0", "Dense_1", "Dense_9", "Dense_10", "layers_0", "layers_01"),
    *("0", "1", "10", "007", "x1y", "x2y", "12345678901234567890", "mlp/~/linear_0", "mlp/~/linear_1", "mlp"),
    *("model.layers.0.w", "model.layers.1.w", "model.layers.1", "layers.0", "layers/1", "a.b", "a/b", "a//b", ".", ""),
    *("a*b", "a{b", "[0]", "<n>", "a,b", 'a"b', "a\\b", "k(v)", "ü1", "²", 0, 1, 2, -1, None),
]
arrays = st.builds(lambda: np.zeros(()))
trees = st.recursive(
    st.one_of(arrays, arrays, arrays, st.sampled_from([None, "text", 1.5])),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(KEYS), inner, max_size=6), st.lists(inner, min_size=1, max_size=4)
    ),
    max_leaves=25,
)
indices = st.lists(
    st.one_of(st.integers(-3, 3).map(str), st.sampled_from([":", "1:", ":2", "::-1", "-2:", "5:"])),
    min_size=1,
    max_size=2,
)


@st.composite
def wild(draw, text):
    """One piece of a path turned into something that often matches it."""
    digits = [i for i, char in enumerate(text) if char in "0123456789"]
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return "*"
    if kind == 1 and text:
        cut = draw(st.integers(0, len(text)))
        return escaped(text[:cut]) + "*" + (escaped(text[cut + 1 :]) if draw(st.booleans()) else "")
    if kind == 2:
        other = draw(st.sampled_from(["a", "kernel", "Dense_*", ""]))
        return "{" + other + "," + escaped(text) + "}"
    if kind == 3 and digits:
        return escaped(text[: digits[0]]) + "<n>" + escaped(text[digits[-1] + 1 :])
    if kind in (4, 5) and digits:
        index = "[" + ",".join(draw(indices)) + "]"
        return escaped(text[: digits[0]]) + index + escaped(text[digits[-1] + 1 :])
    if kind == 6:
        return escaped(text) + "[" + ",".join(draw(indices)) + "]"
    if kind == 7:
        return draw(st.sampled_from(["*[0]", "*_[-1]", "[0]", "[:]", "{Dense,layers}_[0]", "{a,Dense_}*", "x<n>*"]))
    return write_piece(text)


def escaped(text):
    return "".join("\\" + char if char in SPECIAL else char for char in text)


@st.composite
def selector_near(draw, leaves):
    """A selector made from the path of some leaf."""
    steps = draw(st.sampled_from(leaves)).steps
    out = []
    for step in steps:
        kind = draw(st.integers(0, 11))
        if kind == 0:
            out.append("**")
        elif kind == 1:
            out += ["**", write_piece(step.text)]
        elif kind == 2:
            continue
        elif kind == 3 and step.key is not None:
            out.append('"' + str(step.key[1]).replace("\\", "\\\\").replace('"', '\\"') + '"')
        else:
            out.append(draw(wild(step.text)))
    return draw(st.sampled_from("/.")).join(out) or "**"


def numbered(tree):
    """The tree with a number in each array, to tell leaves apart."""
    count = iter(range(10**6))

    def visit(node):
        if isinstance(node, np.ndarray):
            return np.asarray(next(count))
        if isinstance(node, dict):
            return {key: visit(child) for key, child in node.items()}
        return [visit(child) for child in node] if isinstance(node, list) else node

    return visit(tree)


def outcome(find):
    """What a matcher says: the leaves, or the kind of error."""
    try:
        return sorted(find())
    except (OutOfRange, reference.OutOfRange):
        return "out of range"


@settings(max_examples=100, deadline=None)
@given(trees, st.data())
def test_the_compiled_matcher_agrees_with_the_slow_one(tree, data):
    tree = numbered(tree)
    leaves = reference.read_tree(tree, is_leaf=lambda node: isinstance(node, np.ndarray))
    assume(len(leaves) > 1)
    taken = Tree(tree)
    for _ in range(4):
        text = data.draw(selector_near(leaves))
        try:
            parse(text)
        except SelectorError:
            continue  # the pieces of a path, put together at random, need not make a selector
        slow = outcome(lambda text=text: [int(leaf.value) for leaf in reference.select(text, leaves)])
        fast = outcome(lambda text=text: [int(taken.read(n)) for n in parse(text).find(taken.index.names)])
        assert fast == slow, text


@settings(max_examples=100, deadline=None)
@given(trees, st.data())
def test_the_path_of_a_leaf_selects_that_leaf(tree, data):
    taken = Tree(numbered(tree))
    index = taken.index
    assume(index.numbers)
    for number in index.numbers:
        twins = [other for other in index.numbers if index.pieces(other) == index.pieces(number)]
        assert sorted(resolve(index.path(number), taken)) == sorted(twins)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="/."), min_size=1, max_size=5), min_size=1, unique=True))
def test_names_in_a_flat_table_are_read_as_nested_ones(names):
    flat = Index.of_names([f"model.{name}.weight" for name in names])
    nested = names_of({"model": {name: {"weight": number} for number, name in enumerate(names)}})
    for name in names:
        for text in (f"model/{write_piece(name)}/weight", "model/*/weight", "**", "**/weight"):
            assert parse(text).find(flat.names) == parse(text).find(nested)


def test_a_star_in_brackets_is_all_of_them():
    assert parse("layers[*]/w") == parse("layers[:]/w")
    assert str(parse("Dense_[ * ]")) == "Dense_[:]"
    with pytest.raises(SelectorError):
        parse("layers[**]")
