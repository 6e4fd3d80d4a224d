"""What a port finds by itself, what it refuses, and what can be done with the result."""

import ast

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

import paramend as pm
from paramend.errors import BadArgument, NoMatch, PortRefused, SpecMismatch
from support.porting import KEY, compact, random, zeros

t = torch.nn


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def made(module, x):
    """Variables of a linen module, all zero."""
    return jax.tree.map(zeros, jax.eval_shape(module.init, KEY, x))


def dense(width, **given):
    return nn.Dense(width, param_dtype=np.float64, **given)


X = np.random.default_rng(0).normal(size=(2, 4))
IMAGES = np.random.default_rng(0).normal(size=(2, 5, 6, 3))  # height 5, width 6
NESTED = compact(lambda x: dense(4)(nn.tanh(dense(4)(x))))  # the outer layer is Dense_0


def nested():
    return random(t.Sequential(t.Linear(4, 4), t.Tanh(), t.Linear(4, 4)))


def cnn():
    return random(
        t.Sequential(
            t.Conv2d(3, 4, 3, padding=1), t.BatchNorm2d(4), t.ReLU(), t.Flatten(), t.Linear(120, 5), t.LayerNorm(5)
        )
    )


def flax_cnn(eps=1e-5, padding="SAME"):
    def forward(x):
        x = nn.Conv(4, (3, 3), padding=padding, param_dtype=np.float64)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5, momentum=0.9, param_dtype=np.float64)(x))
        return nn.LayerNorm(epsilon=eps, param_dtype=np.float64)(dense(5)(x.reshape(x.shape[0], -1)))

    return compact(forward)


BOTH = {"target": (IMAGES,), "source": (IMAGES.transpose(0, 3, 1, 2),)}


# ---- what is found


def test_numbers_follow_construction_and_a_proof_finds_the_calls():
    variables = made(NESTED, X)
    module = nested()
    tree, report = pm.port(variables, module)
    assert len(report.unproven) == 4
    assert "rest on the numbers in names alone" in report.headline()
    wrong = NESTED.apply(tree, X) - module(torch.tensor(X)).detach().numpy()
    assert np.abs(wrong).max() > 0.1

    bound, report = pm.port(NESTED.bind(variables), module, prove=(X,))
    np.testing.assert_allclose(bound(X), module(torch.tensor(X)).detach().numpy(), atol=1e-11)
    assert report.proof and not report.unproven
    assert {row.path: row.source for row in report.copied}["params/Dense_1/kernel"] == "0.weight"


@pytest.mark.parametrize("given", ["module", "state dict"])
def test_features_that_were_flattened_change_places(given):
    module = cnn()
    source = module if given == "module" else {k: v for k, v in module.state_dict().items() if "num" not in k}
    linen = flax_cnn()
    rules = {"params/Dense_0/kernel": [{"reshape": {"shape": [5, 4, 30], "back": [5, 120]}}, {"transpose": [2, 1, 0]}]}
    rules["params/Dense_0/kernel"].append({"reshape": {"shape": [120, 5], "back": [30, 4, 5]}})
    if given == "state dict":
        with pytest.raises(PortRefused, match="4 channels of 30 places") as refused:
            pm.port(made(linen, IMAGES), source)
        assert refused.value.hint.startswith(f"rules={rules}")
    tree, report = pm.port(made(linen, IMAGES), source, rules=rules if given == "state dict" else None)
    want = module(torch.tensor(BOTH["source"][0])).detach().numpy()
    np.testing.assert_allclose(linen.apply(tree, IMAGES), want, atol=1e-11)
    assert not report.fresh


def test_a_proof_finds_how_features_were_flattened():
    module, linen = cnn(), flax_cnn()
    bound, report = pm.port(linen.bind(made(linen, IMAGES)), module, prove=BOTH)
    assert report.proof
    np.testing.assert_allclose(bound(IMAGES), module(torch.tensor(BOTH["source"][0])).detach().numpy(), atol=1e-11)
    assert [row.path for row in report.unused] == ["1.num_batches_tracked"]


