"""Renames: what wildcards take and give, positions; against a slow reference and by properties."""

import re

import pytest
from hypothesis import given, settings, strategies as st

from paramend.errors import BadArgument, OutOfRange, RenameClash, SelectorError
from paramend.leaves.leaves import Index
from paramend.selectors.patterns import parse
from paramend.selectors.renames import Pick, keys, pieces, rename


def renamed(names, source, target, *, into=None):
    """The new names, by old name."""
    index = Index.of_names(names)
    over = rename(source, target, indexed=into is not None).over(index)
    there = None if into is None else Index.of_names(into).names
    return {names[number]: ".".join(pieces(path, there)) for number, path in over.items()}


@pytest.mark.parametrize(
    ("source", "target", "name", "new"),
    [
        ("a.b", "c", "a.b", "c"),
        ("**", "params.**", "a.b", "params.a.b"),
        ("module.**", "**", "module.a.b", "a.b"),
        ("**.kernel", "**.weight", "a.b.kernel", "a.b.weight"),
        ("h.<n>.**", "layers.<n>.**", "h.10.w", "layers.10.w"),
        ("h_<n>.**", "layers.<n+1>.**", "h_9.w", "layers.10.w"),
        ("h.<n>.w", "l.<2*n+1>.w", "h.3.w", "l.7.w"),
        ("h.<n>.e.<m>", "e.<m>.h.<n>", "h.3.e.5", "e.5.h.3"),
        ("h_<n>.w", "x_<n>.y_<n>", "h_2.w", "x_2.y_2"),
        ("b_<n>.w", "b_<n+1>.w", "b_009.w", "b_010.w"),
        ("b_<n>.w", "c_<n>.w", "b_007.w", "c_007.w"),
        ("*_proj.w", "proj_*.w", "q_proj.w", "proj_q.w"),
        ("*.*", "*.x.*", "a.b", "a.x.b"),
        ("{q,k,v}.w", "{query,key,value}.w", "k.w", "key.w"),
        ("{a*,b*}.*", "*.{x*,y*}", "bc.d", "d.yc"),
        ("**.a.**", "**.b.**", "a.a.a", "a.a.b"),
        ("layers[-1].**", "head.**", "layers.2.w", "head.w"),
        ("Dense_[-1].w", "out.w", "Dense_10.w", "out.w"),
    ],
)
def test_new_names(source, target, name, new):
    names = list(dict.fromkeys([name, *("layers.0.w", "layers.1.w", "Dense_9.w")[: 3 * ("[" in source)]]))
    assert renamed(names, source, target) == {name: new}


def test_index_counts_in_the_tree_where_the_rest_matches():
    names = ["enc.layers.0.layers.0.w", "enc.layers.0.layers.1.w", "enc.layers.1.layers.0.w"]
    # the last outer layer, whose inner layer 0 is not the last of an inner family
    assert renamed(names, "enc.layers[-1].**", "top.**") == {names[2]: "top.layers.0.w"}
    assert renamed(names, "**.layers[-1].w", "**.last") == {
        names[1]: "enc.layers.0.last",
        names[2]: "enc.layers.1.last",
    }


def test_positions_pair_up_in_the_order_written():
    small, big = ["l.0.w", "l.1.w", "l.2.w"], [f"l.{i}.w" for i in range(5)]
    assert renamed(small, "l[-1].**", "l[-1].**", into=big) == {"l.2.w": "l.4.w"}
    assert renamed(small, "l[-2:].**", "l[-2:].**", into=big) == {"l.1.w": "l.3.w", "l.2.w": "l.4.w"}
    assert renamed(small, "l[2,0].w", "l[0,4].w", into=big) == {"l.2.w": "l.0.w", "l.0.w": "l.4.w"}
    assert renamed(small, "l[::-1].w", "l[:3].w", into=big) == {"l.0.w": "l.2.w", "l.1.w": "l.1.w", "l.2.w": "l.0.w"}
    assert renamed(["head.w"], "head.**", "Dense_[-1].**", into=["Dense_0.w", "Dense_11.w"]) == {"head.w": "Dense_11.w"}


def test_positions_that_the_other_tree_lacks():
    with pytest.raises(OutOfRange, match=r"no l\[3\]"):
        renamed(["a.w"], "a.w", "l[3].w", into=["l.0.w"])
    with pytest.raises(OutOfRange, match=r"number 2, only 1"):
        renamed(["l.0.w", "l.1.w"], "l[:].w", "l[:].w", into=["l.0.w"])
    with pytest.raises(OutOfRange, match=r"names 2 keys"):
        renamed(["a.w"], "a.w", "l[:].w", into=["l.0.w", "l.1.w"])
    (path,) = rename("a", "l[-1]", indexed=True).over(Index.of_names(["a"])).values()
    assert isinstance(path[0], Pick)


@pytest.mark.parametrize(
    ("source", "target", "error", "message"),
    [
        ("a/**", "b", BadArgument, r"0 × `\*\*`"),
        ("a", "b/*", BadArgument, r"1 × `\*`"),
        ("{a,b}", "{a,b,c}", BadArgument, "do not pair up"),
        ("{a*,b}", "{a,b*}", BadArgument, "do not pair up"),
        ("a/<n>", "b/<m>", SelectorError, "captured nowhere"),
        ("a/<n>/<n>", "b/<n>", SelectorError, "captured twice"),
        ("a/<2*n>", "b/<n>", BadArgument, "is arithmetic"),
        ("a", "b[-1]", BadArgument, "cannot hold an index"),
    ],
)
def test_refused(source, target, error, message):
    with pytest.raises(error, match=message):
        rename(source, target)


