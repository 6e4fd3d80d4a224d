"""The layers in every notation: each verb that asks for layers reads all of them, and its hints are code that works."""

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import paramend as pm
from paramend.cli.main import cli
from paramend.errors import BadArgument, NoMatch, ParamendError
from paramend.leaves.leaves import Index
from paramend.selectors.layers import candidates, layers_of, spelled


def layer(value=1.0, size=2):
    return {"w": np.full((size, size), float(value)), "b": np.ones(size)}


LIST = {"net": {"layers": [layer(1), layer(2), layer(3)]}, "head": np.ones(1)}
SIBLINGS = {"net": {"layers_0": layer(1), "layers_1": layer(2), "layers_2": layer(3)}, "head": np.ones(1)}
MLP = {"params": {"Dense_0": layer(0, 4), "Dense_1": layer(1), "Dense_2": layer(2), "Dense_3": layer(3, 5)}}

NOTATIONS = [
    *(
        (LIST, text)
        for text in ("net/layers[*]", "net.layers[:]", "net/layers/<n>", "net.layers.<n>.**", "**/layers[*]/**")
    ),
    *((SIBLINGS, text) for text in ("net/layers_[*]", "net/layers_<n>", "net.layers_<n>.**", "**/layers_<n>")),
    (MLP, "params/Dense_[1:-1]"),
    (MLP, "params/Dense_[1:3]/**"),
]


def values(tree):
    """What tells the layers of these trees apart, in order."""
    return [leaf.flat[0] for path, leaf in pm.at(tree, "**/w")]


@pytest.mark.parametrize(("tree", "text"), NOTATIONS)
class TestEveryVerbReadsEveryNotation:
    def test_deepen(self, tree, text):
        count = 2 if tree is MLP else 3
        new, report = pm.deepen(tree, layers=text, order=[0, *range(count)])
        old = values(tree)
        at = 1 if tree is MLP else 0
        assert values(new) == [*old[: at + 1], *old[at:]]
        assert len(report.layers) == count + 1

    def test_stack_layers(self, tree, text):
        new = pm.stack_layers(tree, text, into="**/stack" if text.startswith("**") else "stack")
        (stacked,) = [leaf for path, leaf in pm.at(new, "**/w") if leaf.ndim == 3]
        expected = [x for x in values(tree) if tree is not MLP or x in (1, 2)]
        assert [x.flat[0] for x in stacked] == expected
        assert len(pm.at(new, "**")) == 3 if tree is not MLP else 6

    def test_ablate(self, tree, text):
        table = pm.ablate(tree, text, lambda t: sum(x.sum() for _, x in pm.at(t, "**/w")))
        wanted = [x for x in values(tree) if tree is not MLP or x in (1, 2)]
        assert [row.delta for row in table.rows] == [-4 * x for x in wanted]

    def test_a_text_in_a_list_is_as_many_targets_as_alone(self, tree, text):
        def score(t):
            return sum(x.sum() for _, x in pm.at(t, "**/w"))

        alone = pm.ablate(tree, text, score).rows
        assert pm.ablate(tree, [text], score).rows == alone
        assert pm.ablate(tree, (text,), score).rows == alone

    def test_init(self, tree, text):
        new = pm.init.zero_residual(tree, layers=text, family="w")
        kept = [x for x in values(tree) if tree is MLP and x in (0, 3)]
        assert [x for x in values(new) if x] == [x for x in kept if x]


@pytest.mark.parametrize("text", ["[*]", "<n>", "<n>.**", "[:]", ["0", "[1:]"], "[0:2]"])
def test_torch_verbs(text):
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 3)

        def forward(self, x):
            return x + self.fc(x)

    model = torch.nn.Sequential(Block(), Block())
    assert list(pm.block_influence(model, [torch.ones(2, 3)], layers=text)) == ["0", "1"]
    if isinstance(text, str):
        writers = pm.residual_writers(model, torch.ones(2, 3), layers=text)
        assert writers == {"fc.weight": 0.0, "fc.bias": 0.0}
        assert len(pm.deepen_(model, layers=text, order=[0, 1, 1]).layers) == 3
        assert not pm.check_live(model, lambda m: m(torch.ones(2, 3)).sum(), text).dead