class ClassifierFirst(t.Module):
    def __init__(self):
        super().__init__()
        self.classifier, self.features = t.Linear(4 * 36, 5), t.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


SQUARE = np.random.default_rng(0).normal(size=(2, 6, 6, 3))


def test_a_flattening_is_found_whatever_was_made_first():
    linen = compact(lambda x: dense(5)(nn.Conv(4, (3, 3), param_dtype=np.float64)(x).reshape(2, -1)))
    module, variables = random(ClassifierFirst()), made(linen, SQUARE)
    want = module(torch.tensor(SQUARE.transpose(0, 3, 1, 2))).detach().numpy()
    for source in (module, dict(sorted(module.state_dict().items()))):
        tree, report = pm.port(variables, source)
        np.testing.assert_allclose(linen.apply(tree, SQUARE), want, atol=1e-11)
        assert report.unproven == ["params/Dense_0/kernel"]


@pytest.mark.slow
def test_a_norm_of_flattened_features():
    layers = t.Conv2d(3, 4, 3, padding=1), t.Flatten(), t.BatchNorm1d(120), t.Linear(120, 5)
    norm = {"use_running_average": True, "epsilon": 1e-5, "param_dtype": np.float64}
    linen = compact(lambda x: dense(5)(nn.BatchNorm(**norm)(nn.Conv(4, (3, 3), param_dtype=float)(x).reshape(2, -1))))
    module, variables = random(t.Sequential(*layers)), made(linen, IMAGES)
    want = module(torch.tensor(BOTH["source"][0])).detach().numpy()
    tree, report = pm.port(variables, module)
    np.testing.assert_allclose(linen.apply(tree, IMAGES), want, atol=1e-11)
    bare = {path: value for path, value in module.state_dict().items() if "num" not in path}
    with pytest.raises(PortRefused, match="the layout of params/BatchNorm_0/scale is not known"):
        pm.port(variables, bare)
    _, again = pm.port(linen.bind(variables), module, prove=BOTH)
    assert again.proof and again.layout == report.layout
    back, _ = report.layout.back(tree)
    assert all(np.array_equal(back[path], value) for path, value in bare.items())


class Decoder(t.Module):
    def __init__(self, height):
        super().__init__()
        self.fc, self.up, self.shape = t.Linear(4, 12 * height), t.ConvTranspose2d(4, 3, 2, 2), (2, 4, height, 3)

    def forward(self, x):
        return self.up(self.fc(x).relu().view(self.shape))


@pytest.mark.slow
@pytest.mark.parametrize("height", [2, 3])
def test_a_dense_layer_that_makes_an_image(height):
    def forward(x):
        image = nn.relu(dense(12 * height)(x)).reshape(2, height, 3, 4)
        return nn.ConvTranspose(3, (2, 2), strides=(2, 2), padding="VALID", param_dtype=np.float64)(image)

    linen, module = compact(forward), random(Decoder(height))
    variables, want = made(linen, X), module(torch.tensor(X)).detach().numpy().transpose(0, 2, 3, 1)
    if height == 2:
        with pytest.raises(PortRefused, match="the layout of params/Dense_0/bias is not known: it may make 4 channels"):
            pm.port(variables, module)
    else:
        np.testing.assert_allclose(linen.apply(pm.port(variables, module)[0], X), want, atol=1e-11)
    bound, _ = pm.port(linen.bind(variables), module, prove=(X,))
    np.testing.assert_allclose(bound(X), want, atol=1e-11)
    assert torch.equal(pm.port(module, bound, prove=(X,))[0].fc.weight, module.fc.weight)


