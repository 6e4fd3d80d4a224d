"""Ablation: scores without each target equal those of models edited by hand, and the tree is as it was."""

import json
import math
from itertools import pairwise

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from click.testing import CliRunner
from flax import nnx

import paramend as pm
from paramend.ablation.methods import METHODS
from paramend.cli.main import cli
from paramend.errors import BadArgument, NoMatch, SpecMismatch, Unsupported
from support.numerics import assert_close, bound


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x + linen.Dense(8)(nnx.tanh(linen.Dense(16)(x)))


class Model(linen.Module):
    @linen.compact
    def __call__(self, x):
        for i in range(3):
            x = Block(name=f"block_{i}")(x)
        return linen.Dense(4, name="head")(x)


@pytest.fixture(scope="module")
def flax_model():
    x = jax.random.normal(jax.random.key(1), (32, 8))
    params = Model().init(jax.random.key(0), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # biases too
    return params, lambda p: jnp.square(Model().apply(p, x)).mean()


def assert_same_score(found, wanted):
    """Three blocks with sums of 8 and 16 terms, a head with 8, and a mean of 32 × 4: float32, compiled or not."""
    assert_close(found, float(wanted), terms=3 * (8 + 16) + 8 + 32 * 4, scale=max(1.0, abs(wanted)), dtype="float32")


def bits(tree):
    return [(np.asarray(x).dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


TARGETS = {f"block {i}": f"**/block_{i}/**" for i in range(3)}


@pytest.mark.numeric
def test_each_target_scores_as_the_tree_edited_by_hand_and_one_trace_does_it(flax_model):
    params, score = flax_model
    before = bits(params)
    table = pm.ablate(params, TARGETS, score)
    assert table.traces == 1
    assert_same_score(table.baseline, score(params))
    for i, row in enumerate(table.rows):
        by_hand = {"params": dict(params["params"])}
        by_hand["params"][f"block_{i}"] = jax.tree.map(jnp.zeros_like, params["params"][f"block_{i}"])
        assert_same_score(row.score, score(by_hand))
        assert row.delta == row.score - table.baseline
        assert (row.leaves, row.parameters) == (4, 8 * 16 + 16 + 16 * 8 + 8)
    assert bits(params) == before
    assert pm.ablate(params, "params/block_<n>/**", score).rows[2].score == table.rows[2].score


@pytest.mark.numeric
def test_a_batch_gives_the_same_scores_in_one_trace(flax_model):
    params, score = flax_model
    one = pm.ablate(params, TARGETS, score, pairs=True, how="permuted", seed=3)
    for batch in (2, 16):
        many = pm.ablate(params, TARGETS, score, pairs=True, how="permuted", seed=3, batch=batch)
        assert many.traces == 1
        assert [row.name for row in many.rows] == [row.name for row in one.rows]
        for row, alone in zip(many.rows, one.rows, strict=True):
            assert_same_score(row.score, alone.score)


@pytest.mark.numeric
def test_pairs_and_how_far_they_act_together(flax_model):
    params, score = flax_model
    table = pm.ablate(params, TARGETS, score, pairs=True)
    assert [row.targets for row in table.rows[3:]] == [
        ("block 0", "block 1"),
        ("block 0", "block 2"),
        ("block 1", "block 2"),
    ]
    pair = table["block 0 + block 2"]
    edited = pm.at(params, ["**/block_0/**", "**/block_2/**"]).zero()
    assert_same_score(pair.score, score(edited))
    assert_close(
        pair.interaction,
        pair.delta - table["block 0"].delta - table["block 2"].delta,
        terms=4,
        scale=max(abs(row.score) for row in table.rows),
    )
    linear = {"a": np.array([1.0]), "b": np.array([2.0])}
    found = pm.ablate(linear, ["a", "b"], lambda p: p["a"][0] + p["b"][0], pairs=True)
    assert found.rows[2].interaction == 0


@pytest.mark.numeric
@pytest.mark.parametrize("how", [how for how in METHODS if how != "identity"])
@pytest.mark.parametrize("library", ["numpy", "jax", "torch"])
def test_methods(how, library):
    values = np.random.default_rng(0).normal(3, 2, size=(40, 50)).astype("float32")
    tree = {"w": values, "step": np.int32(7)}
    if library == "jax":
        tree = jax.tree.map(jnp.asarray, tree)
    if library == "torch":
        tree = {"w": torch.tensor(values), "step": torch.tensor(7)}
    seen = []

    def score(p):
        seen.append((p["w"].numpy() if library == "torch" else np.asarray(p["w"])).astype("float64"))
        assert int(p["step"]) == 7
        return p["w"].sum()

    table = pm.ablate(tree, {"all": "**"}, score, how=how, jit=False)
    whole, without = seen
    assert (whole == values).all()
    assert table.rows[0].leaves == 1  # a step is no weight
    expected = {
        "zero": lambda: (without == 0).all(),
        "mean": lambda: (
            (without == without[0, 0]).all()
            and abs(without[0, 0] - values.mean(dtype="float64")) <= bound("float32", terms=values.size, scale=3)
        ),
        "noise": lambda: (
            abs(without.mean() - 3) < 0.3 and abs(without.std() - 2) < 0.2 and not (without == whole).any()
        ),
        "permuted": lambda: (np.sort(without, None) == np.sort(whole, None)).all() and (without != whole).any(),
    }
    assert expected[how]()


def test_random_methods_depend_on_the_seed_and_the_path_alone():
    tree = {"a": np.arange(9.0), "b": np.arange(9.0)}

    def rows(seed, targets):
        return {
            r.name: r.score
            for r in pm.ablate(tree, targets, lambda p: p["a"][0] + 100 * p["b"][0], how="noise", seed=seed).rows
        }

    assert rows(0, ["a", "b"]) == rows(0, ["b", "a"])
    assert rows(0, ["a"]) != rows(1, ["a"])


def test_a_function_as_the_method_must_keep_the_spec():
    tree = {"w": np.ones(4, "float32")}
    assert pm.ablate(tree, ["w"], lambda p: p["w"].sum(), how=lambda x: x * np.float32(0.5)).rows[0].score == 2
    with pytest.raises(SpecMismatch):
        pm.ablate(tree, ["w"], lambda p: p["w"].sum(), how=lambda x: x[:2])


# ---- torch ---------------------------------------------------------------------------------------------------


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=64, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    ids = torch.randint(0, 64, (2, 12))
    return model, lambda m: m(ids, labels=ids).loss.detach()


def state(model):
    found = {name: value.reshape(-1) for name, value in model.state_dict().items()}
    return {name: (value.dtype, value.view(torch.uint8).numpy().tobytes()) for name, value in found.items()}


@pytest.mark.numeric
def test_every_block_of_a_transformers_model():
    model, score = llama()
    before, objects = state(model), list(map(id, model.parameters()))
    grads = [p.requires_grad for p in model.parameters()]
    table = pm.ablate(model, "model.layers.<n>.**", score, pairs=True)
    assert state(model) == before
    assert list(map(id, model.parameters())) == objects
    assert [p.requires_grad for p in model.parameters()] == grads
    assert [row.name for row in table.rows[:3]] == [f"model.layers.{i}.**" for i in range(3)]
    for i in range(3):
        other, _ = llama()
        with torch.no_grad():
            for parameter in other.model.layers[i].parameters():
                parameter.zero_()
        assert table.rows[i].score == float(score(other))
    assert table.baseline == float(score(model))


@pytest.mark.numeric
def test_a_layer_as_the_identity_scores_as_the_model_without_it():
    model, score = llama()
    before = state(model)
    table = pm.ablate(model, "model.layers.<n>.**", score, how="identity")
    assert state(model) == before
    assert [row.leaves for row in table.rows] == [2] * 3
    for i in range(3):
        shorter, _ = llama()
        del shorter.model.layers[i]
        for place, layer in enumerate(shorter.model.layers):
            layer.self_attn.layer_idx = place
        shorter.config.num_hidden_layers = 2
        assert table.rows[i].score == float(score(shorter))


def test_an_unknown_family_has_no_identity():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(BadArgument, match=r'how="identity" at 0\.0\.') as error:
        pm.ablate(model, "<n>.**", lambda m: 1.0, how="identity")
    assert 'how="zero"' in str(error.value)


def test_a_score_that_raises_leaves_the_module_as_it_was():
    model, score = llama()
    before, calls = state(model), []

    def broken(m):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return score(m)

    with pytest.raises(RuntimeError, match="out of memory"):
        pm.ablate(model, "model.layers.<n>.**", broken)
    assert state(model) == before
    with pytest.raises(KeyboardInterrupt):
        pm.ablate(model, ["lm_head.weight"], lambda m: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert state(model) == before


def test_nan_and_minus_zero_come_back_bit_for_bit():
    layer = torch.nn.Linear(2, 2)
    payload = torch.tensor([0x7FC00001, -2147483648], dtype=torch.int32).view(torch.float32)
    with torch.no_grad():
        layer.bias.copy_(payload)
    pm.ablate(layer, ["bias"], lambda m: m.weight.detach().sum())
    assert layer.bias.detach().view(torch.int32).tolist() == [0x7FC00001, -2147483648]


def test_a_score_that_changes_the_module_is_found_out():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    x = torch.randn(8, 4)
    with pytest.raises(Unsupported, match=r"the score changes 1\.num_batches_tracked") as error:
        pm.ablate(model, ["0.weight"], lambda m: m(x).square().mean().detach())
    assert "eval()" in str(error.value)
    model.eval()
    before = state(model)
    pm.ablate(model, ["0.weight"], lambda m: m(x).square().mean().detach())
    assert state(model) == before


def test_a_tied_weight_is_taken_out_once_under_both_paths():
    model, score = llama()
    table = pm.ablate(model, {"head": "lm_head.weight", "embedding": "model.embed_tokens.weight"}, score, pairs=True)
    head, embedding, both = table.rows
    assert head.score == embedding.score == both.score
    assert both.parameters == head.parameters


# ---- other trees ---------------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_nnx_modules_in_one_trace():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(3)])
            self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)

        def __call__(self, x):
            for block in self.blocks:
                x = x + nnx.tanh(block(x))
            return self.dropout(x)

    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 4))
    before = bits(nnx.state(net, nnx.Param))
    table = pm.ablate(net, "blocks/<n>/**", lambda m: m(x).sum())
    assert table.traces == 1
    assert bits(nnx.state(net, nnx.Param)) == before
    edited = pm.at(net, "blocks/1/**").zero()
    # 3 blocks with sums of 4 terms, and a sum of 8 outputs of up to 4
    assert_close(table.rows[1].score, float(edited(x).sum()), terms=3 * 4 + 8, scale=8 * 4, dtype="float32")
    everything = pm.ablate(net, {"all": "**"}, lambda m: m(x).sum())  # random states stay
    assert everything.rows[0].score == 8


@pytest.mark.numeric
def test_equinox_modules_in_one_trace():
    net = eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0))
    x = jnp.ones(4)
    table = pm.ablate(net, "layers/<n>/**", lambda m: m(x).sum())
    assert table.traces == 1
    for i, row in enumerate(table.rows):
        wanted = float(pm.at(net, f"layers/{i}/**").zero()(x).sum())
        assert_close(row.score, wanted, terms=4 + 8 + 8 + 4, scale=4, dtype="float32")