def test_caret_points_at_the_number():
    with pytest.raises(SelectorError) as caught:
        rename("h/<n>/**", "layers/<m+1>/**")
    assert "layers/<m+1>/**"[slice(*caught.value.span)] == "<m+1>"


def test_negative_number():
    with pytest.raises(RenameClash, match="is -1 where n is 0"):
        renamed(["h.0"], "h.<n>", "l.<n-1>")


def test_no_name_left():
    with pytest.raises(RenameClash, match="a would have no name left"):
        renamed(["a", "a.b"], "a.**", "**")


def test_keys_keep_their_pieces_together():
    index = Index.of_names(["mlp/~/linear_0", "mlp/~/linear_1"], "/")

    def new(source, target):
        return [[text for text, _ in keys(path)] for path in rename(source, target).over(index).values()]

    assert new("mlp/~/linear_<n>", "mlp/~/linear_<n+1>") == [["mlp/~/linear_1"], ["mlp/~/linear_2"]]
    assert new("mlp/**", "net/inner/**") == [["net/inner/~/linear_0"], ["net/inner/~/linear_1"]]
    assert new("mlp/~/**", "mlp/**") == [["mlp/linear_0"], ["mlp/linear_1"]]
    assert new("mlp/~/**", "**") == [["linear_0"], ["linear_1"]]
    assert new("**", "params/**") == [["params/mlp/~/linear_0"], ["params/mlp/~/linear_1"]]
    assert new("**", '"params"/**') == [["params", "mlp/~/linear_0"], ["params", "mlp/~/linear_1"]]
    assert new("mlp/~/*", '"x/y"/*') == [["x/y", "linear_0"], ["x/y", "linear_1"]]


# ---- properties ------------------------------------------------------------------------------------------------

PIECES = ["a", "b", "q_proj", "h_0", "h_1", "h_12", "0", "3", "x7y"]
NAMES = st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(".".join), max_size=8, unique=True)
# source segment, target segment
PAIRS = [("a", "c"), ("b", "a"), ("*", "*"), ("*_proj", "proj_*"), ("{a,b}", "{b,a}"), ("{h_*,a}", "{g_*,z}")]
PAIRS += [("h_<n>", "h_<n+1>"), ("<n>", "<2*n>"), ("x<n>y", "y<n>"), ("**", "**")]
RULES = st.lists(st.sampled_from(PAIRS), min_size=1, max_size=4).filter(
    lambda pairs: sum("<n>" in source for source, _ in pairs) <= 1
)


def reference(pairs, name):
    """The new name by one regular expression over the whole name, or None."""
    groups, expression = [], ""
    for source, target in pairs:
        if source == "**":
            expression += r"((?:/[^/]+)*)"
            groups.append(target)
        else:
            text = re.escape(source).replace(r"\*", "[^/]*").replace("<n>", r"(?<![0-9])[0-9]+(?![0-9])")
            text = re.sub(r"\\{(.*)\\}", lambda m: f"(?:{m[1].replace(',', '|')})", text)
            expression += f"/({text})"
            groups.append(target)
    found = re.fullmatch(expression, "/" + name.replace(".", "/"))
    if found is None:
        return None
    out = []
    for (source, target), taken in zip(pairs, found.groups(), strict=True):
        out += [taken.strip("/")] if source == "**" else [reference_piece(source, target, taken)]
    return ".".join(part.replace("/", ".") for part in out if part)


def reference_piece(source, target, taken):
    match source:
        case "*":
            return taken
        case "*_proj":
            return "proj_" + taken.removesuffix("_proj")
        case "{a,b}":
            return {"a": "b", "b": "a"}[taken]
        case "{h_*,a}":
            return "z" if taken == "a" else "g" + taken[1:]
        case "h_<n>":
            return f"h_{int(taken[2:]) + 1}"
        case "<n>":
            return str(2 * int(taken))
        case "x<n>y":
            return "y" + taken[1:-1]
    return target


INDEXED = ["h_[-1].**", "**.h_[:2].**", "*[0].**", "**.[1:]", "{a,b}[:].**", "**.h_[::-1]", "x[0]y.**", "**.b[-1:].*"]


@settings(max_examples=150, deadline=None)
@given(NAMES, st.sampled_from(INDEXED))
def test_an_index_takes_what_the_selector_takes(names, source):
    index = Index.of_names(names)
    pattern = parse(source)
    try:
        found = pattern.find(index.names)
    except OutOfRange:
        return
    target = ".".join("*" if segment == "*[0]" else segment for segment in source.split("."))
    assert set(rename(source, target, indexed=True).over(index)) == set(found)


def texts(pairs):
    return ".".join(source for source, _ in pairs), ".".join(target for _, target in pairs)


@settings(max_examples=150, deadline=None)
@given(NAMES, RULES)
def test_agrees_with_the_reference(names, pairs):
    expected = {name: new for name in names if (new := reference(pairs, name)) is not None}
    index = Index.of_names(names)
    over = rename(*texts(pairs)).over(index)
    assert {names[number]: ".".join(pieces(path)) for number, path in over.items()} == expected