@pytest.mark.slow
def test_branches_that_are_joined_are_not_flattened_in_silence():
    class Branches(t.Module):
        def __init__(self):
            super().__init__()
            self.branches, self.fc = t.ModuleList(t.Conv2d(3, 4, 1) for _ in range(4)), t.Linear(16, 5)

        def forward(self, x):
            return self.fc(torch.cat([branch(x).mean((2, 3)) for branch in self.branches], 1))

    def forward(x):
        each = [nn.Conv(4, (1, 1), param_dtype=np.float64)(x).mean((1, 2)) for _ in range(4)]
        return dense(5)(jax.numpy.concatenate(each, 1))

    linen, module = compact(forward), random(Branches())
    variables = made(linen, IMAGES)
    with pytest.raises(PortRefused, match="it may follow 4 channels of 4 places each"):
        pm.port(variables, module)
    bound, _ = pm.port(linen.bind(variables), module, prove=BOTH)
    want = module(torch.tensor(BOTH["source"][0])).detach().numpy()
    np.testing.assert_allclose(bound(IMAGES), want, atol=1e-11)


def test_numbers_that_flax_gave_are_no_names():
    class Named(t.Module):
        def __init__(self):
            super().__init__()
            self.dense = t.ModuleList([t.Linear(4, 4), t.Linear(4, 4)])

        def forward(self, x):
            return self.dense[1](torch.tanh(self.dense[0](x)))

    module, variables = random(Named()), made(NESTED, X)
    assert len(pm.port(variables, module)[1].unproven) == 4
    bound, report = pm.port(NESTED.bind(variables), module, prove=(X,))
    np.testing.assert_allclose(bound(X), module(torch.tensor(X)).detach().numpy(), atol=1e-11)
    assert {row.path: row.source for row in report.copied}["params/Dense_1/kernel"] == "dense.0.weight"


