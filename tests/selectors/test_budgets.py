"""Selectors and names made to hang a matcher: the work is linear in pattern × name, and hints stop in time.

Most tests here assert little: without these bounds they would not end.
"""

import random
import re
from itertools import pairwise

import numpy as np
import pytest

import paramend as pm
from paramend.errors import NoMatch, OutOfRange, SelectorError, Unsupported
from paramend.leaves.leaves import Index
from paramend.selectors.division import acceptor, divide, taken
from paramend.selectors.grammar import Either, Literal, Piece, Reader, Star
from paramend.selectors.layers import candidates, without_rest
from paramend.selectors.patterns import parse
from paramend.selectors.renames import pieces, rename

ATOMS = ["*", "a", "b", "1", "<n>", "{a,b}", "{a,ab,*}", "{,a*,1}", "ab"]


def as_regex(atoms):
    """What a piece means, as a regular expression that tries every way."""
    source = ""
    for atom in atoms:
        match atom:
            case Literal(text):
                source += re.escape(text)
            case Star():
                source += "(.*)"
            case Either(options):
                inner = ["".join(re.escape(a.text) if isinstance(a, Literal) else ".*" for a in o) for o in options]
                source += f"({'|'.join(inner)})"
            case _:
                source += "(?<![0-9])([0-9]{1,18})(?![0-9])"
    return re.compile(source, re.DOTALL)


def test_wildcards_take_what_those_of_a_regular_expression_take():
    rng = random.Random(0)
    matched = 0
    for _ in range(1500):
        written = "".join(rng.choice(ATOMS) for _ in range(rng.randint(1, 6)))
        (piece,) = Reader(re.sub(r"\*+", "*", written)).segments()
        if not isinstance(piece, Piece):
            continue
        text = "".join(rng.choice("ab11") for _ in range(rng.randint(0, 7)))
        found = as_regex(piece.atoms).fullmatch(text)
        assert acceptor(piece.atoms)(text) == (found is not None), (written, text)
        parts = taken(piece.atoms, text)
        assert (parts and [part for _, part in parts]) == (found and list(found.groups())) or not found.groups()
        spans = divide(piece.atoms, text)
        if found:
            matched += 1
            wild = [text[i:j] for atom, (i, j) in zip(piece.atoms, spans, strict=True) if not isinstance(atom, Literal)]
            assert wild == list(found.groups())
            assert all(a[1] == b[0] for a, b in pairwise(spans))
    assert matched > 100


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        ("*a*a*a*a*a*a*a*ab", "a" * 60),
        ("*a" * 30 + "*b", "a" * 3000),
        ("{a,b}" * 40, "a" * 39),
        ("{a,aa}" * 60, "a" * 200),
        ("{a*,*a,aa}" * 20 + "d", "a" * 60 + "b"),
        ("*<n>" * 20, "1a" * 100),
        ("**/" * 60 + "x", "/".join("a" * 100)),
        ("**/a[0]/" * 12 + "x", "/".join("a0" for _ in range(40))),
    ],
)
def test_what_would_take_forever_matches_nothing(selector, name):
    index = Index.of_names([name, "c.d"], "/")
    assert parse(selector).find(index.names) == []
    with pytest.raises(NoMatch, match="matches none of 2 leaves"):
        len(pm.at({name: np.ones(1), "c": {"d": np.ones(1)}}, selector))


def test_choices_that_overlap_still_match():
    tree = {"a" * 41: np.ones(1)}
    assert len(pm.at(tree, "{a,aa}" * 40)) == 1
    assert len(pm.at(tree, "*a" * 20)) == 1


def test_positions_that_are_missing_at_every_depth():
    tree = {"w": np.ones(1)}
    for _ in range(60):
        tree = {"a0": tree, "a1": {"w": np.ones(1)}}
    assert len(pm.at(tree, "**/a[0]/**/a[0]/**/a[1]/w").paths) == 58
    with pytest.raises(OutOfRange, match=r"position 7 is out of range: a<n> has 2 numbered entries"):
        len(pm.at(tree, "**/a[7]/**/a[7]/**/a[8]/w"))


def test_an_index_with_many_faults_is_mended_at_once():
    tree = {f"a{i}": np.ones(1) for i in range(3)}
    with pytest.raises(OutOfRange) as caught:
        len(pm.at(tree, f"a[{','.join(map(str, range(3, 2000)))}]"))
    assert caught.value.near == ("a[2]",)


def test_a_rename_tries_each_place_once():
    index = Index.of_names(["/".join("a" * 120)], "/")
    wild = "/".join(["**"] * 12)
    assert rename(f"{wild}/b", f"{wild}/c").over(index) == {}
    moved = rename(f"{wild}/a", f"{wild}/c").over(index)
    assert pieces(moved[0]) == (*["a"] * 119, "c")
    wide = Index.of_names(["a" * 60])
    assert pieces(rename("{a,aa}" * 40, "{b,bb}" * 40).over(wide)[0]) == ("b" * 20 + "bb" * 20,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a/" * 1000 + "a", "at most 1,000 keys"),
        ('"' + "a/" * 1000 + 'a"', "at most 1,000 keys"),
        (f"a[{'1:,' * 101}:]", "at most 100 slices"),
        (f"a[{' ' * 100_000}x]", "an int or a slice"),
    ],
)
def test_selectors_have_limits(text, message):
    with pytest.raises(SelectorError, match=message) as caught:
        pm.sel(text)
    assert len(str(caught.value)) < 1000


def test_hints_over_many_and_long_names():
    many = {f"layer_{i}_kernel_of_a_name": np.ones(1) for i in range(4000)}
    for selector in ("{q,k}{w,x}{e,f}{u,v}{m,n}", "k" * 5000, "**/**/x", "layer_<n>_x", "layers_[3]", "*q*_*_*z"):
        with pytest.raises(NoMatch, match="matches none of 4,000 leaves"):
            len(pm.at(many, selector))
    with pytest.raises(NoMatch, match='did you mean "Dense_0/kernel"'):
        len(pm.at({"Dense_0": {"kernel": np.ones(1)}}, "dense_0/kernel"))


def test_layers_are_found_among_many_families():
    index = Index.of_names([f"x{i}_{j}/w" for i in range(4000) for j in range(2)], "/")
    assert len(candidates(index)) == 4000
    assert without_rest("a" + "/**" * 50_000) == "a"
    assert without_rest("/**" * 50_000 + "a") == "/**" * 50_000 + "a"


def test_algebra_nested_deeper_than_the_stack():
    tree = {"w": np.ones(1)}
    chosen = pm.sel("**")
    for _ in range(2000):
        chosen = chosen & pm.sel("w")
    with pytest.raises(Unsupported, match="the selector is nested deeper than the calls that are left"):
        len(pm.at(tree, chosen))