def test_blocks_without_parameters_are_blocks():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(1, 1)))
    x = [torch.ones(2, 1)]
    assert list(pm.block_influence(model, x, layers="[*]")) == ["0", "1"]
    assert list(pm.block_influence(model, x, layers="1[*]")) == ["1.0", "1.1"]
    assert list(pm.block_influence(model, x, layers="<a>.<n>")) == ["1.0", "1.1"]


@pytest.mark.parametrize("into", ["l_[*]", "l_<n>", "l_<n>/**"])
def test_new_siblings(into):
    stacked = {"l": {"w": np.arange(6.0).reshape(3, 2)}}
    assert list(pm.unstack_layers(stacked, "l", into=into)) == ["l_0", "l_1", "l_2"]
    assert list(pm.unstack_layers(stacked, "l/**", into=into)) == ["l_0", "l_1", "l_2"]


@pytest.mark.parametrize("into", ["l[*]", "l/<n>", "l.<n>.**"])
def test_a_new_list(into):
    new = pm.unstack_layers({"l": {"w": np.arange(6.0).reshape(3, 2)}}, "l", into=into)
    assert [entry["w"].tolist() for entry in new["l"]] == [[0, 1], [2, 3], [4, 5]]


# ---- a target for each number -------------------------------------------------------------------------------


def score(tree):
    return float(sum(x.sum() for _, x in pm.at(tree, "**")))


def names(targets, tree=SIBLINGS):
    return [row.name for row in pm.ablate(tree, targets, score).rows]


def test_a_captured_number_is_a_target_for_each_number_wherever_it_is_written():
    assert names({"w": "net/layers_<n>/w", "head": "head"}) == ["w 0", "w 1", "w 2", "head"]
    assert names(["net/layers_<n>/w", "head"]) == [*(f"net/layers_{n}/w" for n in range(3)), "head"]


def test_under_a_name_of_its_own_an_index_is_one_target():
    assert names({"first": "net/layers_[:2]/**"}) == ["first"]


def test_two_numbers_are_a_target_for_each_pair_and_zeros_in_front_stay():
    tree = {f"s_{s}": {f"b_{n:02}": layer() for n in range(2)} for s in (0, 3)}
    found = ["s_0/b_00/**", "s_0/b_01/**", "s_3/b_00/**", "s_3/b_01/**"]
    assert names("s_<s>/b_<n>/**", tree) == found
    assert names("s_<s>/b_<n>", tree) == found
    assert names("s_3/b_[*]", tree) == found[2:]


def test_numbers_are_in_numeric_order():
    index = Index.of_names([f"h_{n}.w" for n in (10, 9, 0)])
    assert list(spelled(index, "h_<n>.w")) == ["h_0.w", "h_9.w", "h_10.w"]


@pytest.mark.parametrize("text", ["net/layers_*", "net/layers_*/**"])
def test_a_star_for_whole_layers_is_refused_with_both_ways_out(text):
    with pytest.raises(BadArgument, match="takes out 3 layers at once") as caught:
        pm.ablate(SIBLINGS, text, score)
    each, together = re.findall(r"pm\.ablate\(.*?score\)", caught.value.hint)
    space = {"pm": pm, "tree": SIBLINGS, "score": score}
    assert len(eval(each, space).rows) == 3
    assert [row.leaves for row in eval(together, space).rows] == [6]