def test_weights_of_gpt2_are_told_by_those_that_are_not_square():
    shapes = {"mlp.c_fc": (4, 8), "mlp.c_proj": (8, 4), "attn.c_proj": (4, 4)}
    source = {f"{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    source |= {f"{name}.bias": np.ones(shape[1]) for name, shape in shapes.items() if name.startswith("mlp")}
    source["attn.c_proj.weight"][0, 1] = 2
    target = {
        name: {"kernel": np.zeros(shape)} for name, shape in zip(["up", "down", "out"], shapes.values(), strict=True)
    }
    target["up"]["bias"], target["down"]["bias"] = np.zeros(8), np.zeros(4)
    tree, _ = pm.port(target, source)
    assert tree["out"]["kernel"][0, 1] == 2
    source["other.weight"] = source.pop("attn.c_proj.weight")
    with pytest.raises(PortRefused, match="it is square, and other weights of the source are"):
        pm.port(target, source)


def test_tied_leaves_that_a_file_holds_twice():
    table = np.arange(28.0).reshape(7, 4)
    source = {"wte.weight": table, "head.weight": table.copy(), "fc.weight": np.eye(4), "fc.bias": np.ones(4)}
    target = {"Embed_0": {"embedding": np.zeros((7, 4))}, "Dense_0": {"kernel": np.zeros((4, 4)), "bias": np.zeros(4)}}
    tree, report = pm.port(target, source)
    assert tree["Embed_0"]["embedding"].tolist() == table.tolist()
    assert not report.unused
    again, _ = report.layout.back(tree)
    assert again.keys() == source.keys() and (again["head.weight"] == table).all()
    del source["head.weight"]
    assert report.layout.to(source)[0]["Embed_0"]["embedding"].tolist() == table.tolist()
    source["head.weight"] = table + 1
    with pytest.raises(BadArgument, match="they are not equal"):
        report.layout.to(source)


def test_a_target_with_tied_leaves_and_a_source_with_two():
    table, head = np.arange(28.0).reshape(7, 4), np.ones((7, 4))
    target = {"Embed_0": {"embedding": np.zeros((7, 4))}}
    with pytest.raises(PortRefused) as refused:
        pm.port(target, {"wte.weight": table, "head.weight": head})
    assert refused.value.candidates == [(["wte", "head"], ["Embed_0"])]


def test_within_one_framework():
    target = random(t.ModuleDict({"fc1": t.Linear(4, 4), "fc2": t.Linear(4, 3)}), seed=1)
    source = random(t.Sequential(t.Linear(4, 4), t.Tanh(), t.Linear(4, 3)))
    module, _ = pm.port(target, source)
    assert (module["fc1"].weight == source[0].weight).all()
    with torch.no_grad():
        source[0].weight.zero_()
    assert module["fc1"].weight.abs().sum() > 0  # a copy

    class Twice(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.inner = nnx.Linear(4, 4, param_dtype=np.float64, rngs=rngs)
            self.outer = nnx.Linear(4, 4, param_dtype=np.float64, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.tanh(self.inner(x)))

    bound = NESTED.bind(pm.port(made(NESTED, X), nested())[0])
    with pytest.raises(PortRefused):
        pm.port(Twice(), bound)
    model, report = pm.port(Twice(), bound, prove=(X,))
    np.testing.assert_allclose(model(X), bound(X), atol=1e-11)
    assert [row.path for row in report.copied if row.source == "params/Dense_1/kernel"] == ["inner/kernel"]


def test_values_take_the_dtype_of_the_target():
    target = {"Dense_0": {"kernel": np.zeros((4, 3), "float16"), "bias": jax.ShapeDtypeStruct((3,), "float32")}}
    tree, report = pm.port(target, random(t.Linear(4, 3)))
    assert (tree["Dense_0"]["kernel"].dtype, tree["Dense_0"]["bias"].dtype) == ("float16", "float32")
    assert "cast from float64" in str(report)


def test_a_proof_does_not_round_to_the_dtypes_of_the_target():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.fc = nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.fc(x))

    for x64 in (False, True):
        with jax.enable_x64(x64):
            module = random(t.Sequential(t.Linear(4, 4), t.BatchNorm1d(4)))
            model, report = pm.port(Model(), module, prove=(X,))
            assert report.proof.outputs[0].relative <= 1e-11
            assert model.norm.mean[...].dtype == model.fc.kernel[...].dtype == "float32"


# ---- what is refused

TWINS = {"a": {"kernel": np.zeros((4, 4))}, "b": {"kernel": np.zeros((4, 4))}}
PAIR = {"x.weight": np.arange(16.0).reshape(4, 4), "y.weight": np.ones((4, 4))}


def test_layers_that_could_change_places_are_refused():
    with pytest.raises(PortRefused) as refused:
        pm.port(TWINS, PAIR)
    assert refused.value.candidates == [(["x", "y"], ["a", "b"])]
    assert refused.value.hint.startswith("rename={'x': 'a', 'y': 'b'}")
    assert refused.value.report.refused and not refused.value.report.copied


@pytest.mark.parametrize(
    "rename",
    [
        {"x": "b"},
        {"x.weight": "b/kernel"},
        {"x/**": "b/**"},
        {"x": "b", "y": "a"},
        {"{x,y}/**": "{b,a}/**"},
    ],
)
def test_a_rename_says_which_is_which(rename):
    tree, report = pm.port(TWINS, PAIR, rename=rename)
    assert tree["b"]["kernel"].tolist() == PAIR["x.weight"].T.tolist()
    assert "by rename" in str(report)


def test_a_layer_is_left_behind():
    tree, report = pm.port({"a": {"kernel": np.zeros((4, 4))}}, PAIR, rename={"x": None})
    assert (tree["a"]["kernel"] == 1).all()
    assert [(row.path, row.did) for row in report.unused] == [("x.weight", "left behind by `rename`")]


def test_a_rename_that_leads_nowhere():
    with pytest.raises(NoMatch, match="there is no c in the target"):
        pm.port(TWINS, PAIR, rename={"x": "c"})
    with pytest.raises(NoMatch):
        pm.port(TWINS, PAIR, rename={"z": "a"})
    with pytest.raises(SpecMismatch, match=r"x  weight \[4, 4\] does not fit d  kernel \[4, 3\]"):
        pm.port(TWINS | {"d": {"kernel": np.zeros((4, 3))}}, PAIR | {"z.weight": np.ones((3, 4))}, rename={"x": "d"})


class Square(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("proj", nn.initializers.zeros, (4, 4), np.float64)


@pytest.mark.parametrize("name", ["query", "embed_proj", "token_mixer"])
def test_a_square_parameter_is_no_table_by_half_of_its_name(name):
    with pytest.raises(PortRefused, match=f"the layout of {name} is not known"):
        pm.port({name: np.zeros((4, 4))}, {"layer." + name: np.eye(4)})
    table = {"pos_embed": np.zeros((4, 4))}
    assert pm.port(table, {"layer.position_embedding": np.eye(4)})[0]["pos_embed"].tolist() == np.eye(4).tolist()


@pytest.mark.parametrize("new", [(4, 1, 4), (1, 4, 4)])
def test_a_square_parameter_is_not_guessed_by_axes_of_length_one(new):
    target, source = {"params": {"gate": np.zeros(new)}}, {"gate": np.arange(16.0).reshape(4, 1, 4)}
    with pytest.raises(PortRefused, match="the layout of params/gate is not known") as refused:
        pm.port(target, source)
    steps = refused.value.hint.partition("rules=")[2].partition(", with")[0]
    tree, _ = pm.port(target, source, rules=ast.literal_eval(steps))
    assert tree["params"]["gate"].reshape(4, 4).tolist() == np.arange(16.0).reshape(4, 4).T.tolist()


class TorchSquare(t.Module):
    def __init__(self, turned):
        super().__init__()
        self.proj, self.turned = t.Parameter(torch.zeros(4, 4)), turned

    def forward(self, x):
        return x @ (self.proj.T if self.turned else self.proj)


def test_a_square_parameter_is_not_guessed():
    module, variables = random(TorchSquare(True)), made(Square(), X)
    with pytest.raises(PortRefused, match="the layout of params/proj is not known") as refused:
        pm.port(variables, module)
    assert refused.value.hint.startswith("rules={'params/proj': [{'transpose': [1, 0]}]}")
    tree, _ = pm.port(variables, module, rules={"params/proj": [{"transpose": [1, 0]}]})
    assert (tree["params"]["proj"] == module.proj.detach().numpy().T).all()
    for turned in (False, True):
        module = random(TorchSquare(turned))
        bound, report = pm.port(Square().bind(variables), module, prove=(X,))
        np.testing.assert_allclose(bound(X), module(torch.tensor(X)).detach().numpy(), atol=1e-11)
        assert report.proof


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (4, 1, 4)])
def test_a_norm_over_channels_and_places_of_one_length_is_not_guessed(shape):
    axes, x = tuple(range(1, len(shape) + 1)), np.random.default_rng(0).normal(size=(2, *shape))
    last = np.moveaxis(x, 1, -1)
    options = {"reduction_axes": axes, "feature_axes": axes, "epsilon": 1e-5, "param_dtype": np.float64}
    linen = compact(lambda x: nn.LayerNorm(**options)(x))
    module, variables = random(t.LayerNorm(shape)), made(linen, last)
    with pytest.raises(PortRefused, match="which are channels is not known") as refused:
        pm.port(variables, module)
    assert str(refused.value).count("the layout of params/") == 2  # scale and bias
    inputs = {"target": (last,), "source": (x,)}
    bound, report = pm.port(linen.bind(variables), module, prove=inputs)
    expected = np.moveaxis(module.weight.detach().numpy(), 0, -1)
    np.testing.assert_array_equal(bound.variables["params"]["LayerNorm_0"]["scale"], expected)
    back, _ = pm.port(random(t.LayerNorm(shape)), bound, prove={"target": (x,), "source": (last,)})
    assert report.proof and torch.equal(back.weight, module.weight) and torch.equal(back.bias, module.bias)


