"""Examples of what the functions of selectors/ give."""

import pytest

from paramend.errors import SelectorError
from paramend.leaves.leaves import Index
from paramend.selectors.division import acceptor, taken
from paramend.selectors.grammar import Reader, captures_of
from paramend.selectors.layers import candidates, layers_of, without_rest
from paramend.selectors.misses import nearest
from paramend.selectors.nesting import PathStep, Tables
from paramend.selectors.patterns import parse
from paramend.selectors.renames import Pick, pieces, rename


def test_acceptor():
    (piece,) = Reader("*{q,k}*_proj").segments()
    assert (acceptor(piece.atoms)("attn_q_proj"), acceptor(piece.atoms)("attn_v_proj")) == (True, False)


def test_taken():
    (piece,) = Reader("*_{q,q_k}*_<n>").segments()
    assert [text for _, text in taken(piece.atoms, "a_q_k_7")] == ["a", "q", "_k", "7"]


def test_layers_of():
    index = Index.of_names([f"model.layers.{i}.w" for i in range(3)])
    assert [layers_of(index, text)[1][0].numbers for text in ("model.layers[*]", "model.layers.<n>.**")] == [
        (0, 1, 2),
        (0, 1, 2),
    ]


def test_nearest():
    names = {"params": {"Dense_0": {"kernel": 0}, "Dense_1": {"kernel": 1}}}
    assert [(str(near), leaves) for near, leaves in nearest(parse("params/dense_2/kernel"), names)] == [
        ("params/Dense_1/kernel", 1)
    ]


def test_tables():
    index = Index.of_names(["net.w", "net.b"])
    assert Tables(index).joints(index.paths[0]) == [".", "."]


def test_parse():
    assert str(parse("model.layers[-1].{q,k}_proj.weight")) == "model/layers[-1]/{q,k}_proj/weight"
    with pytest.raises(SelectorError, match=r"expected '\]' to close the index opened here"):
        parse("Dense_[-1/kernel")


def test_rename_over():
    index = Index.of_names(["h.0.w", "h.1.w", "head"])
    moved = rename("h.<n>.w", "layers.<2*n>.w").over(index)
    assert {number: pieces(path) for number, path in moved.items()} == {
        0: ("layers", "0", "w"),
        1: ("layers", "2", "w"),
    }


def test_pieces():
    index = Index.of_names(["Dense_0.w", "Dense_9.w"])
    assert pieces((Pick(parse("Dense_[-1]").segments[0], None), PathStep("w")), index.names) == ("Dense_9", "w")


def test_captures_of():
    assert captures_of("stages.<s>.blocks.<n>.**") == ["s", "n"]


def test_without_rest():
    assert (without_rest("layers/<n>/**"), without_rest("layers[*]")) == ("layers/<n>", "layers[*]")


def test_candidates():
    assert [found.written("/") for found in candidates(Index.of_names(["l_0/w", "l_1/w", "head/w"], "/"))] == ["l_[*]"]