def test_a_star_for_parts_of_layers_is_one_target():
    assert names("net/layers_*/w") == ["net/layers_*/w"]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["net.layers.<n>.**"], 3),
        (["net.layers[*]"], 3),
        (["net.layers.<n>.w", "head"], 4),
        (["--target", "w=net.layers.<n>.w", "--target", "rest=net.layers[*].b"], 4),
    ],
)
def test_the_command_reads_them_too(tmp_path, options, count):
    pm.save(LIST, tmp_path / "m.safetensors")
    (tmp_path / "score.py").write_text(
        "import paramend as pm\ndef score(t):\n    return sum(x.sum() for _, x in pm.at(t, '**'))"
    )
    args = ["ablate", str(tmp_path / "m.safetensors"), *options, "--score", str(tmp_path / "score.py"), "--json"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    assert result.output.count('"interaction"') == count


@pytest.mark.parametrize("layers", ["net.layers[*]", "net.layers.<n>", "net.layers.<n>.**"])
def test_the_commands_that_change_layers_read_them_too(tmp_path, layers):
    pm.save(LIST, tmp_path / "m.safetensors")
    for args in (
        [
            "deepen",
            str(tmp_path / "m.safetensors"),
            "--order",
            "0,1,2,2",
            "--layers",
            layers,
            "-o",
            str(tmp_path / "a.safetensors"),
        ],
        ["stack", str(tmp_path / "m.safetensors"), layers, "-o", str(tmp_path / "b.safetensors")],
    ):
        result = CliRunner().invoke(cli, args)
        assert result.exit_code == 0, result.output
    assert len(pm.open(tmp_path / "a.safetensors")) == 9
    assert len(pm.open(tmp_path / "b.safetensors")) == 3


# ---- which layers a tree has --------------------------------------------------------------------------------


def test_siblings_are_found_without_being_named():
    tree = {"l_0": layer(1), "l_1": layer(2)}
    new, _ = pm.deepen(tree, order=[0, 1, 1])
    assert values(new) == [1, 2, 2]


def test_siblings_that_differ_are_asked_about():
    with pytest.raises(BadArgument, match="4 siblings Dense_<n> are not alike") as caught:
        pm.deepen(MLP, order=[0, 0, 1])
    assert caught.value.hint == 'layers="params/Dense_[1:-1]"'


def test_lists_come_before_siblings():
    tree = {"blocks": [layer(1), layer(2)], "norm_0": layer(), "norm_1": layer()}
    assert values(pm.deepen(tree, order=[0])[0])[:1] == [1]
    index = Index.of_names(["blocks.0.w", "blocks.1.w", "norm_0.w", "norm_1.w", "norm_1.x_0.w", "norm_1.x_1.w"])
    assert [found.written(".") for found in candidates(index)] == ["blocks[*]", "norm_[*]"]


HINTS = [
    (LIST, "net/layers"),
    (LIST, "net/layers/**"),
    (LIST, "net/layers/*"),
    (LIST, "net/layer[*]"),
    (LIST, "net/layers[0,2]"),
    (LIST, "net/layers[7:]"),
    (SIBLINGS, "net/layers_"),
    (SIBLINGS, "net/layers_*"),
    (SIBLINGS, "l_<n>"),
    (SIBLINGS, "**/*[*]"),
    (MLP, "params/Dense_*"),
    (MLP, None),
    ({"l_0": layer(), "l_1": layer()}, "h_<n>"),
    ({"a": {"l_0": layer(), "l_1": layer()}, "b": {"l_0": layer(), "l_1": layer()}}, None),
]


@pytest.mark.parametrize(("tree", "text"), HINTS)
def test_every_hint_is_code_that_works(tree, text):
    with pytest.raises(ParamendError) as caught:
        pm.deepen(tree, layers=text, order=[0])
    assert caught.value.hint
    for hint in caught.value.hint.split(" or "):
        pm.deepen(tree, order=[0], **eval(f"dict({hint})"))
        if tree is not MLP or "[1:-1]" in hint:
            pm.stack_layers(tree, into="new", **eval(f"dict({hint})"))


def test_the_hint_for_a_tree_without_layers_works_too():
    tree = {"a": np.ones(1)}
    with pytest.raises(NoMatch, match="no numbered layers") as caught:
        pm.deepen(tree, order=[0])
    assert eval(caught.value.hint, {"pm": pm, "tree": tree}) == ["a"]


@pytest.mark.parametrize("into", ["l", "l_", "l_<n+1>", "a_<m>/l_<n>"])
def test_hints_for_new_layers(into):
    tree = {"l": {"w": np.ones((2, 1))}}
    with pytest.raises(BadArgument) as caught:
        pm.unstack_layers(tree, "l", into=into)
    given = eval(f"dict({caught.value.hint})")
    if "*" not in given["into"]:
        assert len(pm.unstack_layers(tree, "l", **given)) == 2


def test_numbers_filled_up_with_zeros_stay_so():
    tree = {f"h_{n:02}": {"w": np.full(1, float(n))} for n in range(3)}
    for text in ("h_[*]", "h_<n>"):
        new, report = pm.deepen(tree, layers=text, order=[0, 0, 1, 2])
        assert list(new) == ["h_00", "h_01", "h_02", "h_03"]
        assert values(new) == [0, 0, 1, 2]
        assert pm.at(new, report.new).paths == ["h_01/w"]


def test_layers_of_says_what_is_wrong():
    index = Index.of_names(["h_0.w", "h_1.w"])
    with pytest.raises(BadArgument, match='layers="h" does not end in a key with the number') as caught:
        layers_of(index, "h")
    assert caught.value.hint == 'layers="h_[*]"'