def test_a_square_einsum_is_not_guessed():
    linen = compact(lambda x: nn.Einsum((4, 4), "bi,oi->bo", use_bias=False, param_dtype=np.float64)(x))
    module, variables = random(t.Linear(4, 4, bias=False)), made(linen, X)
    with pytest.raises(PortRefused, match="it may be stored in several ways"):
        pm.port(variables, module)
    bound, _ = pm.port(linen.bind(variables), module, prove=(X,))
    np.testing.assert_allclose(bound(X), module(torch.tensor(X)).detach().numpy(), atol=1e-11)


def test_shapes_that_do_not_fit_are_listed():
    with pytest.raises(PortRefused) as refused:
        pm.port({"fc": {"kernel": np.zeros((4, 4))}}, {"fc.weight": np.ones((4, 3)), "fc.bias": np.ones(4)})
    for said in ("fc  weight [4, 3], bias [4]", "fc  kernel [4, 4]", "nothing was changed"):
        assert said in str(refused.value)


# ---- negative controls: the models differ, and a proof says where


def twin(**changes):
    """A torch network and its twin in linen, but for one change."""

    def forward(x):
        x = nn.LayerNorm(epsilon=changes.get("eps", 1e-5), param_dtype=np.float64)(dense(4)(x))
        return dense(4)(nn.gelu(x, approximate=changes.get("approximate", False)))

    return compact(forward), random(t.Sequential(t.Linear(4, 4), t.LayerNorm(4), t.GELU(), t.Linear(4, 4)))