def test_a_checkpoint_is_edited_in_passing(tmp_path):
    safetensors.numpy.save_file({"a": np.ones(3), "b": np.full(2, 5.0)}, tmp_path / "m.safetensors")
    data = (tmp_path / "m.safetensors").read_bytes()
    with pm.open(tmp_path / "m.safetensors") as checkpoint:
        table = pm.ablate(checkpoint, ["a", "b"], lambda c: c["a"].sum() + c["b"].sum())
    assert [row.delta for row in table.rows] == [-3, -10]
    assert (tmp_path / "m.safetensors").read_bytes() == data


# ---- the report ----------------------------------------------------------------------------------------------


def test_the_report():
    tree = {"a": np.array([1.0]), "b": np.array([-5.0]), "c": np.array([math.nan])}
    table = pm.ablate(tree, ["a", "b"], lambda p: p["a"][0] + p["b"][0])
    assert [row.name for row in table.ranking] == ["b", "a"]
    assert str(table).split("\n")[0] == "2 ablations (zero), baseline -4; most without b: +5"
    assert json.loads(json.dumps(table.to_dict()))["rows"][0] == {
        "name": "a", "targets": ["a"], "score": -5.0, "delta": -1.0, "leaves": 1, "parameters": 1, "interaction": None,
    }  # fmt: skip
    with pytest.raises(KeyError, match="did you mean"):
        table["A"]
    odd = pm.ablate(tree, ["a", "b"], lambda p: p["a"][0] or math.nan)
    assert odd.ranking[0].name == "a"