@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({"eps": 1e-6}, {}, "LayerNorm_0: eps is 1e-06, and 1e-05 in the source"),
        ({"approximate": True}, {}, "4.7e-4 apart"),
        ({}, {"rules": {"params/Dense_1/kernel": []}}, "the first layer that differs is Dense_1"),
        ({}, {"rename": {"0": "Dense_1"}}, "the first difference is in"),
    ],
)
def test_a_difference_is_caught(changes, given, says):
    linen, module = twin(**changes)
    variables = made(linen, X)
    with pytest.raises(PortRefused) as refused:
        pm.port(linen.bind(variables), module, prove=(X,), **given)
    assert says in str(refused.value)
    assert not refused.value.report.proof
    right = twin()
    assert pm.port(right[0].bind(variables), right[1], prove=(X,))[1].proof


def test_a_flipped_kernel_is_caught():
    linen = compact(lambda x: nn.Conv(3, (3, 3), param_dtype=np.float64)(x))
    module, variables = random(t.Conv2d(3, 3, 3, padding=1)), made(linen, IMAGES)
    rules = {"params/Conv_0/kernel": [{"flip": [2, 3]}, {"transpose": [2, 3, 1, 0]}]}
    with pytest.raises(PortRefused, match="the first layer that differs is Conv_0"):
        pm.port(linen.bind(variables), module, prove=BOTH, rules=rules)


def test_the_bias_of_a_gru_that_nnx_has_no_place_for():
    cell = nnx.GRUCell(4, 4, param_dtype=np.float64, rngs=nnx.Rngs(0))
    module = random(t.GRUCell(4, 4))
    with pytest.raises(BadArgument, match="must be zero, because the other side has no place for it"):
        pm.port(cell, module)
    with torch.no_grad():
        module.bias_hh[8:] = 0
    assert (pm.port(cell, module)[0].dense_h.kernel[...] == module.weight_hh.detach().numpy().T).all()


def test_a_proof_needs_models_that_run():
    with pytest.raises(BadArgument, match="the target is parameters alone"):
        pm.port(made(NESTED, X), nested(), prove=(X,))
    with pytest.raises(BadArgument, match="a linen module holds no parameters"):
        pm.port(NESTED, nested())


# ---- in place, and what the report holds


def test_in_place():
    module, source = nested(), made(NESTED, X)
    source["params"]["Dense_0"]["kernel"][0, 1] = 5
    weight = module[0].weight
    report = pm.port_(module, source)
    assert module[0].weight is weight and weight[1, 0] == 5
    assert isinstance(report, type(pm.port(module, source)[1]))
    before = weight.tolist()
    with pytest.raises(PortRefused):
        pm.port_(module, {"Dense_0": {"kernel": np.ones((9, 9))}})
    assert weight.tolist() == before


def test_what_differs_beside_parameters_is_told():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.act = nnx.gelu

    class Torch(t.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.act = t.Conv2d(3, 4, 3), t.BatchNorm2d(4, eps=1e-3), t.GELU()

    _, report = pm.port(Model(nnx.Rngs(0)), Torch())
    assert report.to_dict()["warnings"] == [
        "conv: the padding is [(1, 1), (1, 1)], and [(0, 0), (0, 0)] in the source",
        "norm: eps is 1e-05, and 0.001 in the source",
        "norm: momentum (what stays of the old statistics) is 0.99, and 0.9 in the source",
        "GELU is tanh, and erf in the source: the two forms of GELU are up to 4.7e-4 apart",
    ]
    assert all(warning in str(report) for warning in report.warnings)
    assert "conv/kernel" in report.to_html()


def test_the_layout_is_kept_applied_and_reversed(tmp_path):
    module, linen = cnn(), flax_cnn()
    _, report = pm.port(made(linen, IMAGES), module)
    report.layout.save(tmp_path / "port.yaml")
    layout = pm.Layout.load(tmp_path / "port.yaml")
    assert layout == report.layout

    other = {name: value + 1 for name, value in module.state_dict().items()}
    save_file(other, tmp_path / "other.safetensors")
    torch.save(other, tmp_path / "other.pt")
    want, _ = layout.to(other)
    for name in ("other.safetensors", "other.pt"):
        with pm.open(tmp_path / name) as checkpoint:
            layout.to(checkpoint)[0].save(tmp_path / f"ported-{name}")
        pm.verify(tmp_path / f"ported-{name}", jax.tree.map(lambda leaf: leaf.numpy(), want))
        with pm.open(tmp_path / f"ported-{name}") as checkpoint:
            layout.back(checkpoint)[0].save(tmp_path / f"back-{name}")
        state = {path: value for path, value in other.items() if "num_batches" not in path}
        pm.verify(tmp_path / f"back-{name}", state)


def test_from_file_to_file(tmp_path):
    module = nested()
    torch.save(module.state_dict(), tmp_path / "torch.pt")
    pm.save(made(NESTED, X), tmp_path / "flax.msgpack")
    with pm.open(tmp_path / "flax.msgpack") as target, pm.open(tmp_path / "torch.pt") as source:
        ported, report = pm.port(target, source)
        ported.save(tmp_path / "out.msgpack")
    tree, _ = pm.port(made(NESTED, X), module)
    pm.verify(tmp_path / "out.msgpack", tree)
    assert len(report.copied) == 4


def test_rules_that_are_none():
    for rules in ("transpose", 5, [{"from": "x.weight"}]):
        with pytest.raises(BadArgument, match="is not a list of rules"):
            pm.port(TWINS, PAIR, rules=rules)
    for rename in ("x", {5: "a"}):
        with pytest.raises(BadArgument, match="is not a dict of paths"):
            pm.port(TWINS, PAIR, rename=rename)
    with pytest.raises(NoMatch):
        pm.port(TWINS, PAIR, rules={"c/kernel": []})
    rules = [{"from": "x.weight", "to": "b/kernel"}]
    tree, _ = pm.port(TWINS, PAIR, rules=rules)
    assert tree["b"]["kernel"].tolist() == PAIR["x.weight"].tolist()


@pytest.mark.parametrize("scheme", ["fp8-channel", "int4", "nf4", "bnb-int8"])
def test_quantised_weights_are_decoded(scheme, tmp_path):
    weights = {"a": torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), "b": torch.ones(8, 64)}
    state = {f"{name}.weight": weight for name, weight in weights.items()}
    state = pm.quantize(state, "a.weight", scheme=scheme)[0]
    values = pm.dequantize(state, dtype="float32")[0]["a.weight"].numpy()
    target = {name: {"kernel": np.zeros(weight.shape[::-1], "float32")} for name, weight in weights.items()}
    save_file(state, tmp_path / "model.safetensors")
    for source in (state, pm.open(tmp_path / "model.safetensors")):
        tree, report = pm.port(target, source)
        assert np.array_equal(tree["a"]["kernel"], values.T) and len(report.copied) == 2