def test_the_plot():
    table = pm.ablate({"a": np.ones(1), "b": np.ones(2)}, ["a", "b"], lambda p: p["a"].sum() + p["b"].sum())
    axes = table.plot().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [-1, -2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


# ---- block influence -----------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_block_influence_is_that_of_the_hidden_states():
    model, _ = llama()
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    found = pm.block_influence(model, [{"input_ids": ids[:1]}, {"input_ids": ids[1:]}], layers="model.layers.<n>")
    hidden = []  # of each input by itself: in a batch of two the products may round otherwise
    hooks = [model.model.layers[0].register_forward_pre_hook(lambda m, a: hidden.append(a[0]))]
    hooks += [
        layer.register_forward_hook(lambda m, a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    for each in (ids[:1], ids[1:]):
        model(each)
    for hook in hooks:
        hook.remove()
    states = [torch.cat([first, second]).double() for first, second in zip(hidden[:4], hidden[4:], strict=True)]
    expected = [1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairwise(states)]
    assert list(found) == [f"model.layers.{i}" for i in range(3)]
    # sums of 16 products for the cosines, and a mean of 24 of them
    assert_close(list(found.values()), expected, terms=16 + 24, scale=1)
    assert not any(layer._forward_hooks for layer in model.model.layers)


@pytest.mark.numeric
def test_an_identity_block_has_no_influence_and_scale_does_not_matter():
    class Scaled(torch.nn.Module):
        def forward(self, x):
            return (3 * x,)

    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4), torch.nn.Tanh())
    x = torch.randn(5, 4)
    found = pm.block_influence(model, [x], layers=["0", "1"])
    assert_close(found["0"], 0.0, terms=4 + 5, scale=1)
    assert found["1"] > 0
    # 3 × x is rounded to float32, and 1 - cos is of the order of the square of that
    assert_close(pm.block_influence(Scaled(), [x], layers=[""])[""], 0.0, terms=4 + 5, scale=1)


def test_block_influence_refuses_what_is_no_block():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    with pytest.raises(NoMatch, match="'00' is not among the names of 3 modules") as error:
        pm.block_influence(model, [torch.ones(1, 4)], layers=["00"])
    assert pm.block_influence(model, [torch.ones(1, 4)], **eval(f"dict({error.value.hint})"))
    with pytest.raises(BadArgument, match=r"1 turns \[1, 4\] into \[1, 2\]"):
        pm.block_influence(model, [torch.ones(1, 4)], layers="<n>")
    with pytest.raises(BadArgument, match="no inputs"):
        pm.block_influence(model, [], layers="<n>")
    with pytest.raises(BadArgument, match="torch module"):
        pm.block_influence({"w": np.ones(2)}, [1], layers="<n>")


# ---- errors --------------------------------------------------------------------------------------------------

TREE = {"a": np.ones(2), "step": np.int32(1)}


@pytest.mark.parametrize(
    ("args", "error", "said"),
    [
        ({"targets": ["b"]}, NoMatch, "matches none"),
        ({"targets": ["step"]}, BadArgument, "no leaf of floating dtype: step"),
        ({"targets": {}}, BadArgument, "no targets"),
        ({"targets": "layer_<n>"}, NoMatch, "layer_"),
        ({"targets": ["a"], "how": "zeros"}, BadArgument, 'how="zero"'),
        ({"targets": ["a"], "batch": 4}, BadArgument, "batch=0"),
        ({"targets": ["a"], "jit": True}, BadArgument, "not JAX arrays"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_scored(args, error, said):
    with pytest.raises(error, match=said) as caught:
        pm.ablate(TREE, score=lambda p: pytest.fail("scored"), **args)
    assert said in str(caught.value)


@pytest.mark.parametrize("result", [np.ones(3), "0.5", None, {"loss": 1.0}])
def test_a_score_that_is_no_number(result):
    with pytest.raises(BadArgument, match="not one number"):
        pm.ablate({"a": np.ones(2)}, ["a"], lambda p: result)


def test_a_score_that_cannot_be_traced_names_the_way_out():
    tree = {"a": jnp.ones(2)}
    with pytest.raises(BadArgument, match="cannot trace") as error:
        pm.ablate(tree, ["a"], lambda p: float(p["a"].sum()))
    assert "jit=False" in str(error.value)
    table = pm.ablate(tree, ["a"], lambda p: float(p["a"].sum()), jit=False)
    assert (table.rows[0].delta, table.traces) == (-2, None)


# ---- the command ---------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="paramend")


@pytest.fixture
def on_disk(tmp_path):
    tree = {f"layers.{i}.w": np.full(3, i + 1.0, "float32") for i in range(3)}
    safetensors.numpy.save_file(tree, tmp_path / "m.safetensors")
    (tmp_path / "score.py").write_text(
        "def score(tree):\n    return sum(x['w'].sum() for x in tree['layers'].values())\n"
    )
    return tmp_path


@pytest.mark.parametrize("kind", ["numpy", "jax", "torch"])
def test_the_command(on_disk, kind):
    data = (on_disk / "m.safetensors").read_bytes()
    args = ["ablate", on_disk / "m.safetensors", "layers.<n>.**", "--score", on_disk / "score.py", "--kind", kind]
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["delta"] for row in found["rows"]] == [-3, -6, -9]
    assert found["traces"] == (1 if kind == "jax" else None)
    assert "3 ablations (zero), baseline 18" in run(*args).stdout
    named = run(*args[:2], "--target", "two=layers[:2]/**", *args[3:], "--how", "mean", "--json")
    assert [(row["name"], row["delta"]) for row in json.loads(named.stdout)["rows"]] == [("two", 0)]
    assert (on_disk / "m.safetensors").read_bytes() == data
    assert sorted(path.name for path in on_disk.iterdir() if path.name != "__pycache__") == [
        "m.safetensors",
        "score.py",
    ]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def scor(tree): return 1", "no function `score`"),
        ("def score(tree: return 1", "line 1"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def score(tree): return tree['layer']", "KeyError: 'layer'"),
        ("def score(tree): return 'high'", "not one number"),
    ],
)
def test_score_files_that_do_not_work(on_disk, source, said):
    (on_disk / "score.py").write_text(source)
    done = run("ablate", on_disk / "m.safetensors", "layers.<n>.**", "--score", on_disk / "score.py")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output


def test_the_command_without_targets_or_without_a_file(on_disk):
    assert "no targets" in run("ablate", on_disk / "m.safetensors", "--score", on_disk / "score.py").stderr
    assert run("ablate", on_disk / "m.safetensors", "**", "--score", on_disk / "nope.py").exit_code == 2


# ---- quantised weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["zero", "mean", "noise", "permuted", lambda x: x])
def test_targets_of_codes_are_refused_before_the_model_is_scored(how):
    tree = {"fc": {"weight": np.ones((4, 8), "int8"), "weight_scales": np.ones(8, "float16")}, "head": np.ones(2)}
    with pytest.raises(pm.errors.Quantized, match=r"fc/weight_scales cannot be ablated as 'fc/\*\*'") as caught:
        pm.ablate(tree, ["head", "fc/**"], lambda tree: 1 / 0, how=how)
    assert "pm.ablate(..., raw=True)" in caught.value.hint
    assert (
        pm.ablate(tree, ["head", "fc/**"], lambda tree: float(tree["fc"]["weight_scales"].sum()), raw=True).baseline
        == 8
    )
    assert pm.ablate(tree, "head", lambda tree: float(tree["head"].sum())).rows[0].delta == -2


def test_targets_of_codes_that_can_be_decoded_are_weights():
    layer = {"weight_packed": np.array([[0x76543210]], "int32"), "weight_scale": np.ones((1, 1), "float32")}
    tree = {"fc": layer, "head": np.ones(2)}
    table = pm.ablate(tree, ["fc/weight", "head"], lambda tree: float(pm.at(tree, "fc/weight").one().sum()))
    assert table.baseline == -36 and {row.targets[0]: row.delta for row in table.rows} == {"fc/weight": 36, "head": 0}
